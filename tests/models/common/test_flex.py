"""Packed rows, windows and sinks as FlexAttention; the oracle is a softmax over every pair.

As it stands FlexAttention has no gradient on a CPU; `tests/gpu` compares every one on a device.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from models.common import attention, flex
from models.common.attention import packed_attention, windowed_attention
from models.common.flex import kernel, span_attention, span_mask
from models.common.rope import positions_in_segments
from tests.tolerance import FP64

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LENGTHS = ((7, 1, 70, 12), (90,), (1,) * 90, (64, 26), (3, 87))


def _positions(*rows: tuple[int, ...]) -> Tensor:
    segments = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in rows]
    return positions_in_segments(torch.stack(segments).int())


def _first(positions: Tensor, window: int) -> Tensor:
    return torch.arange(positions.shape[1]).int() - positions.clamp(max=window - 1)


def _seen(first: Tensor, num_sinks: int) -> Tensor:
    """bool [b, s, num_sinks + s], pair by pair."""
    batch, length = first.shape
    seen = torch.ones(batch, length, num_sinks + length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            for key in range(length):
                seen[row, query, num_sinks + key] = first[row, query] <= key <= query
    return seen


def _qkv(length: int, num_sinks: int, *, heads: int = 4, size: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, length, size), *[(2, heads // 2, num_sinks + length, size)] * 2)
    return tuple(torch.randn(x, dtype=torch.float64, generator=generator) for x in shapes)


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(dim=-1) @ v


@torch.no_grad()
@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("window", [1, 5, 90])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_span_attention_is_a_softmax_over_every_pair(lengths, window, num_sinks):
    positions, operands = _positions(lengths, LENGTHS[0]), _qkv(90, num_sinks)
    found = span_attention(
        *operands, positions, window=window, num_sinks=num_sinks, attend=flex_attention
    )
    expected = _softmax(*operands, _seen(_first(positions, window), num_sinks))
    torch.testing.assert_close(found, expected, **FP64)


@pytest.mark.parametrize("num_sinks", [0, 3, 8, 9])
@pytest.mark.parametrize("window", [1, 5, 90])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_tiles_and_the_mask_function_see_what_the_definition_says(
    lengths, window, num_sinks, monkeypatch
):
    monkeypatch.setattr("models.common.flex.TILE", 4)
    positions = _positions(lengths, LENGTHS[0])
    expected = _seen(_first(positions, window), num_sinks)
    mask = span_mask(positions, window, num_sinks)
    row, query, key = torch.meshgrid(*(torch.arange(n) for n in expected.shape), indexing="ij")
    assert torch.equal(mask.mask_mod(row, torch.zeros_like(row), query, key), expected)
    num_full = 0
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for b in range(2):
        for i in range(-(-90 // 4)):
            masked, full = (set(x[b, 0, i, : n[b, 0, i]].tolist()) for n, x in lists)
            assert not masked & full
            num_full += len(full)
            for j in range(-(-expected.shape[2] // 4)):
                tile = expected[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                assert (j in masked or j in full) == bool(tile.any())
                assert j not in full or tile.all()
    assert num_full > 0 or window < 8


@torch.no_grad()
def test_the_work_of_a_packed_row_grows_with_its_length():
    """Tiles of documents of 500 tokens: eight times as many in a row eight times as long."""
    tiles = []
    for length in (2048, 16384):
        positions = (torch.arange(length) % 500).int().unsqueeze(0)
        mask = span_mask(positions, None, 0)
        tiles.append(int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()))
    assert tiles[1] < 9 * tiles[0]


@torch.no_grad()
def test_layers_that_are_given_the_same_positions_share_a_mask_until_they_change():
    operands, masks = _qkv(90, 0), []

    def attend(q, k, v, *, block_mask, enable_gqa):
        masks.append(block_mask)
        return q

    def layer(positions: Tensor, window: int) -> object:
        span_attention(*operands, positions, window=window, attend=attend)
        return masks[-1]

    positions = _positions(*LENGTHS[:2])
    before = layer(positions, 5)
    assert layer(positions, 5) is before
    assert layer(positions, 7) is not before
    positions.copy_(_positions((90,), (90,)))
    dead = weakref.ref(before)
    assert layer(positions, 5) is not before
    del before
    masks.clear()
    gc.collect()
    assert dead() is None
    kept = len(flex._masks)
    del positions
    assert len(flex._masks) == kept - 1


@torch.no_grad()
def test_functions_of_packed_rows_hand_it_the_spans_that_they_describe(monkeypatch):
    """`has_kernel` is true on CUDA alone, where these calls are taken."""
    positions, operands = _positions(*LENGTHS[:2]), _qkv(90, 0)
    sunk = _qkv(90, 3)
    calls = (
        lambda: packed_attention(*operands, positions),
        lambda: packed_attention(*sunk, positions, num_sinks=3),
        lambda: windowed_attention(*operands, window=5, positions=positions),
        lambda: windowed_attention(*operands, window=200, positions=positions),
    )
    expected = [call() for call in calls]
    taken = []

    def eager(*arguments, **options):
        taken.append(options)
        return span_attention(*arguments, **options, attend=flex_attention)

    monkeypatch.setattr(attention, "_takes_spans", lambda q: True)
    monkeypatch.setattr(attention, "span_attention", eager)
    for call, other in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), other, **FP64)
    assert len(taken) == len(calls)


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_kernel_takes_the_lists_and_the_mask():
    """On a CPU, where torch compiles one of heads of 64 that is right, without a gradient."""
    positions = _positions((200, 1, 183), (384,))
    operands = [x.float() for x in _qkv(384, 5, size=64)]
    found = span_attention(*operands, positions, window=150, num_sinks=5, attend=kernel())
    expected = _softmax(*(x.double() for x in operands), _seen(_first(positions, 150), 5))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
