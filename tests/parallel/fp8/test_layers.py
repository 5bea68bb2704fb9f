"""Linear layers in emulated FP8: collectives, blocks and shards, refusals, and runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.registry import family_names
from parallel.context import ParallelContext
from parallel.fp8.emulation import fp8_product
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelHead,
    project_partial,
    project_replicated,
    project_together,
)
from parallel.precision import Precision
from parallel.random import initialize
from parallel.regions import gather_sequence, local_sequence
from parallel.sharding import sum_partial_gradients
from tests.distributed import run_ranks
from tests.equivalence import build, full_gradients
from tests.models.families import CASES
from tests.refusals import assert_refused
from tests.tolerance import assert_close, rounding

HIDDEN, INNER, SEQ, BATCH = 128, 256, 16, 4
# Scales of a tensor's shard differ from those of the tensor; those of blocks do not where shards
# are whole blocks.
BY_BLOCK = ("blockwise", "mxfp8")


class Mlp(torch.nn.Module):
    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        self.up = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx, bias=True)
        self.gate = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx)
        self.down = RowParallelLinear(INNER, HIDDEN, ctx=ctx, bias=True)
        initialize(self, seed=5, prefix="layer", tensor_rank=ctx.tensor.rank)
        with torch.no_grad():
            for number, bias in enumerate((self.up.bias, self.down.bias)):
                bias.fill_(0.1 * (number + 1))

    def forward(self, x):
        up, gate = project_together(x, self.up, self.gate)
        return self.down(up * torch.tanh(gate))


def _input() -> torch.Tensor:
    return torch.randn(SEQ, BATCH, HIDDEN, generator=torch.Generator().manual_seed(0))


def _measure(recipe: str, *, tensor: int = 1, sequence_parallel: bool = False):
    """Output, gradient of the input and of every parameter, whole."""
    precision = Precision("fp8", recipe, "emulated")
    if tensor == 1:
        ctx = ParallelContext.single(precision=precision)
    else:
        ctx = ParallelContext.from_world(
            tensor=tensor, sequence_parallel=sequence_parallel, precision=precision
        )
    model = Mlp(ctx)
    sum_partial_gradients(model, ctx)
    x = _input().requires_grad_()
    y = gather_sequence(model(local_sequence(x, ctx=ctx)), ctx=ctx)
    # Under sequence parallelism every rank has the whole loss, and gradients are summed.
    (y.square().sum() / (tensor if sequence_parallel else 1)).backward()
    if sequence_parallel:
        torch.distributed.all_reduce(x.grad)
    return {"y": y.detach(), "x": x.grad, **full_gradients(model, ctx)}


def _assert_equal_but_for_neighbours(found: torch.Tensor, expected: torch.Tensor, name: str):
    """Sums in another order may round an operand to the neighbouring FP8 number, 2^-3 away for
    E4M3: one term of a sum of at least 64, and so the sums that it is a term of, which are few."""
    close = rounding(torch.float32, depth=4, length=INNER) * expected.abs().max()
    error = (found - expected).abs()
    assert (error > close).float().mean() < 0.1, name
    assert_close(found, expected, 4 * 2**-3 / 64**0.5, name)


@pytest.mark.parametrize("recipe", BY_BLOCK)
def test_two_tensor_ranks_equal_one_where_shards_are_whole_blocks(recipe):
    alone = _measure(recipe)
    for measured in run_ranks(_measure_both, 2, recipe):
        for found in measured:
            assert found.keys() == alone.keys()
            for name, expected in alone.items():
                _assert_equal_but_for_neighbours(found[name], expected, name)


def _measure_both(recipe: str):
    return [_measure(recipe, tensor=2, sequence_parallel=split) for split in (False, True)]


def test_one_rank_multiplies_with_its_operands_in_fp8_and_adds_its_bias():
    for recipe in ("tensorwise", *BY_BLOCK):
        ctx = ParallelContext.single(precision=Precision("fp8", recipe, "emulated"))
        model, x = Mlp(ctx), _input()
        up = fp8_product(x, model.up.weight, recipe) + 0.1
        inner = up * torch.tanh(fp8_product(x, model.gate.weight, recipe))
        assert torch.equal(model(x), fp8_product(inner, model.down.weight, recipe) + 0.2)
        exact = (x @ model.up.weight.T).norm()
        error = (fp8_product(x, model.up.weight, recipe) - x @ model.up.weight.T).norm() / exact
        assert 1e-3 < error < 0.1, "8 bits are neither exact nor nothing"


def test_gates_heads_and_slots_are_not_in_fp8():
    ctx = ParallelContext.single(precision=Precision("fp8", "tensorwise", "emulated"))
    gate = ColumnParallelLinear(HIDDEN, 3, ctx=ctx, role="gate")
    assert type(gate) is torch.nn.Linear
    assert type(VocabParallelHead(61, HIDDEN, ctx=ctx)) is torch.nn.Linear
    model, slots = Mlp(ctx), _input()[:5, :1]  # five rows, which no FP8 product can have
    (up,) = project_replicated(slots, model.up, ctx=ctx)
    assert torch.equal(up, F.linear(slots, model.up.weight, model.up.bias))
    assert torch.equal(project_partial(up, model.down), F.linear(up, model.down.weight))


@pytest.mark.parametrize(("recipe", "size"), [("tensorwise", 8), ("mxfp8", 16)])
def test_sizes_and_rows_that_the_kernels_refuse_are_refused(recipe, size):
    ctx = ParallelContext.single(precision=Precision("fp8", recipe, "emulated"))
    with assert_refused("FP8 linear", value=HIDDEN + size, constraint="multiples", remedy="change"):
        ColumnParallelLinear(HIDDEN, HIDDEN + size, ctx=ctx)
    layer = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx)
    with assert_refused("FP8 product", value=7, constraint="multiple of", remedy="change"):
        layer(torch.zeros(7, 1, HIDDEN))


# Sizes that are multiples of 16 in every linear layer.
CONFIGS = {
    name: CASES[name].config.model_copy(update=changes)
    for name, changes in {
        "agiformer": {"head_hidden": 32},
        "amrpa": {},
        "daria_former": {},
        "dart": {},
        "dtf": {"hidden_size": 64},
        "llama": {},
        "mod": {},
    }.items()
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_learns_in_fp8_as_in_bf16(name):
    """Ten steps on one batch: what 8 bits change is small beside what is learnt."""
    family, config = CASES[name].family, CONFIGS[name]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(61, (4, 33), generator=generator)
    inputs, labels = TokenInputs(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous()
    losses: dict[str, list[float]] = {}
    for precision in (Precision("bf16"), Precision("fp8", "tensorwise", "emulated")):
        ctx = ParallelContext.single(precision=precision)
        model = build(family.layer_specs(config), ctx, seed=7, noise=0.0).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = losses[precision.name] = []
        for _ in range(10):
            total, terms = family.loss(model(inputs), labels, config=config, ctx=ctx)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            curve.append(terms["lm_loss"].item())
    learnt = losses["bf16"][0] - losses["bf16"][-1]
    differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    assert 0 < max(differences) < learnt / 2


def test_every_family_is_listed():
    assert set(CONFIGS) == set(family_names())
