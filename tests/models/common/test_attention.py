from __future__ import annotations

import math

import pytest
import torch

from models.common import attention
from models.common.attention import (
    CausalSelfAttention,
    cached_attention,
    causal_attention,
    packed_attention,
    windowed_attention,
)
from models.common.rope import RotaryTable, positions_in_segments
from parallel.context import Axis, ParallelContext
from parallel.sharding import Normal
from tests.refusals import assert_refused

HEADS = [(4, 4), (4, 2), (6, 1)]


def _qkv(heads: int, kv_heads: int, length: int, keys: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, n, s, 8, requires_grad=True)
        for n, s in ((heads, length), (kv_heads, keys or length), (kv_heads, keys or length))
    ]


def _eager(q, k, v, allowed: torch.Tensor) -> torch.Tensor:
    """The equation in fp64, one query head at a time, with the whole matrix of scores."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        scores = q[:, head].double() @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
        outputs.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values)
    return torch.stack(outputs, dim=1)


def _assert_values_and_gradients_equal(actual, expected, inputs) -> None:
    upstream = torch.randn_like(actual)
    ours = torch.autograd.grad(actual, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_causal_attention_equals_the_equation(heads, kv_heads):
    q, k, v = _qkv(heads, kv_heads, 33)
    allowed = torch.ones(33, 33, dtype=torch.bool).tril()
    expected = _eager(q, k, v, allowed)
    _assert_values_and_gradients_equal(causal_attention(q, k, v), expected, (q, k, v))


@pytest.mark.parametrize("block", [8, 33, 512])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_packed_attention_equals_the_equation_in_every_block_size(
    heads, kv_heads, block, monkeypatch
):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v = _qkv(heads, kv_heads, 33)
    segments = torch.stack((torch.arange(33) // 10, torch.tensor([0] * 3 + [1] + [2] * 29))).int()
    same = segments[:, :, None] == segments[:, None, :]
    expected = _eager(q, k, v, same & torch.ones(33, 33, dtype=torch.bool).tril())
    actual = packed_attention(q, k, v, positions_in_segments(segments))
    _assert_values_and_gradients_equal(actual, expected, (q, k, v))


def test_packed_attention_keeps_memory_for_backward_that_grows_with_the_length_only(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    q, k, v = _qkv(2, 2, 1024)
    kept: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    positions = torch.arange(1024, dtype=torch.int32).expand(2, -1)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        packed_attention(q, k, v, positions)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(storages.values()) <= 4 * q.untyped_storage().nbytes()


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("queries", [1, 7, 33])
def test_continued_attention_equals_the_last_rows_of_the_equation(queries, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v = _qkv(4, 2, queries, keys=33)
    allowed = torch.ones(33, 33, dtype=torch.bool).tril()[33 - queries :]
    actual = cached_attention(q, k, v)
    torch.testing.assert_close(actual.double(), _eager(q, k, v, allowed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "name"), [(6, 4, "num_heads"), (8, 2, "num_kv_heads")]
)
def test_heads_that_the_tensor_size_does_not_divide_are_refused(num_heads, num_kv_heads, name):
    with assert_refused(
        name,
        value=num_heads if name == "num_heads" else num_kv_heads,
        constraint="parallel.tensor=4",
        remedy="tensor size",
    ):
        CausalSelfAttention(
            64,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=8,
            rotary=RotaryTable(8, 16, theta=100.0),
            ctx=ParallelContext(tensor=Axis(size=4)),
            init=Normal(0.02),
            output_init=Normal(0.02),
        )


@pytest.mark.parametrize("window", [1, 2, 5, 64, 70, 200])
@pytest.mark.parametrize(("length", "earlier"), [(1, 0), (1, 30), (9, 4), (150, 0), (150, 40)])
def test_windowed_attention_sees_the_last_positions(length, earlier, window):
    earlier = min(earlier, window - 1)
    q, k, v = _qkv(4, 2, length, length + earlier)
    distance = torch.arange(earlier, earlier + length).unsqueeze(1) - torch.arange(length + earlier)
    allowed = (distance >= 0) & (distance < window)
    actual = windowed_attention(q, k, v, window=window)
    _assert_values_and_gradients_equal(actual, _eager(q, k, v, allowed), (q, k, v))


@pytest.mark.parametrize("window", [1, 3, 64, 200])
def test_windowed_attention_ends_at_the_beginning_of_a_document(window):
    q, k, v = _qkv(4, 2, 90)
    lengths = torch.tensor([7, 1, 70, 12])
    segments = torch.repeat_interleave(torch.arange(4), lengths).int().expand(2, -1).contiguous()
    index = torch.arange(90)
    distance = index.unsqueeze(1) - index
    same = segments[0].unsqueeze(1) == segments[0]
    allowed = (distance >= 0) & (distance < window) & same
    actual = windowed_attention(q, k, v, window=window, positions=positions_in_segments(segments))
    _assert_values_and_gradients_equal(actual, _eager(q, k, v, allowed), (q, k, v))


def test_every_document_sees_the_sinks():
    q, k, v = _qkv(4, 2, 20, 23)
    segments = torch.repeat_interleave(torch.arange(2), torch.tensor([7, 13])).int()
    segments = segments.expand(2, -1).contiguous()
    index = torch.arange(20)
    same = (segments[0].unsqueeze(1) == segments[0]) & (index.unsqueeze(1) >= index)
    allowed = torch.cat((torch.ones(20, 3, dtype=torch.bool), same), dim=1)
    actual = packed_attention(q, k, v, positions_in_segments(segments), num_sinks=3)
    _assert_values_and_gradients_equal(actual, _eager(q, k, v, allowed), (q, k, v))


@pytest.mark.parametrize("window", [1, 2, 7, 63, 65])
@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (2, 90), (70, 90), (130, 400)])
def test_keys_far_before_the_window_are_not_seen(queries, keys, window):
    q, k, v = _qkv(4, 2, queries, keys)
    distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    allowed = (distance >= 0) & (distance < window)
    actual = windowed_attention(q, k, v, window=window)
    _assert_values_and_gradients_equal(actual, _eager(q, k, v, allowed), (q, k, v))
