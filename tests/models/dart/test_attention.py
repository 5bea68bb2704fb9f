"""Every form of the attention of blocks against one softmax with a whole mask; its memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.base import TokenInputs
from models.common.cache import KeysValues
from models.dart.attention import Blocks, find_blocks, masked_block_attention
from models.dart.flex import flex_block_attention, mask_function, tile_mask
from models.dart.merged_attention import merged_block_attention
from models.dart.model import FAMILY
from tests.models.dart.cases import config_of, model_of, text_of
from tests.summation import in_own_order
from tests.tolerance import FP64, rounding

LENGTH, SIZE = 29, 5


def _positions() -> Tensor:
    """Two rows whose documents begin inside blocks of each other."""
    lengths = ([7, 1, 12, 9], [29])
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).int()


def _blocks(kind: str, size: int = SIZE) -> Blocks:
    """`plain` rows, `packed` documents, or rows whose context is `hidden` before some blocks."""
    generator = torch.Generator().manual_seed(0)
    both_ways = torch.rand(2, LENGTH, generator=generator) < 0.5
    positions = {"plain": None, "packed": _positions()}.get(kind)
    if kind == "hidden":
        index, begins = torch.arange(LENGTH).expand(2, -1), torch.zeros(2, LENGTH, dtype=torch.long)
        begins[0, 3 * size :], begins[1, size:] = 3 * size, size
        positions = (index - begins).int()
    return find_blocks(both_ways, positions, size=size)


@cache
def _whole_mask(kind: str, size: int = SIZE) -> Tensor:
    """bool [2, s, 2 s] from the definition, row by row and pair by pair."""
    blocks = _blocks(kind, size)
    mask = torch.zeros(2, LENGTH, 2 * LENGTH, dtype=torch.bool)
    starts, documents = (x.expand(2, -1).tolist() for x in (blocks.starts, blocks.documents))
    for b in range(2):
        for i in range(LENGTH):
            for j in range(LENGTH):
                mask[b, i, j] = documents[b][i] <= j <= starts[b][i]
                own = starts[b][j] == starts[b][i]
                mask[b, i, LENGTH + j] = own and (bool(blocks.both_ways[b, i]) or j <= i)
    return mask


def _inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, n, LENGTH, 8, generator=generator, dtype=dtype, requires_grad=True)
        for n in (4, 2, 2, 2, 2)
    ]


def _eager(inputs: list[Tensor], mask: Tensor) -> Tensor:
    q, ck, cv, k, v = inputs
    keys, values = (
        torch.cat(pair, dim=2).repeat_interleave(2, dim=1) for pair in ((ck, k), (cv, v))
    )
    scores = (q @ keys.transpose(2, 3) / 8**0.5).masked_fill(~mask.unsqueeze(1), -torch.inf)
    return scores.softmax(-1) @ values


FORMS: dict[str, Any] = {
    "merged": merged_block_attention,
    "masked": masked_block_attention,
}


@pytest.mark.parametrize(
    ("form", "tiles"),
    [("merged", (q, k)) for q in (1, 4, 5, 7, 64) for k in (3, 512)]
    + [("masked", (q, 0)) for q in (4, 7, 512)],
)
@pytest.mark.parametrize("kind", ["plain", "packed", "hidden"])
@pytest.mark.parametrize("size", [1, SIZE, 64])
def test_every_form_is_a_softmax_over_every_pair(form, tiles, kind, size, monkeypatch):
    monkeypatch.setattr("models.dart.attention.QUERY_BLOCK", tiles[0])
    monkeypatch.setattr("models.dart.merged_attention.QUERY_TILE", tiles[0])
    monkeypatch.setattr("models.dart.merged_attention.KEY_TILE", tiles[1])
    inputs, blocks = _inputs(), _blocks(kind, size)
    q, *keys_values = inputs
    found = FORMS[form](q, KeysValues(*keys_values[:2]), KeysValues(*keys_values[2:]), blocks)
    expected = _eager(inputs, _whole_mask(kind, size))
    torch.testing.assert_close(found, expected, **FP64)
    weights = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected)]
    for own_gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own_gradient, other, **FP64)


def test_merged_parts_in_bf16_are_as_close_as_rounding_lets_them(monkeypatch):
    monkeypatch.setattr("models.dart.merged_attention.QUERY_TILE", 7)
    inputs, blocks = _inputs(torch.bfloat16), _blocks("packed")
    q, *keys_values = inputs
    found = merged_block_attention(
        q, KeysValues(*keys_values[:2]), KeysValues(*keys_values[2:]), blocks
    )
    assert found.dtype == torch.bfloat16
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = _eager(wide, _whole_mask("packed"))
    weights = torch.randn(found.shape).bfloat16()
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad((found * weights).sum(), inputs),
            torch.autograd.grad((expected * weights.double()).sum(), wide),
            strict=True,
        ),
    ]
    for own, exact in pairs:
        error = (own.double() - exact).abs().max() / exact.abs().max()
        assert error < rounding(torch.bfloat16, depth=3, length=2)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["plain", "packed", "hidden"])
@pytest.mark.parametrize("size", [1, SIZE, 64])
def test_flex_attention_is_a_softmax_over_every_pair(kind, size):
    """As it stands: torch has its backward, and its compiled form, on CUDA alone."""
    inputs, blocks = [x.detach() for x in _inputs()], _blocks(kind, size)
    context, own = KeysValues(*inputs[1:3]), KeysValues(*inputs[3:])
    found = flex_block_attention(inputs[0], context, own, blocks, attend=flex_attention)
    torch.testing.assert_close(found, _eager(inputs, _whole_mask(kind, size)), **FP64)


@pytest.mark.parametrize("kind", ["plain", "packed", "hidden"])
@pytest.mark.parametrize("size", [1, SIZE, 64])
def test_flex_tiles_and_its_mask_function_see_what_the_definition_says(kind, size, monkeypatch):
    monkeypatch.setattr("models.dart.flex.TILE", 4)
    blocks = _blocks(kind, size)
    expected, is_seen = _whole_mask(kind, size), mask_function(blocks)
    row, query, key = torch.meshgrid(
        torch.arange(2), torch.arange(LENGTH), torch.arange(2 * LENGTH), indexing="ij"
    )
    assert torch.equal(is_seen(row, torch.zeros_like(row), query, key), expected)
    mask = tile_mask(blocks, 2)
    num_full = num_empty = 0
    for b in range(2):
        for i in range(mask.kv_num_blocks.shape[2]):
            lists = [
                set(indices[b, 0, i, : counts[b, 0, i]].tolist())
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            ]
            partial, full = lists
            assert not partial & full
            for j in range(-(-2 * LENGTH // 4)):
                tile = expected[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                if j in full:
                    assert tile.all()
                elif j not in partial:
                    assert not tile.any()
                    num_empty += 1
            num_full += len(full)
    assert num_empty > 0 or size == 64
    assert num_full > 0 or (kind, size) == ("packed", 64) or size == 64


class _Largest(TorchDispatchMode):
    """The entries of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result)
                 if isinstance(x, Tensor)]  # fmt: skip
        self.entries = max(self.entries, *sizes, 0)
        return result


def _largest_of(form: str, kind: str, length: int) -> int:
    """The largest tensor of a forward and a backward pass over rows with one head of 8 channels."""
    positions = torch.arange(length).int().unsqueeze(0) % 500 if kind == "packed" else None
    blocks = find_blocks(torch.arange(length).unsqueeze(0) % 64 < 32, positions, size=SIZE)
    q, *rest = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(5))
    with _Largest() as largest:
        found = FORMS[form](q, KeysValues(*rest[:2]), KeysValues(*rest[2:]), blocks)
        found.sum().backward()
    return largest.entries


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_merged_parts_make_nothing_larger_than_a_tile_or_the_stream_itself(kind, monkeypatch):
    assert _largest_of("merged", kind, 2048) <= 128 * 512
    monkeypatch.setattr("models.dart.attention.QUERY_BLOCK", 2048)
    assert _largest_of("masked", kind, 2048) >= 2048 * 2048  # which the measure would see


@pytest.mark.parametrize("p_uncond", [0.0, 0.01])
def test_no_matrix_over_pairs_of_places_is_made_by_a_model(p_uncond):
    length = 2048
    config = config_of(
        p_uncond=p_uncond, max_position_embeddings=length, hidden_size=16, num_heads=2,
        num_kv_heads=1, intermediate_size=16, num_layers=2, diffusion_steps=4,
    )  # fmt: skip
    model, text = model_of(config).float(), text_of(length + 1)
    with in_own_order(), _Largest() as largest:
        output = model(TokenInputs(text[:, :-1].contiguous()))
        total, _ = FAMILY.loss(output, text[:, 1:], config=config, ctx=model.ctx)
        total.backward()
    # Modulations of every place; where context is hidden, a mask of the causal stream's 512 places.
    assert largest.entries <= length * (512 if p_uncond else 6 * 16)


@pytest.mark.parametrize("p_uncond", [0.0, 0.1])
def test_a_model_in_tiles_has_the_loss_and_gradients_of_one_with_masks(p_uncond, monkeypatch):
    config, text = config_of(p_uncond=p_uncond), text_of(LENGTH + 1, batch=2)
    monkeypatch.setattr("models.dart.merged_attention.QUERY_TILE", 7)
    results = []
    for form in ("merged", "masked"):
        monkeypatch.setattr("models.dart.block_attention.merged_block_attention", FORMS[form])
        model = model_of(config)
        output = model(TokenInputs(text[:, :-1].contiguous()))
        total, _ = FAMILY.loss(output, text[:, 1:], config=config, ctx=model.ctx)
        results.append((total, *torch.autograd.grad(total, list(model.parameters()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **FP64)
