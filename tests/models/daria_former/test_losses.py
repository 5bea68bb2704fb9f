"""The losses beside the cross entropy: of every row as their equations in fp64 say, at every
layout, and of a step the same however it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.daria_former.losses import (
    emotion_smoothness,
    emotion_variance,
    mean_gates,
    memory_consistency,
    repetition,
)
from models.daria_former.model import FAMILY, rhythm_regularizer
from parallel.context import ParallelContext
from parallel.regions import local_sequence
from tests.distributed import run_ranks
from tests.models.daria_former.cases import config_of, model_of, tokens_of

S, B, H, HEADS, D, E, PATHS = 12, 2, 6, 4, 3, 5, 3
POSITIONS = torch.tensor([[*range(5), *range(7)], [0, *range(11)]], dtype=torch.int32)
# The dimension that tensor ranks share: heads, the columns of W_o, and of y and x the tokens.
SHARED = {"gates": 2, "readout": 1, "weight": 1}
TOKENS = ("x", "y")
ROW_WEIGHTS = torch.tensor([1.0, 3.0])


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "gates": (S, B, HEADS, PATHS), "readout": (B, HEADS, S, D), "x": (S, B, H),
        "weight": (H, HEADS * D), "y": (S, B, H), "emotion": (S, B, E),
    }  # fmt: skip
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found["y"][:, 0] = 1.0 + 0.2 * found["y"][:, 0]  # neighbours are alike
    return found


class Projection(nn.Module):
    """A linear layer whose weight has a gradient of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.product = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product)


def _losses(t: dict[str, Tensor], positions: Tensor | None, ctx: ParallelContext) -> Tensor:
    """[losses, B]."""
    projection = Projection(t["weight"])
    return torch.stack(
        [
            mean_gates(t["gates"], HEADS, ctx=ctx).square().sum(dim=1),
            memory_consistency(t["readout"], t["x"], projection, segment_len=5, ctx=ctx),
            repetition(t["y"], positions, ctx=ctx),
            emotion_smoothness(t["emotion"], positions, ctx=ctx),
        ]
    )


def _equations(t: dict[str, Tensor], positions: Tensor | None) -> Tensor:
    rows = []
    for b in range(B):
        memory, alike, steps = [], [], []
        for c in (slice(0, 5), slice(5, 10)):
            written = t["weight"] @ t["readout"][b, :, c].mean(dim=1).flatten()
            x = t["x"][c, b].detach()
            target = (x / x.square().mean(-1, keepdim=True).sqrt()).mean(dim=0)
            memory.append(1 - F.cosine_similarity(written, target, dim=0))
        for i in range(S - 1):
            if positions is None or positions[b, i + 1] > 0:
                y, e = t["y"][i : i + 2, b], t["emotion"][i : i + 2, b]
                alike.append((F.cosine_similarity(y[0], y[1], dim=0) - 0.9).relu())
                steps.append((e[1] - e[0]).square().sum())
        gates = t["gates"][:, b].mean(dim=(0, 1)).square().sum()
        rows.append(torch.stack([gates, *(torch.stack(x).mean() for x in (memory, alike, steps))]))
    return torch.stack(rows, dim=1)


def _local(tensors: dict[str, Tensor], ctx: ParallelContext) -> dict[str, Tensor]:
    size, rank, local = ctx.tensor.size, ctx.tensor.rank, {}
    for name, value in tensors.items():
        if name in SHARED:
            value = value.chunk(size, dim=SHARED[name])[rank]
        elif name in TOKENS:
            value = local_sequence(value, ctx=ctx)
        local[name] = value.clone().requires_grad_()
    return local


def _measure(
    positions: Tensor | None, tensor: int, sequence_parallel: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    ctx = ParallelContext.single()
    if tensor > 1:
        ctx = ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)
    local = _local(_inputs(), ctx)
    losses = _losses(local, positions, ctx)
    (losses * ROW_WEIGHTS).sum().backward()
    return losses.detach(), {n: t.grad for n, t in local.items() if t.grad is not None}


def _merged(gradients: list[dict[str, Tensor]], sequence_parallel: bool) -> dict[str, Tensor]:
    """By the conventions of parallel.regions."""
    merged = {}
    for name in gradients[0]:
        parts = [g[name] for g in gradients]
        if name in SHARED:
            merged[name] = torch.cat(parts, dim=SHARED[name])
        elif name in TOKENS and sequence_parallel:
            merged[name] = torch.cat(parts)
        else:
            merged[name] = sum(parts) if sequence_parallel else parts[0]
    return merged


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["1", "2", "2+SP"]
)
def test_values_and_gradients_are_those_of_the_equations_at_every_layout(
    tensor, sequence_parallel, positions
):
    whole = {name: x.double().requires_grad_() for name, x in _inputs().items()}
    expected = _equations(whole, positions)
    assert (expected.mean(dim=1) > 0.01).all()
    (expected * ROW_WEIGHTS).sum().backward()
    options = (positions, tensor, sequence_parallel)
    results = [_measure(*options)] if tensor == 1 else run_ranks(_measure, tensor, *options)
    for losses, _ in results:
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = _merged([g for _, g in results], sequence_parallel)
    assert gradients.keys() == {name for name, x in whole.items() if x.grad is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), whole[name].grad, rtol=1e-4, atol=1e-6)


def test_nothing_to_compare_costs_nothing():
    ctx = ParallelContext.single()
    inputs = _inputs()
    starts = torch.zeros(B, S, dtype=torch.int32)  # every token is a document
    nothing = [0.0] * B
    assert repetition(inputs["y"], starts, ctx=ctx).tolist() == nothing
    assert emotion_smoothness(inputs["emotion"], starts, ctx=ctx).tolist() == nothing
    assert repetition(inputs["y"][:1], None, ctx=ctx).tolist() == nothing
    unlike = torch.randn(S, B, 64)
    assert repetition(unlike, None, ctx=ctx).tolist() == nothing
    projection = Projection(inputs["weight"])  # no segment is complete
    short = inputs["readout"][:, :, :4], inputs["x"][:4], projection
    assert memory_consistency(*short, segment_len=5, ctx=ctx).tolist() == nothing
    still = torch.ones(S, B, 4, requires_grad=True)
    assert repetition(still, None, ctx=ctx).tolist() == pytest.approx([0.1] * B)
    assert emotion_smoothness(still, None, ctx=ctx).tolist() == nothing


def test_hidden_states_of_zeros_have_finite_gradients():
    y = torch.zeros(S, B, H, requires_grad=True)
    repetition(y, None, ctx=ParallelContext.single()).sum().backward()
    assert (y.grad == 0).all()


def test_the_total_is_the_weighted_sum_and_the_measurements_are_not_in_it():
    weights = {
        "emotion_loss": 0.3, "repetition_loss": 0.2, "rhythm_loss": 0.5, "memory_loss": 0.7,
        "gate_loss": 0.9,
    }  # fmt: skip
    settings = {name + "_weight": w for name, w in weights.items() if name != "gate_loss"}
    config = config_of(gate_balance_weight=0.9, **settings)
    model, tokens = model_of(config).train(), tokens_of(21, batch=2)
    labels = tokens[:, 1:].clone()
    labels[0, :7] = -100
    output = model(TokenInputs(tokens[:, :-1]))
    total, terms = FAMILY.loss(output, labels, config=config, ctx=model.ctx)
    nats = F.cross_entropy(output.logits.flatten(0, 1), labels.T.flatten())
    log_p = output.logits.double().log_softmax(dim=-1)
    spread = (log_p.exp() * log_p).sum(dim=-1).var(dim=0, correction=0)
    rhythm = (1 - spread).relu() @ torch.tensor([13 / 33, 20 / 33]).double()  # by scored tokens
    assert terms["lm_loss"].item() == pytest.approx(nats.item(), rel=1e-5)
    assert terms["rhythm_loss"].item() == pytest.approx(rhythm.item(), rel=1e-4)
    expected = terms["lm_loss"] + sum(w * terms[name] for name, w in weights.items())
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(terms) == set(FAMILY.loss_names)
    gates = sum(terms[f"gate_{path}"] for path in config.all_paths)
    assert gates.item() == pytest.approx(1.0, abs=1e-5)


def test_an_evaluation_reports_no_loss_but_those_of_predictions():
    model, tokens = model_of(config_of()).eval(), tokens_of(9)
    output = model(TokenInputs(tokens))
    assert (output.aux == 0).all()


def test_rhythm_and_emotion_variance():
    entropies = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    assert rhythm_regularizer(entropies, 3.0).tolist() == pytest.approx([2.0, 3.0])
    assert rhythm_regularizer(entropies, 0.5).tolist() == pytest.approx([0.0, 0.5])
    e = torch.randn(40, 2, 5)
    expected = [e[:, row].var(dim=0, correction=0).mean().item() for row in range(2)]
    assert emotion_variance(e).tolist() == pytest.approx(expected, rel=1e-4)
    assert emotion_variance(e[:1]).tolist() == [0.0, 0.0]


def _step_in_parts(parts: list[list[int]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Terms and gradients of a step over four packed rows in micro-batches, in fp64."""
    weights = dict.fromkeys((f"{n}_loss_weight" for n in ("emotion", "repetition", "memory")), 1.0)
    config = config_of(num_layers=2, gate_balance_weight=1.0, rhythm_loss_weight=1.0, **weights)
    model, stream = model_of(config, segmented=True).train().double(), tokens_of(25, batch=4)
    starts = torch.tensor([[24, 24], [1, 3], [12, 24], [2, 23]])
    segments = (torch.arange(25).view(1, -1, 1) >= starts.unsqueeze(1)).sum(dim=2).int()
    labels = stream[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], -100)
    labels[3, 4:] = -100
    num_scored = (labels != -100).sum().double() / len(parts)
    means: dict[str, Tensor] = {}
    for part in parts:
        output = model(TokenInputs(stream[part, :-1], segments[part, :-1]))
        total, terms = FAMILY.loss(
            output, labels[part], config=config, ctx=model.ctx, num_scored=num_scored
        )
        (total / len(parts)).backward()
        for name, value in {"loss": total.detach(), **terms}.items():
            means[name] = means.get(name, 0.0) + value / len(parts)
    return means, [p.grad for p in model.parameters()]


def test_a_step_with_every_loss_at_work_is_the_same_in_any_micro_batches(monkeypatch):
    """Hinges bend where a mean over a micro-batch would differ from a mean over its rows."""
    monkeypatch.setattr("models.daria_former.losses.LEAST_GATE", 0.1)
    monkeypatch.setattr("models.daria_former.losses.FREE_SIMILARITY", 0.2)
    terms, gradients = _step_in_parts([[0, 1, 2, 3]])
    assert all(value > 0 for name, value in terms.items() if name != "gate_modality")
    for parts in ([[0], [1], [2], [3]], [[0, 1, 2], [3]]):
        found, own = _step_in_parts(parts)
        for name, value in terms.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=0.0, msg=name)
        for one, other in zip(own, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
