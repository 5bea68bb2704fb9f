"""Linear layers, embedding and head that tensor ranks share, under Megatron's names.

At tensor size 1 they are nn.Linear and nn.Embedding (same keys and shapes) and nothing of Megatron
is imported. At tensor size > 1 the collectives and the overlapped backward are Megatron-Core's.
Under FP8 the linear layers are Transformer Engine's.

Shapes: s sequence, b batch, h hidden, t tensor size. Under sequence parallelism the activations
between layers are [s/t, b, h]; `ColumnParallelLinear` gathers them and `RowParallelLinear`
scatters the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.precision import fp8_linear
from parallel.regions import enter_tensor_region, gather_sequence, leave_tensor_region
from parallel.sharding import Constant, Init, Normal, Role, Sharding, declare, local_extent


def ColumnParallelLinear(
    in_features: int,
    out_features: int,
    *,
    ctx: ParallelContext,
    bias: bool = False,
    init: Init = Normal(0.02),
    role: Role = "matrix",
) -> nn.Module:
    """`y = x W^T + b` with W [out, in] cut over its rows: rank r computes columns r of y.

    Input [s, b, in] (or [s/t, b, in] under sequence parallelism), output [s, b, out/t].
    Forward: no collective, or an all-gather over the sequence. Backward: an all-reduce of the
    input gradient, or a reduce-scatter, overlapped with the weight gradient. With `role="gate"` the
    product stays in bf16 under FP8: gates and scores are narrow and decide.

    Raises:
        ValueError: the tensor size does not divide `out_features`.
    """
    _check_divides("out_features", out_features, ctx)
    shape = (out_features // ctx.tensor.size, in_features)
    options = {"ctx": ctx, "bias": bias, "init": init, "role": role}
    return _linear("column", in_features, out_features, shape, **options)  # type: ignore[arg-type]


def RowParallelLinear(
    in_features: int,
    out_features: int,
    *,
    ctx: ParallelContext,
    bias: bool = False,
    init: Init = Normal(0.02),
) -> nn.Module:
    """`y = sum_r x_r W_r^T + b` with W [out, in] cut over its columns; x is already cut alike.

    Input [s, b, in/t], output [s, b, out] (or [s/t, b, out] under sequence parallelism).
    Forward: an all-reduce, or a reduce-scatter over the sequence. Backward: none, or an
    all-gather. The bias is replicated and added once, after the sum.

    Raises:
        ValueError: the tensor size does not divide `in_features`.
    """
    _check_divides("in_features", in_features, ctx)
    shape = (out_features, in_features // ctx.tensor.size)
    options = {"ctx": ctx, "bias": bias, "init": init, "role": "matrix"}
    return _linear("row", in_features, out_features, shape, **options)  # type: ignore[arg-type]


def project_together(x: Tensor, *linears: nn.Module, joined: bool = False) -> tuple[Tensor, ...]:
    """Apply several column-parallel layers to one input with one collective instead of one each.

    Query, key and value (or gate and up) projections share their input: it is gathered once in
    forward, and the sum of their input gradients is reduced once in backward. With `joined` it is
    one product with the weights one after another: for many narrow layers that is faster than many
    products and the sum of as many input gradients. Results are then views of one tensor.
    """
    first: Any = linears[0]
    if not _has_local(first):
        return tuple(linear(x) for linear in linears)
    x = enter_tensor_region(gather_sequence(x, ctx=first.ctx), ctx=first.ctx)
    plain = (type(linear) is _ColumnParallelLinear for linear in linears)
    if joined and all(plain) and first.bias is None:
        weights: list[Tensor] = [linear.get_parameter("weight") for linear in linears]
        y = F.linear(x, torch.cat(weights))
        return y.split([len(weight) for weight in weights], dim=-1)
    calls: Any = linears if first.ctx.tensor.size == 1 else [linear.local for linear in linears]
    return tuple(call(x) for call in calls)


def project_replicated(x: Tensor, *linears: nn.Module, ctx: ParallelContext) -> tuple[Tensor, ...]:
    """Apply column-parallel layers to an input that every rank holds whole, whatever its length.

    For what has no tokens to share under sequence parallelism: memory slots, encoded images.
    Forward: no collective. Backward: that of `parallel.regions.enter_tensor_region`.
    """
    x = enter_tensor_region(x, ctx=ctx)
    return tuple(_without_tokens(x, linear) for linear in linears)


def _without_tokens(x: Tensor, linear: nn.Module) -> Tensor:
    if not _has_local(linear):  # Transformer Engine's would gather x as if it were tokens
        return F.linear(x, linear.weight, linear.bias)  # type: ignore[arg-type]
    sharded: Any = linear
    call = sharded if sharded.ctx.tensor.size == 1 else sharded.local
    return call(x, per_token=False)


def project_part(x: Tensor, linear: nn.Module) -> Tensor:
    """What this rank adds to the product of a row-parallel layer, before the sum and the bias.

    For what has no tokens, as in `project_replicated`: x [m, b, in/t].
    """
    if _has_local(linear):
        return linear.local(x, per_token=False)  # type: ignore[operator]
    return F.linear(x, linear.weight)  # type: ignore[arg-type]


class VocabParallelEmbedding(nn.Embedding):
    """The token table cut over its rows: a rank looks up its own ids, and the ranks are summed.

    Input int64 [b, s], output [s, b, h] (or [s/t, b, h] under sequence parallelism). A vocabulary
    that the tensor size does not divide is padded with zero rows that are never looked up.
    Forward: an all-reduce, or a reduce-scatter over the sequence. Backward: none, or an all-gather.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, ctx: ParallelContext, init: Init = Normal(0.02)
    ) -> None:
        extent = local_extent(vocab_size, size=ctx.tensor.size, rank=ctx.tensor.rank)
        super().__init__(extent.padded, hidden_size, device=ctx.device)
        self.ctx = ctx
        self.first_id = ctx.tensor.rank * extent.padded
        rows = Sharding(dim=0, full_size=vocab_size)
        declare(self.get_parameter("weight"), rows, init, role="embedding")

    def reset_parameters(self) -> None:
        """Left to parallel.random.initialize, which knows the parameter's name."""

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.T.contiguous()  # before the look-up: that many fewer numbers to move
        if self.ctx.tensor.size == 1:
            return super().forward(tokens)
        local = tokens - self.first_id
        foreign = (local < 0) | (local >= self.num_embeddings)
        rows = super().forward(local.masked_fill(foreign, 0))
        rows = rows.masked_fill(foreign.unsqueeze(-1), 0.0)
        return leave_tensor_region(rows, ctx=self.ctx)


class VocabParallelHead(nn.Module):
    """Logits `x W^T` over this rank's part of the vocabulary: [s, b, h] -> [s, b, ceil(V/t)].

    The weight has the shape and sharding of `VocabParallelEmbedding`, so the two can be tied.
    Columns that only pad the vocabulary are -inf and so never take part in a softmax.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, ctx: ParallelContext, init: Init = Normal(0.02)
    ) -> None:
        super().__init__()
        extent = local_extent(vocab_size, size=ctx.tensor.size, rank=ctx.tensor.rank)
        self.ctx = ctx
        self.num_real = extent.stop - extent.start
        self.weight = nn.Parameter(torch.empty(extent.padded, hidden_size, device=ctx.device))
        declare(self.weight, Sharding(dim=0, full_size=vocab_size), init, role="head")

    def forward(self, x: Tensor) -> Tensor:
        if self.ctx.tensor.size == 1:
            return F.linear(x, self.weight)
        from parallel import megatron

        logits = megatron.column_linear(
            x,
            self.weight,
            None,
            group=self.ctx.tensor.group,
            sequence_parallel=self.ctx.sequence_parallel,
        )
        if self.num_real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.num_real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


def gather_logits(logits: Tensor, *, ctx: ParallelContext) -> Tensor:
    """The logits of all tensor ranks side by side, on every rank; without gradient.

    Columns that pad the vocabulary are -inf and come last.
    """
    if ctx.tensor.size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(ctx.tensor.size)]
    torch.distributed.all_gather(parts, logits.detach().contiguous(), group=ctx.tensor.group)
    return torch.cat(parts, dim=-1)


class _ShardedLinear(nn.Linear):
    """An nn.Linear that holds this rank's shard and leaves initialisation to parallel.random.

    `local` is the product without collectives. What stands in for such a layer has it, too, and
    `ctx`; `per_token` tells it whether x holds tokens or, for instance, memory slots.
    """

    def __init__(self, shape: tuple[int, int], *, ctx: ParallelContext, bias: bool) -> None:
        super().__init__(shape[1], shape[0], bias=bias, device=ctx.device)
        self.ctx = ctx
        self.lora: Any = None

    def reset_parameters(self) -> None:
        """Left to parallel.random.initialize, which knows the parameter's name."""


class _ColumnParallelLinear(_ShardedLinear):
    def local(self, x: Tensor, *, per_token: bool = True) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor, *, per_token: bool = True) -> Tensor:
        if self.ctx.tensor.size == 1:
            return self.local(x)
        from parallel import megatron

        return megatron.column_linear(
            x,
            self.weight,
            self.bias,
            group=self.ctx.tensor.group,
            sequence_parallel=self.ctx.sequence_parallel,
        )


class _RowParallelLinear(_ShardedLinear):
    def local(self, x: Tensor, *, per_token: bool = True) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.ctx.tensor.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = leave_tensor_region(self.local(x), ctx=self.ctx)
        return y if self.bias is None else y + self.bias


def _has_local(linear: nn.Module) -> bool:
    """False for the layers of Transformer Engine, which do their own collectives."""
    return hasattr(linear, "local")


def _linear(
    mode: str,
    in_features: int,
    out_features: int,
    shape: tuple[int, int],
    *,
    ctx: ParallelContext,
    bias: bool,
    init: Init,
    role: Role,
) -> nn.Module:
    column = mode == "column"
    layer: nn.Module
    if ctx.precision.is_fp8 and role == "matrix":
        layer = fp8_linear(
            in_features,
            out_features,
            bias=bias,
            parallel_mode=mode,
            tensor=ctx.tensor,
            sequence_parallel=ctx.sequence_parallel,
            device=ctx.device,
        )
    else:
        layer = (_ColumnParallelLinear if column else _RowParallelLinear)(shape, ctx=ctx, bias=bias)
    rows, columns = Sharding(0, out_features), Sharding(1, in_features)
    declare(layer.get_parameter("weight"), rows if column else columns, init, role=role)
    if bias:
        replicated = Sharding(partial_gradient=ctx.sequence_parallel)
        declare(layer.get_parameter("bias"), rows if column else replicated, Constant(0.0))
    return layer


def _check_divides(name: str, features: int, ctx: ParallelContext) -> None:
    if features % ctx.tensor.size:
        raise ValueError(
            f"{name}={features} is not divisible by parallel.tensor={ctx.tensor.size}; "
            "choose a tensor size that divides it"
        )
