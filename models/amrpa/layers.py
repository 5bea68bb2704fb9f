"""The layers of the amrpa family: embedding, block with memory, head.

Shapes: s sequence, b batch, h hidden, n query heads, g key and value heads, d head dimension, w
layers that are read, e hidden size of the selection MLP, V vocabulary, t tensor size. Between
layers activations are [s, b, h], or [s/t, b, h] under sequence parallelism.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.amrpa.carry import AUX, AMRPACarry, AMRPAOutput
from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.history import Part, entries, left, transported, visible_mean
from models.amrpa.memory import Measured, QueryMemory
from models.base import TokenInputs
from models.common.attention import attention
from models.common.cache import KVCache
from models.common.counter_rng import next_layer, prefix_keys, uniform
from models.common.decoder import (
    decoder_attention,
    decoder_mlp,
    decoder_norm,
    decoder_output,
    decoder_table,
    embed_tokens,
)
from models.common.rope import RotaryTable, rotate
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_logits
from parallel.precision import at_least_fp32, fp32_or_wider
from parallel.regions import sum_over_tensor_ranks
from parallel.sharding import Constant, Init, Normal, Role, Sharding, declare

# Streams of random numbers of a layer (models.common.counter_rng).
NOISE, DROPOUT = 0, 1


class AMRPAEmbedding(nn.Module):
    """Map token ids to the residual stream, segment ids to positions, prefixes to random keys."""

    def __init__(self, config: AMRPALlamaConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.segmented, self.is_random = segmented, config.is_random
        self.tokens = decoder_table(config, ctx=ctx)

    def forward(self, inputs: TokenInputs) -> AMRPACarry:
        hidden, positions = embed_tokens(self.tokens, inputs, segmented=self.segmented)
        aux = hidden.new_zeros(inputs.tokens.shape[0], len(AUX), dtype=fp32_or_wider(hidden.dtype))
        # In evaluation, too: what crosses a stage has one form.
        keys = prefix_keys(inputs.tokens, positions) if self.is_random else None
        return AMRPACarry(hidden, aux, (), positions, keys, inputs.lengths)


class Corrected(NamedTuple):
    """A corrected query before its rotation [b, n/t, s, d], and what was measured; None where a
    sequence is continued."""

    query: Tensor
    measured: Measured | None


class HeadMemory(nn.Module):
    """`QueryMemory` of this rank's heads; it exchanges the means of its measurements alone.

    Tensor ranks share W_a, W_g and W_m by heads. Each holds the MLP and the gate's scalars whole
    and applies them to its heads, so their gradients are summed over ranks. Random numbers are
    those of the token, the head and the channel, and the same at any tensor size.
    """

    def __init__(self, config: AMRPALlamaConfig, window: int, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        self.num_heads = config.num_heads // ctx.tensor.size
        self.heads = QueryMemory(
            self.num_heads, config.head_size, window, config, device=ctx.device
        )
        declare_memory(self.heads, config)

    def forward(
        self, q: Tensor, read: list[Tensor], v: Tensor, carry: AMRPACarry, *, continues: bool
    ) -> Corrected:
        """q [b, n/t, s, d] before rotation, u_k [b, n/t, s, d] of `read`, v [b, g/t, T, d]."""
        keys = carry.keys if self.training and not continues else None
        mean = noise = None
        if self.config.memory_noise > 0:
            mean = visible_mean(v, q.shape[2], carry.positions).to(q.dtype)
            mean = mean.unsqueeze(2).expand(-1, -1, self.num_heads // v.shape[1], -1, -1)
            mean = mean.flatten(1, 2)  # without grouped heads no copy
            noise = None if keys is None else self._noise(keys, len(read))

        def dropout(x: Tensor, layer: int) -> Tensor:
            return x if keys is None else self._dropped(x, keys, layer)

        correction = self.heads(q, torch.stack(read), mean, noise, dropout)
        measured = None
        if not continues:
            measured = self.heads.measure(correction, _real(carry, q.shape[2]), self._average)
        return Corrected(q + correction.query.to(q.dtype), measured)

    def _average(self, of_heads: Tensor) -> Tensor:
        return sum_over_tensor_ranks(of_heads, ctx=self.ctx) / self.ctx.tensor.size

    def _noise(self, keys: Tensor, window: int) -> Tensor:
        """xi ~ U(0, 2): [w, b, n/t, s]."""
        heads, first = self.num_heads, self.ctx.tensor.rank * self.num_heads
        drawn = [
            uniform(keys, heads, stream=NOISE, first=k * self.config.num_heads + first)
            for k in range(window)
        ]
        return 2.0 * torch.stack(drawn).transpose(2, 3)

    def _dropped(self, x: Tensor, keys: Tensor, layer: int) -> Tensor:
        """Dropout of hidden layer `layer` of the MLP: [w, b, n/t, s, e]."""
        probability = self.config.dropout
        if probability == 0:
            return x
        window, _, heads, _, size = x.shape
        kept = []
        for k in range(window):
            head = (layer * window + k) * self.config.num_heads + self.ctx.tensor.rank * heads
            numbers = uniform(keys, heads * size, stream=DROPOUT, first=head * size)
            kept.append((numbers >= probability).unflatten(-1, (heads, size)).transpose(1, 2))
        return x * (torch.stack(kept).to(x.dtype) / (1.0 - probability))


class AMRPABlock(nn.Module):
    """`x = x + attention(norm(x))` with queries that the memory corrects, `x = x + mlp(norm(x))`.

    `part`: which of the layers before it are read (models.amrpa.history); without, or with none to
    read, this is the block of llama. `num_readers`: layers of the model that read.
    """

    def __init__(
        self,
        config: AMRPALlamaConfig,
        *,
        rotary: RotaryTable,
        part: Part | None,
        num_readers: int,
        ctx: ParallelContext,
    ) -> None:
        super().__init__()
        self.config, self.part, self.num_readers = config, part, num_readers
        self.attention_norm = decoder_norm(config, ctx=ctx)
        self.attention = decoder_attention(config, rotary=rotary, ctx=ctx)
        self.memory = None
        if part is not None and part.reads:
            self.memory = HeadMemory(config, len(part.reads), ctx=ctx)
        self.mlp_norm = decoder_norm(config, ctx=ctx)
        self.mlp = decoder_mlp(config, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Empty state for generation; the memory needs none of its own."""
        return self.attention.new_cache(batch_size, max_length)

    def forward(self, carry: AMRPACarry, cache: KVCache | None = None) -> AMRPACarry:
        if carry.keys is not None:
            carry = carry._replace(keys=next_layer(carry.keys))
        carry = self._attend(carry, cache)
        x = carry.hidden
        return carry._replace(hidden=x + self.mlp(self.mlp_norm(x)))

    def _attend(self, carry: AMRPACarry, cache: KVCache | None) -> AMRPACarry:
        attend, positions = self.attention, carry.positions
        q, k, v = attend.project(self.attention_norm(carry.hidden))
        rotation = attend.rotation(q, positions, cache)
        k = rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.memory is not None:
            q, carry = self._corrected(q, v, carry, continues=cache is not None)
        q = rotate(q, rotation)
        mixed = attention(q, k, v, positions)
        hidden = carry.hidden + attend.project_output(mixed)
        return carry._replace(hidden=hidden, history=self._history(carry, q, k, mixed))

    def _corrected(
        self, q: Tensor, v: Tensor, carry: AMRPACarry, *, continues: bool
    ) -> tuple[Tensor, AMRPACarry]:
        """The corrected query, and the carry with this layer's share of `aux`."""
        assert self.memory is not None
        assert self.part is not None
        kind = self.config.history_kind
        known = entries(carry.history, kind)
        read = [transported(known[i], v, carry.positions, kind) for i in self.part.reads]
        query, measured = self.memory(q, read, v, carry, continues=continues)
        if measured is None:
            return query, carry
        shares = torch.stack([at_least_fp32(getattr(measured, name)) for name in AUX], dim=-1)
        return query, carry._replace(aux=carry.aux + shares / self.num_readers)

    def _history(
        self, carry: AMRPACarry, q: Tensor, k: Tensor, mixed: Tensor
    ) -> tuple[Tensor, ...]:
        """The history that later layers read, in the order of the layers that left it."""
        if self.part is None:
            return ()
        known = entries(carry.history, self.config.history_kind)
        kept = tuple(tensor for i in self.part.keeps for tensor in known[i])
        if not self.part.leaves:
            return kept
        return kept + left(self.config, q, k, mixed, carry.positions)


class AMRPAHead(nn.Module):
    """Logits `W norm(x)` over this rank's part of the vocabulary: [s, b, ceil(V/t)]."""

    def __init__(self, config: AMRPALlamaConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.norm = decoder_norm(config, ctx=ctx)
        self.output = decoder_output(config, ctx=ctx)

    def forward(self, carry: AMRPACarry) -> AMRPAOutput:
        return AMRPAOutput(vocab_logits(self.output, self.norm(carry.hidden)), carry.aux)


def declare_memory(memory: QueryMemory, config: AMRPALlamaConfig) -> None:
    """Declare sharding, initial values and roles of the parameters of a rank's heads.

    W_a and W_g start from N(0, 1/d) and W_m at 0; the MLP's weights with the variance of
    `nn.Linear`, 1/(3 inputs), and its biases at 0.
    """
    heads = Sharding(dim=0, full_size=config.num_heads)
    # Each rank's gradient is that of its heads, with and without sequence parallelism.
    shared = Sharding(partial_gradient=True)
    wide = Normal(config.head_size**-0.5)
    declared: dict[str, tuple[Sharding, Init, Role | None]] = {
        "gate_weight": (heads, wide, "matrix"),
        "memory_weight": (heads, Constant(0.0), "matrix"),
        "selection_weight": (heads, wide, "matrix"),
        "gate_sensitivity": (shared, Constant(config.gate_sensitivity), "vector"),
        "gate_bias": (shared, Constant(config.gate_bias), "vector"),
    }
    for name, parameter in memory.named_parameters():
        if name.startswith("mlp_bias"):
            declare(parameter, shared, Constant(0.0))
        elif name.startswith("mlp_weight") or name == "score_weight":
            # The last one maps every token to a number.
            role: Role = "router" if name == "score_weight" else "matrix"
            declare(parameter, shared, Normal((3 * parameter.shape[1]) ** -0.5), role=role)
        else:
            sharding, init, own_role = declared[name]
            declare(parameter, sharding, init, role=own_role)


def _real(carry: AMRPACarry, length: int) -> Tensor | None:
    """bool [b, s]: the tokens that are no padding; None for all."""
    if carry.lengths is None:
        return None
    return torch.arange(length, device=carry.lengths.device) < carry.lengths.unsqueeze(-1)
