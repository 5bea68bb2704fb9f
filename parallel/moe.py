"""Mixture-of-experts feed-forward layer with top-k routing.

`MoELayer` takes the place of a family's dense feed-forward layer. Tensor ranks share the columns of
every expert; the experts are distributed over expert ranks (a part of the data axis).

Shapes: s sequence, b batch, h hidden, f intermediate, E experts, k experts per token, n = s b
tokens, C slots per expert and row, m slots in all, t tensor size, p expert size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context import Axis, ParallelContext
from parallel.decisions import ScoreError, error_of_largest
from parallel.layers import product
from parallel.padding import mean_of_tokens
from parallel.precision import at_least_fp32
from parallel.recompute import replay_decision
from parallel.regions import (
    copy_to_tensor_region,
    gather_sequence,
    reduce_from_tensor_region,
    scale_replicated_grad,
)
from parallel.sharding import Init, Normal, Sharding, declare, declare_replicated
from parallel.token_dispatch import GatherRows, all_to_all, read_counts

_ADDRESS_UNIT = 16  # bytes, at whose multiples a kernel loads
_ROW_UNIT = 8  # elements of 2 bytes in the 16 bytes at whose multiples rows begin in a kernel


class MoEOutput(NamedTuple):
    """`hidden`: [s, b, h] ([s/t, b, h] under sequence parallelism).

    `load_balancing_loss`, `z_loss`: fp32 [b], per row; the caller averages them over rows, weights
    them and adds them to the loss.
    """

    hidden: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor


class Routing(NamedTuple):
    """`experts`: int64 [s, b, k], the most probable first. `weights`: fp32 [s, b, k]. The losses:
    fp32 [b]."""

    experts: Tensor
    weights: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor


class MoELayer(nn.Module):
    """`y = sum_j w_j expert_j(x)` over the k experts selected by the router for a token.

    `expert(x) = W_down (silu(W_gate x) * W_up x)`; see `TopKRouter` for `w`.

    Without `capacity_factor` no token is dropped. With it an expert takes at most `C =
    ceil(capacity_factor s k / E)` tokens of a row, the earliest first; dropped (token, expert)
    pairs are missing from the sum. Shapes are then constant and the host never waits for the
    device. Tokens are dropped in training only: in `eval()` mode, and so in generation, none is.

    The drops of a row depend on that row alone, and on none of its later tokens (except through its
    length, which sets C); losses are per row. So the result is the same at every layout.

    Forward: at expert size > 1 one all-to-all to the experts and one back; without
    `capacity_factor` another one of the counts, for which the host waits. At expert size 1 grouped
    products, where the device has a kernel for them, leave the counts there. Over tensor ranks the
    collectives of a column- and a row-parallel layer, with k weights per token beside the input.
    Backward: the same in reverse. Under FP8 the experts compute in bf16.

    Raises:
        ValueError: sizes that do not fit each other or the layout.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        ctx: ParallelContext,
        init: Init = Normal(0.02),
        output_init: Init = Normal(0.02),
        capacity_factor: float | None = None,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(intermediate_size, num_experts, top_k, capacity_factor, renormalize, ctx)
        self.ctx = ctx
        self.capacity_factor = capacity_factor
        self.router = TopKRouter(
            hidden_size, num_experts=num_experts, top_k=top_k, renormalize=renormalize,
            ctx=ctx, init=init,
        )  # fmt: skip
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts=num_experts,
            ctx=ctx, init=init, output_init=output_init,
        )  # fmt: skip

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> MoEOutput:
        """`lengths`: int64 [b], number of tokens in each row; the rest of the row is padding."""
        routing = self.router(x, lengths)
        x = copy_to_tensor_region(gather_sequence(x, ctx=self.ctx), ctx=self.ctx)
        weights = copy_to_tensor_region(routing.weights, ctx=self.ctx)
        y = self._experts_of(x.flatten(0, 1), routing.experts, lengths)
        y = (y * weights.to(y.dtype).unsqueeze(-1)).sum(dim=2)
        hidden = reduce_from_tensor_region(y, ctx=self.ctx)
        return MoEOutput(hidden, routing.load_balancing_loss, routing.z_loss)

    def _experts_of(self, tokens: Tensor, experts: Tensor, lengths: Tensor | None) -> Tensor:
        """The output of every selected expert for each token: [n, h], [s, b, k] -> [s, b, k, h]."""
        num_experts, top_k = self.router.num_experts, experts.shape[-1]
        capacity, limits = None, None
        if self.capacity_factor is not None and self.training:
            capacity = self._capacity(len(experts), top_k)
            if lengths is not None:
                each = [self._capacity(length, top_k) for length in lengths.tolist()]
                limits = torch.tensor(each, device=lengths.device)
        slots = _assign_slots(experts, num_experts=num_experts, capacity=capacity, limits=limits)
        sent = GatherRows.apply(tokens, slots.pairs // top_k, slots.slots.view(-1, top_k))
        if capacity is None:
            computed = _without_capacity(sent, slots.counts, self.experts, self.ctx.expert)
        else:
            computed = _with_capacity(sent, self.experts, self.ctx.expert)
        returned = GatherRows.apply(computed, slots.slots, slots.pairs.unsqueeze(-1))
        return returned.view(*experts.shape, tokens.shape[-1])

    def _capacity(self, length: int, top_k: int) -> int:
        """Slots per expert for a row of `length` tokens."""
        assert self.capacity_factor is not None
        share = self.capacity_factor * length * top_k / self.router.num_experts
        return min(math.ceil(share), length)


class TopKRouter(nn.Module):
    """Top-k router: `p = softmax(W x)` over all E experts, then the k largest.

    Weights are the selected `p`, divided by their sum with `renormalize` (Mixtral), otherwise
    unchanged (Switch; required for k = 1, where the router would learn nothing from the loss). Ties
    go to the lower expert index. Everything is fp32, whatever the run's precision.

    `load_balancing_loss`: `E sum_e f_e P_e` of every row, with `f_e` the fraction of the row's
    choices that fell on e and `P_e` the mean of `p_e` over the row; 1 when even. `z_loss`: the mean
    of `logsumexp(W x)^2` over the row. Source: arXiv 2101.03961, 2202.08906, 2401.04088; of rows
    (Megatron-Core's `seq_aux_loss`) and not of micro-batches (its `aux_loss`), whose losses would
    depend on how rows are spread over ranks and micro-batches, nor of the whole step (its
    `global_aux_loss`), which needs sums over ranks before the product.

    All tensor ranks select the same experts: under sequence parallelism each rank scores its own
    tokens and the scores are gathered, otherwise the first rank's selection is broadcast. A
    recomputed forward pass reuses the selection of the first.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        ctx: ParallelContext,
        init: Init,
    ) -> None:
        super().__init__()
        self.ctx = ctx
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=ctx.device))
        declare_replicated(self.weight, init, ctx=ctx, role="router")

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Routing:
        logits = F.linear(at_least_fp32(x), at_least_fp32(self.weight))
        logits = gather_sequence(logits, ctx=self.ctx)
        probabilities = logits.softmax(dim=-1)
        experts = replay_decision(
            lambda: self._choose(logits.detach()),
            partial(self._error_for, logits.detach()) if self.training else None,
        )
        weights = probabilities.gather(-1, experts)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen = _one_hot(experts, self.num_experts).to(probabilities.dtype)
        fractions = mean_of_tokens(chosen, lengths) / self.top_k
        balance = self.num_experts * (fractions * mean_of_tokens(probabilities, lengths)).sum(
            dim=-1
        )
        z_loss = mean_of_tokens(logits.logsumexp(dim=-1).square(), lengths)
        return Routing(
            experts,
            weights,
            scale_replicated_grad(balance, ctx=self.ctx),
            scale_replicated_grad(z_loss, ctx=self.ctx),
        )

    def _choose(self, logits: Tensor) -> Tensor:
        # torch.topk does not define which of equal values it returns.
        order = logits.argsort(dim=-1, descending=True, stable=True)
        experts = order[..., : self.top_k].contiguous()
        if self.ctx.tensor.size > 1 and not self.ctx.sequence_parallel:
            dist.broadcast(experts, group=self.ctx.tensor.group, group_src=0)
        return experts

    def _error_for(self, logits: Tensor, experts: Tensor) -> ScoreError:
        return error_of_largest(logits, _one_hot(experts, self.num_experts).bool(), dim=-1)


class Experts(nn.Module):
    """The E/p experts of this expert rank as stacked matrices, sharded over tensor ranks.

    `gate`, `up`: [E/p, f/t, h]. `down`: [E/p, h, f/t].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        ctx: ParallelContext,
        init: Init,
        output_init: Init,
    ) -> None:
        super().__init__()
        self.num_local = num_experts // ctx.expert.size
        self.inner = inner = intermediate_size // ctx.tensor.size

        def stacked(shape: tuple[int, int], dim: int, start: Init) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(self.num_local, *shape, device=ctx.device))
            sharding = Sharding(dim, intermediate_size, experts=num_experts)
            return declare(parameter, sharding, start, role="matrix")

        self.gate = stacked((inner, hidden_size), 1, init)
        self.up = stacked((inner, hidden_size), 1, init)
        self.down = stacked((hidden_size, inner), 2, output_init)

    def multiplies_grouped(self, x: Tensor) -> bool:
        """Whether one grouped product takes all experts' tokens, whose counts stay on the device:
        in bf16 on CUDA of Hopper or newer, with rows of whole 16 bytes."""
        # By no name of a parameter: outside of `forward` ZeRO-3 would gather it for that.
        return (
            x.dtype == next(self.parameters()).dtype == torch.bfloat16
            and not (x.shape[-1] % _ROW_UNIT or self.inner % _ROW_UNIT)
            and _has_grouped_kernel(x.device)
        )

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """The experts' outputs for x [m, h], sorted by expert: `counts` int64 [E/p] of each."""
        ends = counts.cumsum(0, dtype=torch.int32)
        x, *weights = map(_at_kernel_address, (x, self.gate, self.up, self.down))
        gate, up = (F.grouped_mm(x, weight.mT, offs=ends) for weight in weights[:2])
        return F.grouped_mm(F.silu(gate) * up, weights[2].mT, offs=ends)

    def forward(self, x: Tensor, counts: list[int] | Tensor | None = None) -> Tensor:
        """The experts' outputs for x, to be summed over tensor ranks.

        x: [E/p, m, h], equally many tokens per expert; with `counts` [m, h], sorted by expert, with
        `counts[e]` tokens for expert e. A tensor of counts stays on the device: `grouped`.
        """
        if isinstance(counts, Tensor):
            return self.grouped(x, counts)
        if counts is None:
            inner = F.silu(product(x, self.gate)) * product(x, self.up)
            return product(inner, self.down)
        computed = [
            product(F.silu(product(tokens, gate)) * product(tokens, up), down)
            for tokens, gate, up, down in zip(
                x.split(counts), self.gate, self.up, self.down, strict=True
            )
        ]
        return torch.cat(computed)


class _Slots(NamedTuple):
    """The assignment of (token, choice) pairs to slots sorted by expert.

    `pairs`: int64 [m], the pair in each slot, n k in an empty slot. `slots`: int64 [n k], the slot
    of each pair, m if it is dropped. `counts`: int64 [E], pairs per expert.
    """

    pairs: Tensor
    slots: Tensor
    counts: Tensor


def _assign_slots(
    experts: Tensor, *, num_experts: int, capacity: int | None, limits: Tensor | None = None
) -> _Slots:
    """Assign the choices [s, b, k] to slots: one per pair, or C per expert and row, which `limits`
    int64 [b] may lower for a row."""
    num_pairs = experts.numel()
    chosen = _one_hot(experts, num_experts)
    counts = chosen.sum(dim=(0, 1))
    if capacity is None:
        pairs = experts.flatten().argsort(stable=True)
        return _Slots(pairs, _inverse(pairs, num_pairs, num_slots=num_pairs), counts)
    earlier = (chosen.cumsum(dim=0) - chosen).gather(-1, experts)
    num_rows = experts.shape[1]
    rows = torch.arange(num_rows, device=experts.device).unsqueeze(-1)
    num_slots = num_experts * num_rows * capacity
    slots = (experts * num_rows + rows) * capacity + earlier
    most = capacity if limits is None else limits.unsqueeze(-1)
    slots = slots.masked_fill(earlier >= most, num_slots).flatten()
    return _Slots(_inverse(slots, num_slots, num_slots=num_pairs), slots, counts)


def _inverse(index: Tensor, size: int, *, num_slots: int) -> Tensor:
    """Invert `index`: for each of `size` positions the element mapped to it, else `num_slots`."""
    places = torch.full((size + 1,), num_slots, dtype=index.dtype, device=index.device)
    elements = torch.arange(len(index), device=index.device)
    return places.scatter_(0, index, elements)[:size]  # the last position collects the drops


@torch.compiler.assume_constant_result  # torch.compile (2.13) cannot trace the question
def _has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch multiplies groups of rows in one kernel; elsewhere (2.13) it reads the groups'
    ends on the host and multiplies one by one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _at_kernel_address(x: Tensor) -> Tensor:
    """x, or a copy where x begins between multiples of 16 bytes, as part of a flat buffer may: on
    CUDA grouped products refuse it (torch 2.13). In compiled code the address is not known."""
    return x if torch.compiler.is_compiling() or not x.data_ptr() % _ADDRESS_UNIT else x.clone()


def _one_hot(experts: Tensor, num_experts: int) -> Tensor:
    """int64 [s, b, E]: 1 where a token has chosen an expert."""
    shape = (*experts.shape[:-1], num_experts)
    return torch.zeros(shape, dtype=torch.int64, device=experts.device).scatter_(-1, experts, 1)


def _with_capacity(x: Tensor, experts: Experts, axis: Axis) -> Tensor:
    """Dispatch equal parts of the slots [E b C, h] to the experts' ranks, and combine."""
    parts = all_to_all(x, axis=axis)
    parts = parts.view(axis.size, experts.num_local, -1, x.shape[-1]).transpose(0, 1)
    y = experts(parts.flatten(1, 2))
    return all_to_all(y.view(parts.shape).transpose(0, 1).flatten(0, 2), axis=axis)


def _without_capacity(x: Tensor, counts: Tensor, experts: Experts, axis: Axis) -> Tensor:
    """Dispatch the slots [n k, h] to the experts' ranks and combine."""
    if x.is_meta:  # only shapes are needed
        return torch.empty_like(x)
    if axis.size == 1 and experts.multiplies_grouped(x):
        return experts(x, counts)
    return _by_counts(x, counts, experts, axis)


@torch.compiler.disable  # the number of tokens per expert differs in every step
def _by_counts(x: Tensor, counts: Tensor, experts: Experts, axis: Axis) -> Tensor:
    """`_without_capacity` where the host reads the counts, for which it waits."""
    leaving, arriving = replay_decision(lambda: read_counts(counts, axis))
    if axis.size == 1:
        return experts(x, leaving[0])
    sent, received = ([sum(of_rank) for of_rank in each] for each in (leaving, arriving))
    sizes = [size for of_rank in arriving for size in of_rank]
    parts = all_to_all(x, axis=axis, sent=sent, received=received).split(sizes)
    # Rows arrive sorted by rank and then expert; the experts need them sorted by expert.
    local, ranks = range(experts.num_local), range(axis.size)
    order = [rank * len(local) + expert for expert in local for rank in ranks]
    totals = [sum(of_expert) for of_expert in zip(*arriving, strict=True)]
    y = experts(torch.cat([parts[i] for i in order]), totals)
    results = dict(zip(order, y.split([sizes[i] for i in order]), strict=True))
    y = torch.cat([results[i] for i in range(len(order))])
    return all_to_all(y, axis=axis, sent=received, received=sent)


def _check_sizes(
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    capacity_factor: float | None,
    renormalize: bool,
    ctx: ParallelContext,
) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k={top_k} is not between 1 and num_experts={num_experts}; choose such a number"
        )
    if renormalize and top_k == 1:
        raise ValueError(
            "renormalize=True with top_k=1 makes every weight 1, and the router would learn "
            "nothing from the loss; set renormalize=False or top_k to 2 or more"
        )
    if capacity_factor is not None and not (0 < capacity_factor < math.inf):
        raise ValueError(
            f"capacity_factor={capacity_factor} is not a positive number; give one such as 1.25, "
            "or None to drop no token"
        )
    sizes = (
        ("num_experts", num_experts, "expert", ctx.expert.size),
        ("intermediate_size", intermediate_size, "tensor", ctx.tensor.size),
    )
    for name, value, axis, size in sizes:
        if value % size:
            raise ValueError(
                f"{name}={value} is not divisible by parallel.{axis}={size}; "
                f"choose an {axis} size that divides it"
            )
