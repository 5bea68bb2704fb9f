"""Pooling, retrieval and reading of memory slots."""

from __future__ import annotations

import math

import pytest
import torch

from models.base import TokenInputs
from models.daria_former import memory
from models.daria_former.memory import (
    MemoryLayout,
    Slots,
    Tokens,
    memory_attention,
    packed_memory_attention,
    pool,
    retrieve,
)
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.decisions import observed_decisions
from tests.models.daria_former.cases import config_of, tokens_of

LAYOUT = MemoryLayout(
    segment_len=4, working_stride=2, episodic_stride=4, working_slots=3, episodic_slots=2, top_k=3
)
NOTHING = Slots(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8))


def _random_tokens(length: int, batch: int = 2) -> Tokens:
    torch.manual_seed(length)
    return Tokens(
        *(
            torch.randn(batch, heads, length, *rest, requires_grad=True)
            for heads, rest in ((4, (8,)), (2, (8,)), (2, (8,)), (2, ()))
        )
    )


@pytest.mark.parametrize("at_a_time", [1, 1 << 24])
def test_the_best_visible_slots_are_retrieved_with_their_distance_to_the_best(
    at_a_time, monkeypatch
):
    monkeypatch.setattr(memory, "_SCORES_AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    queries, keys = 20 * torch.randn(2, 2, 5, 8), torch.randn(2, 2, 9, 8)
    visible = torch.rand(5, 9) < 0.4
    visible[0], visible[1] = False, torch.arange(9) == 6
    found = retrieve(queries, Slots(keys, -keys), visible, top_k=4)
    for b in range(2):
        for g in range(2):
            for c in range(5):
                seen = visible[c].nonzero().flatten()
                rho = keys[b, g, seen].double() @ queries[b, g, c].double() / math.sqrt(8)
                best = rho.argsort(descending=True)[:4]
                count = len(best)
                own = found.keys[b, g, c], found.values[b, g, c], found.bias[b, g, c]
                assert torch.equal(own[0][:count], keys[b, g, seen[best]])
                assert torch.equal(own[1][:count], -keys[b, g, seen[best]])
                if count:
                    expected = (rho[best] - rho.max()).clamp(min=-30).float()
                    torch.testing.assert_close(own[2][:count], expected, rtol=1e-4, atol=1e-4)
                assert (own[2][count:4] == -torch.inf).all()
                assert all((x[-1] == 0).all() for x in own)  # the empty slot
    assert (found.bias == -30).any()  # far slots are read all the same


def test_retrieved_slots_are_a_decision_that_another_run_may_give():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 9, 8)
    visible = torch.ones(3, 9, dtype=torch.bool)
    made, errors = [], []

    def give_the_worst(decision, error_for):
        made.append(decision)
        worst = (queries @ -keys.mT).topk(4, dim=-1).indices.transpose(0, 1)
        other = decision._replace(indices=worst)
        errors.extend(float(error_for(each).error) for each in (decision, other))
        return other

    common = {"slots": Slots(keys, -keys), "visible": visible, "top_k": 4}
    with observed_decisions(give_the_worst):
        own = retrieve(queries, **common)
        assert not made, "evaluation decides for itself"
        given = retrieve(queries, **common, training=True)
    assert made[0].indices.shape == (2, 2, 3, 4)  # heads, which tensor ranks share, come first
    assert errors[0] == 0 < errors[1]
    best, worst = own.keys[:, :, :, :4], given.keys[:, :, :, :4]
    assert (
        (queries.unsqueeze(-2) * best)
        .sum(-1)
        .min(-1)
        .values.gt((queries.unsqueeze(-2) * worst).sum(-1).max(-1).values)
        .all()
    )


def test_pooling_weighs_the_tokens_of_a_stride_by_their_anchors():
    tokens = _random_tokens(6, batch=1)
    slots = pool(tokens, 3)
    weights = tokens.anchors[0, 1, 3:6].exp() / tokens.anchors[0, 1, 3:6].exp().sum()
    torch.testing.assert_close(slots.keys[0, 1, 1], weights @ tokens.keys[0, 1, 3:6])
    torch.testing.assert_close(slots.values[0, 1, 1], weights @ tokens.values[0, 1, 3:6])


@pytest.mark.parametrize("packed", [False, True])
def test_a_first_segment_without_slots_reads_zero_and_has_finite_gradients(packed):
    """H10."""
    tokens, initial = _random_tokens(11), torch.zeros(2, 8)
    common = {
        "fixed": NOTHING,
        "query_gain": torch.randn(4, 8),
        "initial_query": initial,
        "layout": LAYOUT,
    }
    if packed:
        positions = torch.tensor([[*range(7), *range(4)], [*range(11)]], dtype=torch.int32)
        readout = packed_memory_attention(tokens, positions, **common)
        assert (readout[0, :, 7:] == 0).all()
    else:
        readout = memory_attention(tokens, **common)
    assert (readout[:, :, :4] == 0).all()
    assert (readout[1, :, 4:] != 0).all()
    gradients = torch.autograd.grad(readout.square().sum(), tokens)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 23])
def test_a_packed_row_of_one_document_reads_what_the_row_alone_reads(length):
    tokens, fixed = _random_tokens(length), Slots(torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8))
    common = {
        "fixed": fixed,
        "query_gain": torch.randn(4, 8),
        "initial_query": torch.randn(2, 8),
        "layout": LAYOUT,
    }
    alone = memory_attention(tokens, **common)
    positions = torch.arange(length, dtype=torch.int32).expand(2, -1)
    packed = packed_memory_attention(tokens, positions, **common)
    torch.testing.assert_close(packed, alone)
    upstream = torch.randn_like(alone)
    used = tokens if length > 4 else tokens[:1]
    for mine, other in zip(
        torch.autograd.grad(packed, used, upstream),
        torch.autograd.grad(alone, used, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_in_bf16_retrieves_the_slots_that_it_retrieves_in_fp32(monkeypatch):
    """H2: more than 99 of 100, although all that leads to the scores is rounded."""
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    select = memory._select

    def record(*args):
        chosen.append(select(*args))
        return chosen[-1]

    monkeypatch.setattr(memory, "_select", record)
    config = config_of(
        num_layers=2, hidden_dim=128, head_dim=32, initializer_range=0.02, segment_len=16,
        working_stride=4, episodic_stride=16, working_memory_slots=64, episodic_memory_slots=16,
        persistent_memory_slots=8, memory_top_k=8,
    )  # fmt: skip
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single()).eval()
    tokens = tokens_of(256, batch=2)
    model(TokenInputs(tokens))
    whole = model.bfloat16()(TokenInputs(tokens)).logits.float()
    cache = model.new_cache(2, 256)
    parts = [model(TokenInputs(t), cache).logits for t in tokens.split(48, dim=1)]
    assert _agreement(chosen[:2], chosen[2:4]) > 0.99
    # The same numbers are rounded in chunks, so a prefill decodes as it was trained: within a unit
    # in the last place, to which a sum in another order may round.
    difference = (torch.cat(parts).float() - whole).abs().mean() / whole.abs().mean()
    assert difference < 2 * torch.finfo(torch.bfloat16).eps


def _agreement(these, those) -> float:
    same = total = 0
    for (indices, found), (others, _) in zip(these, those, strict=True):
        shared = (indices.unsqueeze(-1) == others.unsqueeze(-2)).any(dim=-1) & found
        same, total = same + int(shared.sum()), total + int(found.sum())
    return same / total
