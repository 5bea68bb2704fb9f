"""Vocabulary-parallel cross entropy, entropy and z-loss, of whole logits or of parts in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from parallel.context import ParallelContext
from parallel.layers import apply_linear
from parallel.precision import at_least_fp32
from parallel.regions import all_reduced

IGNORED_LABEL = -100
# A log-probability whose exponential is 0 in fp32 and whose product with 0 is 0, unlike -inf.
_LEAST_LOG = -1e4

# Logits held in fp32 at a time: what fits the cache of a CPU core, or enough to fill a GPU.
_CHUNK_SIZE = {"cpu": 1 << 18, "cuda": 1 << 25}

_overwrites: ContextVar[bool] = ContextVar("overwrites", default=False)
_num_last: ContextVar[int | None] = ContextVar("num_last", default=None)


@contextmanager
def logits_used_once(used_once: bool = True) -> Iterator[None]:
    """In it, cross entropies write the gradient of the logits over the logits.

    Saves a tensor of their size. For callers who know that nothing else reads the logits during or
    after the backward pass. A second backward pass is refused by autograd.
    """
    token = _overwrites.set(used_once)
    try:
        yield
    finally:
        _overwrites.reset(token)


class LogitsInParts(NamedTuple):
    """The logits `output(x)`, not yet multiplied: a loss computes them in `parts` of the sequence.

    One part of the logits exists at a time, in forward and again in backward, which costs a third
    product of the head in place of memory. `x`: [s, b, h], or [s/t, b, h] under sequence
    parallelism, with `parts` dividing its first extent.
    """

    output: nn.Module
    x: Tensor
    parts: int

    def losses(
        self,
        loss: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        labels: Tensor,
        ctx: ParallelContext,
    ) -> tuple[Tensor, ...]:
        """`loss(logits, labels)` for logits [s, b, V/t] and labels [b, s], in parts: each [s, b].

        `loss` alone reads the logits, and of each token by itself.
        """

        def of_part(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            logits = self.output(x)
            with logits_used_once(not _needs_its_result(logits)):
                return loss(logits, labels)

        # A part of the logits holds the same part of every rank's stretch of the sequence.
        stretches = ctx.tensor.size if ctx.sequence_parallel else 1
        labels = labels.unflatten(1, (stretches, self.parts, -1))
        results = [
            checkpoint(of_part, x, y.flatten(1), use_reentrant=False, preserve_rng_state=False)
            for x, y in zip(self.x.chunk(self.parts), labels.unbind(2), strict=True)
        ]
        return tuple(
            torch.stack(values).unflatten(1, (stretches, -1)).transpose(0, 1).flatten(0, 2)
            for values in zip(*results, strict=True)
        )


def _needs_its_result(x: Tensor) -> bool:
    """Whether the operation that made x computes its gradient from x, as tanh does.

    Autograd finds out that such a result was overwritten, but not in a recomputed forward pass.
    """
    made = x if x._base is None else x._base
    return hasattr(type(made.grad_fn), "_saved_result")


@contextmanager
def logits_of_last(count: int) -> Iterator[None]:
    """In it, heads compute the logits of the last `count` tokens of a call alone.

    For callers who read no others, as in generation. Compiled and exported programs, which are made
    once for all callers, compute them all: read the last ones of what comes.
    """
    token = _num_last.set(count)
    try:
        yield
    finally:
        _num_last.reset(token)


def with_logits(x: Tensor) -> Tensor:
    """The tokens of x [s, ...] whose logits are wanted: all, but inside `logits_of_last`."""
    if torch.compiler.is_compiling():
        return x
    count = _num_last.get()
    return x if count is None else x[-count:]


def vocab_logits(output: nn.Module, x: Tensor) -> Any:
    """`output(x)` of the tokens whose logits are wanted, x [s, b, h]; after `set_logits_parts`,
    with gradients, the LogitsInParts of it."""
    x = with_logits(x)
    parts: int = getattr(output, "logits_parts", 1)
    if parts > 1 and torch.is_grad_enabled():
        return LogitsInParts(output, x, parts)
    return apply_linear(output, x)


def set_logits_parts(head: nn.Module, parts: int) -> None:
    """Let losses compute the logits of `head.output` in parts, if the head asks `vocab_logits`."""
    # A family may use the name for something else.
    if isinstance(getattr(head, "output", None), nn.Module):
        output: Any = head.output
        output.logits_parts = parts


def vocab_parallel_cross_entropy(
    logits: Tensor | LogitsInParts, labels: Tensor, *, ctx: ParallelContext
) -> Tensor:
    """Per-token loss `logsumexp(logits) - logits[label]` in fp32: [s, b, V/t], [b, s] -> [s, b].

    Positions whose label is -100 are not scored: their loss and gradient are 0. The logits are not
    modified, except in backward inside `logits_used_once`. Rows are processed in chunks, in
    forward and again in backward, so that nothing of the size of the logits exists beside them and
    their gradient. At tensor size > 1: two all-reduces in
    forward, of [s, b] and [2, s, b], none in backward. The losses of fp64 logits are fp64.
    """
    if isinstance(logits, LogitsInParts):
        return logits.losses(
            lambda x, y: (vocab_parallel_cross_entropy(x, y, ctx=ctx),), labels, ctx
        )[0]
    return _cross_entropy(logits, labels, ctx, overwrites=_overwrites.get())


def _cross_entropy(
    logits: Tensor, labels: Tensor, ctx: ParallelContext, *, overwrites: bool
) -> Tensor:
    labels = labels.transpose(0, 1)
    rows = logits.flatten(0, 1)
    losses: Tensor = _ChunkedCrossEntropy.apply(rows, labels.flatten(), ctx, overwrites)
    return losses.view(labels.shape)


def cross_entropy_and_entropy(
    logits: Tensor | LogitsInParts, labels: Tensor, *, ctx: ParallelContext
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_cross_entropy` and `vocab_parallel_entropy` of the same logits.

    At tensor size 1 one pass over the logits computes both, and one more their gradient.
    """
    if isinstance(logits, LogitsInParts):
        losses, entropies = logits.losses(
            lambda x, y: cross_entropy_and_entropy(x, y, ctx=ctx), labels, ctx
        )
        return losses, entropies
    if ctx.tensor.size > 1:
        losses = _cross_entropy(logits, labels, ctx, overwrites=False)
        return losses, vocab_parallel_entropy(logits, ctx=ctx)
    labels = labels.transpose(0, 1)
    both = _ChunkedCrossEntropyAndEntropy.apply(
        logits.flatten(0, 1), labels.flatten(), _overwrites.get()
    )
    return both[0].view(labels.shape), both[1].view(labels.shape)


def vocab_parallel_entropy(logits: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Entropy in nats of every predicted distribution, fp32: [s, b, V/t] -> [s, b].

    `H = log Z - sum_j p_j x_j`, rows processed in chunks. Two all-reduces of [s, b] in forward (one
    of them of two numbers per position), none in backward.
    """
    entropies: Tensor = _ChunkedEntropy.apply(logits.flatten(0, 1), ctx)
    return entropies.view(logits.shape[:2])


def vocab_parallel_z_losses(
    logits: Tensor | LogitsInParts, labels: Tensor, *, ctx: ParallelContext
) -> Tensor:
    """Per-token z-loss `(log Z)^2 = logsumexp(logits)^2`: [s, b, V/t], [b, s] -> [s, b].

    In fp32, or fp64 for fp64 logits. Positions whose label is -100 have loss and gradient 0. Rows
    are processed in chunks. At tensor size > 1: two all-reduces of [s, b] in forward, none in
    backward. Source: PaLM (arXiv 2204.02311, section 5).
    """
    if isinstance(logits, LogitsInParts):
        return logits.losses(lambda x, y: (vocab_parallel_z_losses(x, y, ctx=ctx),), labels, ctx)[0]
    log_z: Tensor = _ChunkedLogPartition.apply(logits.flatten(0, 1), ctx)
    ignored = labels.transpose(0, 1) == IGNORED_LABEL
    return log_z.view(logits.shape[:2]).masked_fill(ignored, 0.0).square()


class _ChunkedLogPartition(torch.autograd.Function):
    """`log Z = logsumexp(x)`, `dx_j = p_j dlogZ`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, layout: ParallelContext) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        chunks = logits.split(_rows_per_chunk(logits))
        own = torch.cat([x.to(wide).logsumexp(dim=-1) for x in chunks])
        if layout.tensor.size > 1:  # logsumexp of the logsumexps; that of padding alone is -inf
            highest = all_reduced(own.clone(), torch.distributed.ReduceOp.MAX, ctx=layout)
            total = all_reduced((own - highest).exp(), torch.distributed.ReduceOp.SUM, ctx=layout)
            own = highest + total.log()
        ctx.save_for_backward(logits, own)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, log_z = ctx.saved_tensors
        rows = _rows_per_chunk(logits)
        gradient = torch.empty_like(logits)
        columns = (x.unsqueeze(-1).split(rows) for x in (log_z, upstream))
        for out, x, normalizer, scale in zip(
            gradient.split(rows), logits.split(rows), *columns, strict=True
        ):
            out.copy_((x - normalizer).exp_().mul_(scale))
        return gradient, None


class _ChunkedEntropy(torch.autograd.Function):
    """`dx_j = -p_j (x_j - log Z + H) dH`; a column of -inf has no probability and no gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, layout: ParallelContext) -> Tensor:
        chunks = logits.split(_rows_per_chunk(logits))
        highest = at_least_fp32(torch.cat([x.amax(dim=-1) for x in chunks]))
        all_reduced(highest, torch.distributed.ReduceOp.MAX, ctx=layout)
        sums = []
        for x, top in zip(chunks, highest.split(len(chunks[0])), strict=True):
            shifted = x - top.unsqueeze(-1)
            weights = shifted.exp()
            products = (weights * shifted).nan_to_num_(nan=0.0)  # 0 * -inf
            sums.append(torch.stack((weights.sum(dim=-1), products.sum(dim=-1))))
        totals = torch.cat(sums, dim=1)
        all_reduced(totals, torch.distributed.ReduceOp.SUM, ctx=layout)
        entropies = totals[0].log() - totals[1] / totals[0]
        ctx.save_for_backward(logits, highest + totals[0].log(), entropies)
        return entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, normalizers, entropies = ctx.saved_tensors
        rows = _rows_per_chunk(logits)
        gradient = torch.empty_like(logits)
        columns = (x.unsqueeze(-1).split(rows) for x in (normalizers, entropies, -upstream))
        chunks = zip(gradient.split(rows), logits.split(rows), *columns, strict=True)
        for out, x, normalizer, entropy, scale in chunks:
            log_p = x - normalizer
            product = (log_p + entropy).mul_(log_p.exp()).nan_to_num_(nan=0.0)
            out.copy_(product.mul_(scale))
        return gradient, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`loss_i = logsumexp(x_i) - x_i[y_i]`, `dx_ij = (softmax(x_i)_j - [j = y_i]) dloss_i`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, layout: ParallelContext, overwrites: bool
    ) -> Tensor:
        ctx.overwrites = overwrites
        rows = _rows_per_chunk(logits)
        normalizers = torch.cat([at_least_fp32(x).logsumexp(dim=-1) for x in logits.split(rows)])
        scored = labels != IGNORED_LABEL
        targets, here = _local_targets(labels.masked_fill(~scored, 0), logits.shape[-1], layout)
        targets, here = targets.unsqueeze(-1), here & scored
        own = at_least_fp32(logits.gather(-1, targets).squeeze(-1)).masked_fill(~here, 0.0)
        if layout.tensor.size > 1:
            normalizers, own = _combine_over_ranks(normalizers, own, layout)
        ctx.save_for_backward(logits, targets, here, scored, normalizers)
        return (normalizers - own).masked_fill(~scored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, here, scored, normalizers = ctx.saved_tensors
        rows = _rows_per_chunk(logits)
        gradient = _gradient_buffer(ctx, logits)
        columns = (normalizers, -here.to(normalizers.dtype), upstream.masked_fill(~scored, 0.0))
        chunks = zip(
            gradient.split(rows),
            logits.split(rows),
            targets.split(rows),
            *(column.unsqueeze(-1).split(rows) for column in columns),
            strict=True,
        )
        for out, x, target, normalizer, minus_one, scale in chunks:
            difference = torch.sub(x, normalizer, out=_workspace(out, normalizer)).exp_()
            difference.scatter_add_(-1, target, minus_one)
            _store(difference.mul_(scale), out)
        return gradient, None, None, None


def _local_targets(
    labels: Tensor, num_columns: int, layout: ParallelContext
) -> tuple[Tensor, Tensor]:
    """The local column of every label (0 where another rank holds it), and a mask of local labels.

    At tensor size 1 a label outside the vocabulary is left as it is, for `gather` to refuse.
    """
    if layout.tensor.size == 1:
        return labels, torch.ones_like(labels, dtype=torch.bool)
    columns = labels - layout.tensor.rank * num_columns
    here = (columns >= 0) & (columns < num_columns)
    return columns.masked_fill(~here, 0), here


def _combine_over_ranks(
    normalizers: Tensor, own: Tensor, layout: ParallelContext
) -> tuple[Tensor, Tensor]:
    """Combine each rank's logsumexp into that of all columns, and sum `own` over ranks."""
    highest = all_reduced(normalizers.clone(), torch.distributed.ReduceOp.MAX, ctx=layout)
    sums = torch.stack(((normalizers - highest).exp(), own))  # of padding alone: exp(-inf) = 0
    all_reduced(sums, torch.distributed.ReduceOp.SUM, ctx=layout)
    return highest + sums[0].log(), sums[1]


class _ChunkedCrossEntropyAndEntropy(torch.autograd.Function):
    """`dx_j = p_j (dloss - (log p_j + H) dH) - [j = y] dloss`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, overwrites: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.overwrites = overwrites
        chunks = [_normalizer_and_entropy(x) for x in logits.split(_rows_per_chunk(logits))]
        normalizer, entropies = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        scored = labels != IGNORED_LABEL
        targets = labels.clamp(min=0)
        ctx.save_for_backward(logits, targets, scored, normalizer, entropies)
        own = at_least_fp32(logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        return (normalizer - own).masked_fill(~scored, 0.0), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor, of_entropies: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, scored, normalizers, entropies = ctx.saved_tensors
        rows = _rows_per_chunk(logits)
        gradient = _gradient_buffer(ctx, logits)
        columns = (targets, normalizers, entropies, of_losses.masked_fill(~scored, 0.0))
        chunks = zip(
            gradient.split(rows),
            logits.split(rows),
            *(column.unsqueeze(-1).split(rows) for column in (*columns, of_entropies)),
            strict=True,
        )
        for out, x, target, normalizer, entropy, of_loss, of_entropy in chunks:
            log_p = torch.sub(x, normalizer, out=_workspace(out, normalizer)).clamp_(min=_LEAST_LOG)
            # p (dloss - H dH) - p log p dH
            factor = torch.addcmul(of_loss - entropy * of_entropy, log_p, of_entropy, value=-1.0)
            _store(log_p.exp_().mul_(factor).scatter_add_(-1, target, -of_loss), out)
        return gradient, None, None


def _normalizer_and_entropy(x: Tensor) -> tuple[Tensor, Tensor]:
    """`log Z + max(x)` and `log Z - sum_j exp(z_j) z_j / Z` of every row, with z = x - max(x) and
    Z = sum_j exp(z_j). The exponentials, the slowest part, are computed once for both."""
    highest = at_least_fp32(x.amax(dim=-1))
    shifted = x - highest.unsqueeze(-1)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    products = torch.linalg.vecdot(weights, shifted.clamp_(min=_LEAST_LOG))
    log_total = total.log()
    return highest + log_total, log_total - products / total


def _gradient_buffer(ctx: Any, logits: Tensor) -> Tensor:
    return logits.detach() if ctx.overwrites else torch.empty_like(logits)


def _workspace(out: Tensor, like: Tensor) -> Tensor:
    """A buffer for a part of the gradient in the dtype of `like`: `out` itself if it has it."""
    return out if out.dtype == like.dtype else torch.empty_like(out, dtype=like.dtype)


def _store(result: Tensor, out: Tensor) -> None:
    if result is not out:
        out.copy_(result)


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, _CHUNK_SIZE.get(logits.device.type, 1 << 25) // logits.shape[-1])
