"""A family that is hard to cut into stages: its carry mixes dtypes, some fields without gradient.

It exists for the tests alone. `hidden` has the precision of the run, `state` is always fp32 and
recurrent over layers, every block reads `ids` (int64) and `flags` (bool), `noise` (fp32) needs no
gradient, and `aux` collects two auxiliary losses.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from models.base import (
    Counts,
    LossOutput,
    ModelFamily,
    TokenInputs,
    num_scored_in,
    scored_mean,
    token_losses,
)
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    project_together,
)
from parallel.precision import at_least_fp32
from parallel.sharding import Constant, Normal, declare_replicated

VOCAB, HIDDEN, INNER, STATE = 61, 32, 64, 8
AUX_WEIGHTS = (0.1, 0.05)


class AwkwardConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    family: Literal["awkward"] = "awkward"
    vocab_size: int = VOCAB
    num_layers: int = 6
    max_position_embeddings: int = 1 << 20

    def function(self) -> dict[str, Any]:
        return self.model_dump(exclude={"max_position_embeddings"})

    def tensor_divisible(self) -> dict[str, int]:
        return {"inner_size": INNER}


class AwkwardCarry(NamedTuple):
    hidden: Tensor
    state: Tensor
    ids: Tensor
    flags: Tensor
    noise: Tensor
    aux: Tensor


class Output(NamedTuple):
    logits: Tensor
    aux: Tensor


class Embedding(nn.Module):
    def __init__(self, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.table = VocabParallelEmbedding(VOCAB, HIDDEN, ctx=ctx, init=Normal(0.5))

    def forward(self, inputs: TokenInputs) -> AwkwardCarry:
        ids = inputs.tokens
        hidden = self.table(ids).transpose(0, 1)
        state = at_least_fp32(hidden)[..., :STATE].tanh()
        noise = (ids.float() * 0.37).sin()
        aux = at_least_fp32(hidden.new_zeros(len(ids), 2))
        return AwkwardCarry(hidden, state, ids, ids % 3 == 0, noise, aux)


class Block(nn.Module):
    def __init__(self, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        self.up = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx, bias=True, init=Normal(0.2))
        self.gate = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx, init=Normal(0.2))
        self.down = RowParallelLinear(INNER, HIDDEN, ctx=ctx, bias=True, init=Normal(0.2))
        self.to_state = nn.Linear(HIDDEN, STATE, device=ctx.device)
        self.from_state = nn.Parameter(torch.empty(STATE, HIDDEN, device=ctx.device))
        declare_replicated(self.to_state.weight, Normal(0.3), ctx=ctx)
        declare_replicated(self.to_state.bias, Constant(0.1), ctx=ctx)
        declare_replicated(self.from_state, _alternating, ctx=ctx)

    def forward(self, carry: AwkwardCarry) -> AwkwardCarry:
        hidden, dtype = carry.hidden, carry.hidden.dtype
        up, gate = project_together(hidden, self.up, self.gate)
        hidden = hidden + self.down(torch.tanh(up) * torch.sigmoid(gate))
        position = (carry.ids.float() / VOCAB + carry.noise).transpose(0, 1).unsqueeze(-1)
        allowed = carry.flags.transpose(0, 1).unsqueeze(-1)
        if self.ctx.sequence_parallel:
            rank, size = self.ctx.tensor.rank, self.ctx.tensor.size
            position, allowed = position.chunk(size)[rank], allowed.chunk(size)[rank]
        read = carry.state @ at_least_fp32(self.from_state)
        hidden = hidden + (read.masked_fill(allowed, 0.0) + 0.1 * position).to(dtype)
        state = torch.tanh(carry.state + at_least_fp32(self.to_state(hidden)))
        squares = at_least_fp32(hidden).square()
        terms = torch.stack([x.mean(dim=(0, 2)) for x in (squares, state)], dim=-1)
        if self.ctx.sequence_parallel:
            terms = _Mean.apply(terms, self.ctx)
        return AwkwardCarry(hidden, state, carry.ids, carry.flags, carry.noise, carry.aux + terms)


class Head(nn.Module):
    def __init__(self, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.out = VocabParallelHead(VOCAB, HIDDEN, ctx=ctx)

    def forward(self, carry: AwkwardCarry) -> Output:
        state = carry.state.mean(-1, keepdim=True).to(carry.hidden.dtype)
        return Output(self.out(carry.hidden + state), carry.aux)


class _Mean(torch.autograd.Function):
    """Mean of equal-sized token shards: every rank gets it and hands its share of gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: ParallelContext) -> Tensor:
        ctx.size = layout.tensor.size
        x = x.clone()
        torch.distributed.all_reduce(x, group=layout.tensor.group)
        return x / ctx.size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.size, None


def _alternating(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.linspace(-0.2, 0.2, shape.numel()).view(shape)


def layer_specs(config: AwkwardConfig, *, segmented: bool = False) -> list[LayerSpec]:
    blocks = [LayerSpec(f"block_{i}", Block) for i in range(config.num_layers)]
    tied = {"out.weight": "embedding.table.weight"}
    head = LayerSpec("head", Head, tied=tied, recompute=False)
    return [LayerSpec("embedding", Embedding, recompute=False), *blocks, head]


def carry_schema(
    config: AwkwardConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> AwkwardCarry:
    local = seq_length // ctx.tensor.size if ctx.sequence_parallel else seq_length
    tokens = (micro_batch_size, seq_length)
    return AwkwardCarry(
        hidden=Field((local, micro_batch_size, HIDDEN), ctx.precision.dtype, gradient=True),
        state=Field((local, micro_batch_size, STATE), torch.float32, gradient=True),
        ids=Field(tokens, torch.int64),
        flags=Field(tokens, torch.bool),
        noise=Field(tokens, torch.float32),
        aux=Field((micro_batch_size, 2), torch.float32, gradient=True),
    )


def loss(
    output: Output,
    labels: Tensor,
    *,
    config: AwkwardConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    if num_scored is None:
        num_scored = num_scored_in(labels)
    lm_loss = token_losses(output, labels, ctx).sum() / num_scored
    weights = torch.tensor(AUX_WEIGHTS, device=output.aux.device)
    aux = scored_mean(output.aux, labels, num_scored)
    terms = {"lm_loss": lm_loss.detach(), "aux_loss": aux.sum().detach()}
    return LossOutput(lm_loss + (weights * aux).sum(), terms)


def flops(config: AwkwardConfig, seq_length: int) -> float:
    """Matrix products alone: three projections and two state maps per block, and the head."""
    block = 2 * (3 * HIDDEN * INNER + 2 * HIDDEN * STATE)
    return config.num_layers * block + 2 * HIDDEN * config.vocab_size


def num_parameters(config: AwkwardConfig) -> int:
    projections = 3 * HIDDEN * INNER + INNER + HIDDEN
    state = HIDDEN * STATE + STATE + STATE * HIDDEN
    return config.vocab_size * HIDDEN + config.num_layers * (projections + state)


FAMILY = ModelFamily(
    name="awkward",
    config_cls=AwkwardConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", "aux_loss"),
    counts=Counts(num_parameters, flops),
)


def batch(step: int, *, size: int = 2, seq: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens and labels [size, seq] that depend on `step` alone."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (size, seq + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
