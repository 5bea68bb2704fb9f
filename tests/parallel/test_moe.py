"""The expert layer against a loop over tokens in fp64, at every expert and tensor size."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.dynamic.token_gather import Selection, add_tokens, gather_tokens, whole_tokens
from models.dynamic.token_router import gather_or_broadcast, top_k
from parallel import moe
from parallel.context import ParallelContext
from parallel.moe import Experts, MoELayer, MoEOutput
from parallel.random import initialize
from parallel.regions import local_sequence
from parallel.sharding import Normal, merge, sharding_of, sum_partial_gradients
from tests.distributed import run_ranks
from tests.refusals import assert_refused
from tests.tolerance import FP64

SEQ, ROWS, HIDDEN, INNER, NUM_EXPERTS, TOP_K = 12, 4, 8, 12, 8, 2
IDLE = 6  # the expert that no token chooses
TWINS = (2, 5)  # experts whose scores are always equal
SETTINGS = {
    "dropless": {"top_k": TOP_K},
    "capacity": {"top_k": TOP_K, "capacity_factor": 0.75},
    "one expert, capacity": {"top_k": 1, "renormalize": False, "capacity_factor": 1.0},
    "weights as they are": {"top_k": 3, "renormalize": False},
}


class Measured(NamedTuple):
    """The loss, what tokens get, the gradients of the input and of every parameter; all whole."""

    loss: Tensor
    hidden: Tensor
    input_gradient: Tensor
    gradients: dict[str, Tensor]


def _data() -> tuple[Tensor, Tensor]:
    """Input and targets [s, rows, h]: whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (SEQ, ROWS, HIDDEN), generator=generator).float()
    x[..., 0] = 1.0
    x[3, 1, 1:] = 0.0  # a token for which all but one score are equal
    return x, torch.randn(SEQ, ROWS, HIDDEN, generator=generator)


def _layer(ctx: ParallelContext, **settings) -> MoELayer:
    layer = MoELayer(
        HIDDEN, INNER, num_experts=NUM_EXPERTS, ctx=ctx,
        init=Normal(0.3), output_init=Normal(0.3), **settings,
    )  # fmt: skip
    ranks = {"tensor_rank": ctx.tensor.rank, "expert_rank": ctx.expert.rank}
    initialize(layer, seed=5, prefix="moe", **ranks)
    with torch.no_grad():
        weight = layer.router.weight
        weight.copy_((4 * weight).round() / 4)
        weight[:, 0] = 0.0
        weight[IDLE, 0] = -100.0
        weight[TWINS[1]] = weight[TWINS[0]]
    return layer


def _objective(output: MoEOutput, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What the tokens given add to a mean over rows of SEQ tokens, and what the router adds."""
    of_tokens = (output.hidden * targets).sum() / (SEQ * targets.shape[1])
    return of_tokens, (0.3 * output.load_balancing_loss + 0.1 * output.z_loss).mean()


def _loop(layer: MoELayer, x: Tensor, targets: Tensor) -> Measured:
    """The equations of MoELayer, token by token."""
    weights = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    router, gate, up, down = (weights[n] for n in ("router.weight", *_EXPERTS))
    x = x.double().requires_grad_()
    top_k, factor = layer.router.top_k, layer.capacity_factor
    capacity = SEQ if factor is None else math.ceil(factor * SEQ * top_k / NUM_EXPERTS)
    rows, balances, z_losses = [], [], []
    for row in range(x.shape[1]):
        taken, chosen = [0] * NUM_EXPERTS, [0] * NUM_EXPERTS
        means, outputs, squares = [], [], []
        for token in x[:, row]:
            scores = router @ token
            p = scores.exp() / scores.exp().sum()
            best = sorted(range(NUM_EXPERTS), key=lambda e: (-scores[e].item(), e))[:top_k]
            total = sum(p[e] for e in best) if layer.router.renormalize else 1.0
            output = torch.zeros_like(token)
            for e in best:
                chosen[e] += 1
                if taken[e] < capacity:
                    taken[e] += 1
                    inner = F.silu(gate[e] @ token) * (up[e] @ token)
                    output = output + p[e] / total * (down[e] @ inner)
            outputs.append(output)
            means.append(p)
            squares.append(scores.exp().sum().log() ** 2)
        z_losses.append(torch.stack(squares).mean())
        mean = torch.stack(means).mean(0)
        share = [number / (SEQ * top_k) for number in chosen]
        balances.append(NUM_EXPERTS * sum(f * m for f, m in zip(share, mean, strict=True)))
        rows.append(torch.stack(outputs))
        assert chosen[IDLE] == 0
        assert (factor is None) == (sum(taken) == sum(chosen)), "some token must be dropped"
    hidden = torch.stack(rows, dim=1)
    losses = torch.stack(balances), torch.stack(z_losses)
    loss = sum(_objective(MoEOutput(hidden, *losses), targets.double()))
    loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    return Measured(loss.detach(), hidden.detach(), x.grad, gradients)


_EXPERTS = ("experts.gate", "experts.up", "experts.down")


def _gathered(x: Tensor, group: dist.ProcessGroup | None, size: int) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def _of_chosen_tokens(layer: MoELayer, x: Tensor, ctx: ParallelContext) -> MoEOutput:
    """The layer for the half of each row's tokens that score best, added to x."""
    scores = x[..., 1:].sum(-1)
    selection = Selection(top_k(gather_or_broadcast(scores, ctx=ctx), SEQ // 2))
    output = layer(gather_tokens(x, selection, ctx=ctx))
    hidden = add_tokens(x, output.hidden, scores.sigmoid(), selection, ctx=ctx)
    return output._replace(hidden=hidden)


def _measure(settings: dict, *, chosen: bool = False, **layout) -> Measured:
    """One step of this rank's rows, and what all ranks together have computed."""
    ctx = ParallelContext.from_world(**layout)
    layer = _layer(whole_tokens(ctx) if chosen else ctx, **settings)
    sum_partial_gradients(layer, ctx)
    x, targets = (each.chunk(ctx.data.size, dim=1)[ctx.data.rank] for each in _data())
    x = local_sequence(x, ctx=ctx).clone().requires_grad_()
    output = _of_chosen_tokens(layer, x, ctx) if chosen else layer(x)
    of_tokens, of_router = _objective(output, local_sequence(targets, ctx=ctx))
    (of_tokens + of_router).backward()
    total = of_tokens.detach()
    if ctx.sequence_parallel:
        dist.all_reduce(total, group=ctx.tensor.group)
    total = total + of_router.detach()
    dist.all_reduce(total, group=ctx.data.group)

    def whole(tokens: Tensor) -> Tensor:
        if ctx.sequence_parallel:
            tokens = torch.cat(_gathered(tokens, ctx.tensor.group, ctx.tensor.size))
        return torch.cat(_gathered(tokens, ctx.data.group, ctx.data.size), dim=1)

    gradients = {n: _whole_gradient(n, p, ctx) for n, p in layer.named_parameters()}
    return Measured(
        total / ctx.data.size,
        whole(output.hidden.detach()),
        whole(x.grad) / ctx.data.size,
        gradients,
    )


def _whole_gradient(name: str, parameter: torch.nn.Parameter, ctx: ParallelContext) -> Tensor:
    """The mean over data ranks, where each expert's is the sum on the ranks that hold it."""
    sharding = sharding_of(name, parameter)
    own = ctx.data if sharding.experts is None else ctx.expert_data
    gradient = parameter.grad / ctx.data.size
    dist.all_reduce(gradient, group=own.group)
    if sharding.experts is not None and ctx.expert.size > 1:
        gradient = torch.cat(_gathered(gradient, ctx.expert.group, ctx.expert.size))
    return merge(_gathered(gradient, ctx.tensor.group, ctx.tensor.size), sharding)


def _assert_equal(measured: Measured, expected: Measured) -> None:
    close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
    for name in ("loss", "hidden", "input_gradient"):
        torch.testing.assert_close(getattr(measured, name), getattr(expected, name), **close)
    assert measured.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            measured.gradients[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_layer_equals_a_loop_over_tokens_in_loss_and_every_gradient(name):
    _assert_equals_a_loop(_layer(ParallelContext.single(), **SETTINGS[name]))


@pytest.mark.parametrize("name", ["dropless", "weights as they are"])
def test_grouped_products_equal_a_loop_over_tokens_in_loss_and_every_gradient(name, monkeypatch):
    """In torch's form for a CPU, which has the same interface as the kernel."""
    monkeypatch.setattr(Experts, "multiplies_grouped", lambda self, x: True)
    monkeypatch.setattr(moe, "_by_counts", None)
    _assert_equals_a_loop(_layer(ParallelContext.single(), **SETTINGS[name]))


def _assert_equals_a_loop(layer: MoELayer) -> None:
    x, targets = _data()
    expected = _loop(layer, x, targets)
    x.requires_grad_()
    output = layer(x)
    loss = sum(_objective(output, targets))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    measured = Measured(loss.detach(), output.hidden.detach(), x.grad, gradients)
    _assert_equal(measured, expected)
    for of_rows in (output.load_balancing_loss, output.z_loss):
        assert (of_rows.dtype, of_rows.shape) == (torch.float32, (ROWS,))
    assert not gradients["experts.down"][IDLE].any()


LAYOUTS = {
    "expert 1": (4, {}),
    "expert 2 of data 4": (4, {"expert": 2}),
    "expert 4": (4, {"expert": 4}),
    "tensor 2 x expert 2": (4, {"expert": 2, "tensor": 2}),
    "tensor 2 x expert 2, sequence parallel": (
        4, {"expert": 2, "tensor": 2, "sequence_parallel": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["dropless", "capacity"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_equals_a_loop_over_tokens_in_loss_and_every_gradient(name, layout):
    expected = _loop(_layer(ParallelContext.single(), **SETTINGS[name]), *_data())
    world_size, sizes = LAYOUTS[layout]
    for measured in run_ranks(_measure, world_size, SETTINGS[name], **sizes):
        _assert_equal(measured, expected)


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_experts_of_chosen_tokens_are_equal_at_any_layout(name):
    (expected,) = run_ranks(_measure, 1, SETTINGS[name], chosen=True)
    for layout in ("expert 4", "tensor 2 x expert 2, sequence parallel"):
        world_size, sizes = LAYOUTS[layout]
        for measured in run_ranks(_measure, world_size, SETTINGS[name], chosen=True, **sizes):
            _assert_equal(measured, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_changing_a_token_changes_no_earlier_one_and_no_other_row(name):
    layer = _layer(ParallelContext.single(), **SETTINGS[name]).double()
    x = _data()[0].double()
    before = layer(x).hidden
    for position in range(1, SEQ):
        changed = x.clone()
        changed[position:, 2] = x[:-position, 3]
        after = layer(changed).hidden
        # Not bit for bit: an expert multiplies as many rows as it was chosen for.
        torch.testing.assert_close(before[:position], after[:position], **FP64)
        torch.testing.assert_close(before[:, [0, 1, 3]], after[:, [0, 1, 3]], **FP64)
        assert not torch.equal(before[position:, 2], after[position:, 2]), position


@torch.no_grad()
def test_in_evaluation_no_token_is_dropped():
    limited = _layer(ParallelContext.single(), **SETTINGS["capacity"])
    unlimited = _layer(ParallelContext.single(), **SETTINGS["dropless"])
    x, _ = _data()
    expected = unlimited(x).hidden
    assert not torch.allclose(limited(x).hidden, expected)
    assert torch.equal(limited.eval()(x).hidden, expected)


def test_with_capacity_a_step_asks_the_device_for_no_value():
    layer = _layer(ParallelContext.single(device="meta"), **SETTINGS["capacity"])
    x = torch.zeros(SEQ, ROWS, HIDDEN, device="meta", requires_grad=True)
    sum(output.sum() for output in layer(x)).backward()
    assert x.grad.shape == x.shape


def test_operands_of_grouped_products_begin_where_kernels_load(monkeypatch):
    """Weights in a flat buffer behind an odd number of elements; CUDA refuses them."""
    layer = _layer(ParallelContext.single(), top_k=TOP_K).experts
    counts = torch.full((NUM_EXPERTS,), SEQ // 4)
    x = torch.randn(int(counts.sum()), HIDDEN)
    expected = layer(x, counts.tolist())
    for parameter in layer.parameters():
        flat = torch.cat((torch.zeros(1), parameter.detach().flatten()))
        parameter.data = flat[1:].view(parameter.shape)
    multiply = F.grouped_mm

    def checked(*operands, **options):
        assert not any(operand.data_ptr() % 16 for operand in operands)
        return multiply(*operands, **options)

    monkeypatch.setattr(F, "grouped_mm", checked)
    found = layer(x, counts)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_compiled_layers_ask_for_a_kernel_without_a_break(monkeypatch):
    def capability(device):
        torch.get_num_threads()  # torch.compile traces this as little as torch's own function
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    device = torch.device("cuda")

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + moe._has_grouped_kernel(device)

    assert compiled(torch.zeros(())) == 1


@pytest.mark.parametrize("shape", [(0, ROWS), (SEQ, 0)])
@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_no_tokens_have_no_outputs_and_no_gradients(name, is_grouped, shape, monkeypatch):
    monkeypatch.setattr(Experts, "multiplies_grouped", lambda self, x: is_grouped)
    layer = _layer(ParallelContext.single(), **SETTINGS[name])
    x = torch.zeros(*shape, HIDDEN, requires_grad=True)
    hidden = layer(x).hidden
    hidden.sum().backward()
    assert hidden.shape == x.grad.shape == x.shape
    assert not layer.experts.gate.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("is_grouped", [True, False])
def test_weights_that_are_there_in_the_forward_pass_of_experts_alone_suffice(
    is_grouped, monkeypatch
):
    """As under ZeRO-3, whose hooks gather them around it."""
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda device: is_grouped)
    ctx = ParallelContext.single()
    layer = MoELayer(
        8, 16, num_experts=4, top_k=2, ctx=ctx, init=Normal(0.3), output_init=Normal(0.3)
    ).to(torch.bfloat16)
    initialize(layer, seed=5, prefix="moe", tensor_rank=0, expert_rank=0)
    x = _data()[0].to(torch.bfloat16)
    expected = layer(x).hidden
    whole = {name: p.data for name, p in layer.experts.named_parameters()}

    def gather(*_):
        for name, p in layer.experts.named_parameters():
            p.data = whole[name]

    def partition(*_):
        for p in layer.experts.parameters():
            p.data = torch.empty(0, dtype=p.dtype)

    partition()
    layer.experts.register_forward_pre_hook(gather)
    layer.experts.register_forward_hook(partition)
    assert torch.equal(layer(x).hidden, expected)


def test_grouped_products_ask_the_device_for_no_value():
    ctx = ParallelContext.single(device="meta")
    layer = MoELayer(
        8, 16, num_experts=4, top_k=2, ctx=ctx, init=Normal(0.3), output_init=Normal(0.3)
    ).to(torch.bfloat16)
    x = torch.zeros(SEQ, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    counts = torch.zeros(4, device="meta", dtype=torch.int64)
    layer.experts.grouped(x, counts).square().sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("hidden", "inner", "dtype", "is_grouped"),
    [
        (8, 16, torch.bfloat16, True),
        (8, 16, torch.float32, False),
        (12, 16, torch.bfloat16, False),
        (8, 12, torch.bfloat16, False),
    ],
)
def test_products_are_grouped_where_a_kernel_takes_them(
    hidden, inner, dtype, is_grouped, monkeypatch
):
    layer = MoELayer(
        hidden, inner, num_experts=4, top_k=2, ctx=ParallelContext.single(),
        init=Normal(0.3), output_init=Normal(0.3),
    ).to(dtype)  # fmt: skip
    x = torch.zeros(SEQ, hidden, dtype=dtype)
    assert not layer.experts.multiplies_grouped(x), "a CPU has no such kernel"
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda device: True)
    assert layer.experts.multiplies_grouped(x) == is_grouped


@torch.no_grad()
def test_equal_scores_go_to_the_lower_number_and_an_even_spread_costs_1():
    layer = _layer(ParallelContext.single(), **SETTINGS["dropless"])
    layer.router.weight.zero_()
    routing = layer.router(_data()[0])
    assert routing.experts.unique(dim=0).flatten(0, 1).unique(dim=0).tolist() == [[0, 1]]
    assert routing.load_balancing_loss.tolist() == pytest.approx([1.0] * ROWS)
    assert routing.z_loss.tolist() == pytest.approx([math.log(NUM_EXPERTS) ** 2] * ROWS)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"top_k": 9}, ("top_k", 9, "1 and num_experts=8", "choose")),
        ({"top_k": 1}, ("renormalize", True, "top_k=1", "renormalize=False")),
        (
            {"top_k": 2, "capacity_factor": 0.0},
            ("capacity_factor", 0.0, "positive", ("1.25", "None")),
        ),
        (
            {"top_k": 2, "capacity_factor": math.nan},
            ("capacity_factor", "nan", "positive", ("1.25", "None")),
        ),
    ],
)
def test_sizes_that_make_no_layer_are_refused(changes, parts):
    with assert_refused(*parts):
        _layer(ParallelContext.single(), **changes)


def _experts_that_do_not_divide():
    ctx = ParallelContext.from_world(expert=2)
    with assert_refused(
        "num_experts", value=3, constraint="parallel.expert=2", remedy="expert size"
    ):
        MoELayer(HIDDEN, INNER, num_experts=3, top_k=2, ctx=ctx)


def test_experts_that_the_expert_size_does_not_divide_are_refused():
    run_ranks(_experts_that_do_not_divide, 2)
