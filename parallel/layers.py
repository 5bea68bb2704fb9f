"""Tensor-parallel linear layers, embedding and head, under Megatron's names.

At tensor size 1 linear layers and head are instances of nn.Linear itself, which tools such as
torch's dynamic quantisation look up by exact type, and nothing of Megatron is imported. At tensor
size > 1 the collectives and the overlapped backward are Megatron-Core's. Under FP8 the linear
layers are those of parallel.fp8.

Every product goes through the call of its layer, so that anything that wraps or replaces a layer
(adapters, hooks, quantisation, FSDP, offloading) takes effect.

Shapes: s sequence, b batch, h hidden, t tensor size. Under sequence parallelism the activations
between layers are [s/t, b, h]; `ColumnParallelLinear` gathers them and `RowParallelLinear`
scatters the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from parallel.context import ParallelContext
from parallel.cpu.few_rows import few_rows_product, is_few_rows_product
from parallel.cpu.widened import is_widened, widened_product
from parallel.regions import copy_to_tensor_region, gather_sequence, reduce_from_tensor_region
from parallel.sharding import Constant, Init, Normal, Role, Sharding, declare, local_extent

_PRODUCT_COLUMNS = 64  # of which the width of a joined product is a multiple,
_WIDE = 1024  # from as many on, where they are a small part of it


def ColumnParallelLinear(
    in_features: int,
    out_features: int,
    *,
    ctx: ParallelContext,
    bias: bool = False,
    init: Init = Normal(0.02),
    role: Role = "matrix",
) -> nn.Module:
    """`y = x W^T + b` with W [out, in] sharded by rows: each rank computes its columns of y.

    Input [s, b, in] (or [s/t, b, in] under sequence parallelism), output [s, b, out/t].
    Forward: no collective, or an all-gather over the sequence. Backward: an all-reduce of the
    input gradient, or a reduce-scatter, overlapped with the weight gradient. With `role="gate"` the
    product stays in bf16 under FP8: gates and scores are narrow and sensitive.

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
    """`y = sum_r x_r W_r^T + b` with W [out, in] sharded by columns, and x sharded alike.

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
    """Apply several column-parallel layers to one input with a single collective.

    Query, key and value (or gate and up) projections share their input: it is gathered once in
    forward, and the sum of their input gradients is reduced once in backward. With `joined` the
    weights are concatenated into one product, which for many narrow layers is faster than many
    products and a sum of as many input gradients; the results are then views of one tensor. Rows of
    zeros make a wide product a multiple of 64 columns wide, without which kernels are slower.
    Layers that do more than multiply with their weight are called one by one, and all are without
    gradients: a step of generation would copy more weights than it multiplies.
    """
    contexts = [_context_of(linear) for linear in linears]
    ctx = None if None in contexts else contexts[0]
    if ctx is not None:
        x = copy_to_tensor_region(gather_sequence(x, ctx=ctx), ctx=ctx)
    joined = joined and torch.is_grad_enabled()
    if joined and all(_is_plain_linear(each) and each.bias is None for each in linears):
        weights: list[Tensor] = [linear.get_parameter("weight") for linear in linears]
        sizes = [len(weight) for weight in weights]
        padding = -sum(sizes) % _PRODUCT_COLUMNS if sum(sizes) > _WIDE else 0
        padded = [*weights, weights[0].new_zeros(padding, x.shape[-1])]
        return product(x, torch.cat(padded)).split([*sizes, padding], dim=-1)[: len(weights)]
    options = {} if ctx is None else {"collectives": False}
    return tuple(apply_linear(linear, x, **options) for linear in linears)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: [..., k], W [n, k], b [n] -> [..., n]; or of a batch without bias, [e, m, k],
    W [e, n, k] -> [e, m, n]. On a CPU without units for bf16 by `parallel.cpu.widened`."""
    if _is_widened(x, weight):
        return widened_product(x, weight, bias)
    return F.linear(x, weight, bias) if weight.dim() == 2 else x @ weight.mT


def _is_widened(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and is_widened(x, weight, row_size=x.shape[-1])


def apply_linear(linear: nn.Module, x: Tensor, **options: bool) -> Tensor:
    """`linear(x)`; where that is slow on a CPU by `parallel.cpu.few_rows` or `.widened`."""
    if type(linear) is nn.Linear and _is_plain_linear(linear):
        weight, bias = linear.weight, linear.bias
        if not torch.is_grad_enabled() and is_few_rows_product(x, weight):
            return few_rows_product(x, weight, bias)
        if _is_widened(x, weight):
            return widened_product(x, weight, bias)
    y: Tensor = linear(x, **options)
    return y


def project_replicated(x: Tensor, *linears: nn.Module, ctx: ParallelContext) -> tuple[Tensor, ...]:
    """Apply column-parallel layers to an input of any length that is replicated on every rank.

    For inputs that are not sharded under sequence parallelism: memory slots, encoded images.
    Forward: no collective. Backward: that of `parallel.regions.copy_to_tensor_region`.
    """
    x = copy_to_tensor_region(x, ctx=ctx)
    return tuple(_without_tokens(x, linear) for linear in linears)


def project_partial(x: Tensor, linear: nn.Module) -> Tensor:
    """This rank's partial product of a row-parallel layer, before the all-reduce and the bias.

    For inputs that are not sharded by token, as in `project_replicated`: x [m, b, in/t].
    """
    return _without_tokens(x, linear)


def _without_tokens(x: Tensor, linear: nn.Module) -> Tensor:
    if _context_of(linear) is not None:
        return apply_linear(linear, x, collectives=False, per_token=False)
    return apply_linear(linear, x)


def _is_plain_linear(linear: nn.Module) -> bool:
    """Whether calling a layer is exactly a product with its weight.

    That is: no hook, no overridden `forward`, and no tensor subclass or sparse tensor as weight
    (quantised and pruned weights have their own product). There may be a bias.
    """
    if type(linear) not in (nn.Linear, _ColumnParallelLinear) or "forward" in linear.__dict__:
        return False
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    if linear._backward_hooks or linear._backward_pre_hooks or _has_any_global_hook():
        return False
    return type(linear.weight) is nn.Parameter and linear.weight.layout is torch.strided


class VocabParallelEmbedding(nn.Embedding):
    """The token table sharded by rows: each rank looks up its own ids, and the results are summed.

    Input int64 [b, s], output [b, s, h] (or [b, s/t, h] under sequence parallelism) as for
    `nn.Embedding`, so that adapters and hooks around it work; the output is a view of [s, b, h],
    the layout of the layers. A vocabulary size that the tensor size does not divide is padded with
    zero rows that are never looked up.
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
        """Do nothing: parallel.random.initialize, which has the parameter's name, fills it."""

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.T.contiguous()  # before the look-up: ids are cheaper to move than rows
        if self.ctx.tensor.size == 1:
            return super().forward(tokens).transpose(0, 1)
        local = tokens - self.first_id
        foreign = (local < 0) | (local >= self.num_embeddings)
        rows = super().forward(local.masked_fill(foreign, 0))
        rows = rows.masked_fill(foreign.unsqueeze(-1), 0.0)
        return reduce_from_tensor_region(rows, ctx=self.ctx).transpose(0, 1)


def VocabParallelHead(
    vocab_size: int, hidden_size: int, *, ctx: ParallelContext, init: Init = Normal(0.02)
) -> nn.Module:
    """Logits `x W^T` over this rank's shard of the vocabulary: [s, b, h] -> [s, b, ceil(V/t)].

    The weight has the shape and sharding of `VocabParallelEmbedding`, so that the two can be tied.
    Padding columns are -inf and so contribute nothing to a softmax.
    """
    if ctx.tensor.size == 1:
        layer: nn.Module = empty_linear(hidden_size, vocab_size, bias=False, ctx=ctx)
    else:
        layer = _VocabParallelHead(vocab_size, hidden_size, ctx=ctx)
    weight = layer.get_parameter("weight")
    declare(weight, Sharding(dim=0, full_size=vocab_size), init, role="head")
    return layer


def gather_logits(logits: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Concatenate the logits of all tensor ranks, on every rank; without gradient.

    Padding columns are -inf and come last.
    """
    if ctx.tensor.size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(ctx.tensor.size)]
    torch.distributed.all_gather(parts, logits.detach().contiguous(), group=ctx.tensor.group)
    return torch.cat(parts, dim=-1)


class _ShardedLinear(nn.Linear):
    """An nn.Linear that holds this rank's shard and leaves initialisation to parallel.random.

    Linear layers with a `ctx` accept more arguments than x. `collectives=False`: the local product
    alone, for an input already gathered, or before the reduction and the bias. `per_token=False`:
    x does not hold tokens but, for instance, memory slots.
    """

    def __init__(self, shape: tuple[int, int], *, ctx: ParallelContext, bias: bool) -> None:
        super().__init__(shape[1], shape[0], bias=bias, device=ctx.device)
        self.ctx = ctx

    def reset_parameters(self) -> None:
        """Do nothing: parallel.random.initialize, which has the parameter's name, fills it."""


class _ColumnParallelLinear(_ShardedLinear):
    def forward(self, x: Tensor, *, collectives: bool = True, per_token: bool = True) -> Tensor:
        if not collectives:
            return product(x, self.weight, self.bias)
        return _column_product(x, self.weight, self.bias, ctx=self.ctx)


class _RowParallelLinear(_ShardedLinear):
    def forward(self, x: Tensor, *, collectives: bool = True, per_token: bool = True) -> Tensor:
        y = product(x, self.weight)
        if not collectives:
            return y
        y = reduce_from_tensor_region(y, ctx=self.ctx)
        return y if self.bias is None else y + self.bias


class _VocabParallelHead(nn.Module):
    """The output head at tensor size > 1."""

    def __init__(self, vocab_size: int, hidden_size: int, *, ctx: ParallelContext) -> None:
        super().__init__()
        extent = local_extent(vocab_size, size=ctx.tensor.size, rank=ctx.tensor.rank)
        self.ctx = ctx
        self.num_real = extent.stop - extent.start
        self.weight = nn.Parameter(torch.empty(extent.padded, hidden_size, device=ctx.device))

    def forward(self, x: Tensor) -> Tensor:
        logits = _column_product(x, self.weight, None, ctx=self.ctx)
        if self.num_real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.num_real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


def _column_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, ctx: ParallelContext
) -> Tensor:
    if _is_widened(x, weight):
        return widened_product(
            copy_to_tensor_region(gather_sequence(x, ctx=ctx), ctx=ctx), weight, bias
        )
    from parallel import megatron

    return megatron.column_linear(
        x,
        weight,
        bias,
        group=ctx.tensor.group,
        sequence_parallel=ctx.sequence_parallel,
    )


def _context_of(linear: nn.Module) -> ParallelContext | None:
    return getattr(linear, "ctx", None)


def empty_linear(
    in_features: int, out_features: int, *, bias: bool, ctx: ParallelContext
) -> nn.Linear:
    """An uninitialised nn.Linear; parallel.random.initialize, which knows the names, fills it.

    `nn.utils.skip_init` would build it twice, once in torch's Python code for meta tensors: a third
    of the time in which a small model is built.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=ctx.device))
    empty = nn.Parameter(torch.empty(out_features, device=ctx.device)) if bias else None
    linear.register_parameter("bias", empty)
    return linear


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
        from parallel.fp8.layers import fp8_linear  # no part of an exported model

        layer = fp8_linear(mode, shape, bias=bias, ctx=ctx)
    elif ctx.tensor.size == 1:
        layer = empty_linear(shape[1], shape[0], bias=bias, ctx=ctx)
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
