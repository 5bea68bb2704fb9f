"""The query correction of one layer, and what is measured and penalised in it.

Shapes: b batch, s queries, n heads, d head dimension, w remembered layers, e hidden size of the
selection MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.amrpa.settings import MemorySettings

# Below this variance of the gate over tokens the gate loss grows.
GATE_VARIANCE = 0.02

Granularity = Literal["head", "token"]
Dropout = Callable[[Tensor, int], Tensor]

_ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Correction(NamedTuple):
    """`query`: what to add to the query before its rotation [b, n, s, d]. `gate`: fp32 [b, n, s].
    `alpha`: fp32 [w, b, n, s], or [w, b, 1, s] with one selection per token."""

    query: Tensor
    gate: Tensor
    alpha: Tensor


class Measured(NamedTuple):
    """Values of every row, fp32 [b], means over its tokens and heads; each differentiable."""

    gate_impact: Tensor
    gate_variance: Tensor
    alpha_diversity: Tensor
    memory_contribution: Tensor
    using_memory: Tensor
    diversity_loss: Tensor
    gate_loss: Tensor


class QueryMemory(nn.Module):
    """Correct a query by what earlier layers' attention transports of this layer's values.

    With u_k = A^(l-k) V^(l) per head, the layer k before, and v the mean of the visible values:

        u_k   = gamma^k u_k + epsilon xi v          xi ~ U(0, 2) per token and head; 1 in evaluation
        alpha = softmax_k(MLP[q, W_a u_k] / T)
        m     = sum_k alpha_k u_k
        G     = act(gamma_g <q, W_g m> / sqrt(d) + b_g)
        q'    = q + G W_m m

    so that `softmax(q' K^T) = softmax(Q K^T + G * (W_m M V) K^T)`, M = sum_k alpha_k A_k. W_m is 0
    at first: the layer then computes what it did without memory.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        window: int,
        config: MemorySettings,
        *,
        granularity: Granularity = "head",
        device: torch.device | None = None,
    ) -> None:
        """`window`: how many layers are read; with one there is nothing to select, and no MLP.

        Parameters are uninitialised: see `reset_parameters`. With one selection per head, heads
        share nothing but the MLP and the gate's scalars, so a part of them can live on a rank.
        """
        super().__init__()
        self.config = config
        self.granularity = granularity
        empty = partial(torch.empty, device=device)
        per_head = (num_heads, head_dim, head_dim)
        self.gate_weight = nn.Parameter(empty(per_head))  # W_g
        self.memory_weight = nn.Parameter(empty(per_head))  # W_m
        self.gate_sensitivity = nn.Parameter(empty((1,)))
        self.gate_bias = nn.Parameter(empty((1,)))
        self.selects = window > 1
        if self.selects:
            self.selection_weight = nn.Parameter(empty(per_head))  # W_a
            self._build_mlp((1 if granularity == "head" else num_heads) * head_dim, empty)

    def _build_mlp(self, size: int, empty: Callable[..., Tensor]) -> None:
        """Parameters, not linear layers: tools that adapt or quantise every linear layer of a model
        leave the memory alone. The last layer has no bias, which the softmax over k would cancel.
        """
        hidden = [self.config.alpha_mlp_hidden] * (self.config.alpha_mlp_layers - 1)
        for i, (rows, columns) in enumerate(zip(hidden, [2 * size, *hidden], strict=False)):
            self.register_parameter(f"mlp_weight_{i}", nn.Parameter(empty((rows, columns))))
            self.register_parameter(f"mlp_bias_{i}", nn.Parameter(empty((rows,))))
        self.score_weight = nn.Parameter(empty((1, hidden[-1] if hidden else 2 * size)))

    def _mlp(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of all layers of the MLP, and the biases of all but the last."""
        hidden = range(self.config.alpha_mlp_layers - 1)
        weights = [self.get_parameter(f"mlp_weight_{i}") for i in hidden]
        biases = [self.get_parameter(f"mlp_bias_{i}") for i in hidden]
        return [*weights, self.score_weight], list(biases)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_a and W_g ~ N(0, 1/d); W_m = 0; the MLP as nn.Linear; the gate's scalars as set."""
        std = self.memory_weight.shape[-1] ** -0.5
        self.gate_weight.normal_(std=std)
        self.memory_weight.zero_()
        self.gate_sensitivity.fill_(self.config.gate_sensitivity)
        self.gate_bias.fill_(self.config.gate_bias)
        if self.selects:
            self.selection_weight.normal_(std=std)
            weights, biases = self._mlp()
            bounds = [weight.shape[1] ** -0.5 for weight in weights]
            for weight, bound in zip(weights, bounds, strict=True):
                weight.uniform_(-bound, bound)
            for bias, bound in zip(biases, bounds[:-1], strict=True):
                bias.uniform_(-bound, bound)

    def forward(
        self,
        q: Tensor,
        transported: Tensor,
        mean_value: Tensor | None,
        noise: Tensor | None,
        dropout: Dropout | None = None,
    ) -> Correction:
        """q [b, n, s, d] before its rotation; `transported` u_k [w, b, n, s, d], nearest first.

        `mean_value` v [b, n, s, d], None where epsilon is 0; `noise` xi [w, b, n, s], None for 1.
        `dropout(x, i)`: what dropout leaves of hidden layer i of the MLP; None for torch's own.
        """
        memory = self._fade(transported, mean_value, noise)
        alpha = self._select(q, memory, dropout or self._dropout)
        m = (alpha.unsqueeze(-1).to(memory.dtype) * memory).sum(dim=0)
        gate = self._gate(q, m)
        correction = torch.einsum("bnsd,ned->bnse", m, self.memory_weight)
        return Correction(gate.unsqueeze(-1).to(correction.dtype) * correction, gate, alpha)

    def _fade(self, transported: Tensor, mean: Tensor | None, noise: Tensor | None) -> Tensor:
        decay = [self.config.memory_decay**k for k in range(1, len(transported) + 1)]
        faded = transported * transported.new_tensor(decay).view(-1, 1, 1, 1, 1)
        # In place, here and below: tensors of w queries, or of their hidden layers, cost more to
        # write than to compute, and no backward pass needs these again.
        if mean is None:
            return faded
        if noise is None:
            return faded.add_(mean, alpha=self.config.memory_noise)
        return faded.addcmul_(
            noise.unsqueeze(-1).to(mean.dtype), mean, value=self.config.memory_noise
        )

    def _dropout(self, x: Tensor, layer: int) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _select(self, q: Tensor, memory: Tensor, dropout: Dropout) -> Tensor:
        """`softmax_k(MLP[q, W_a u_k] / T)`: fp32 [w, b, n or 1, s].

        The first layer is a sum of two products, of which that of q serves all k.
        """
        if not self.selects:
            return _at_least_fp32(torch.ones_like(memory[..., 0]))
        (first, *others), known = self._mlp()
        of_query, of_memory = first.chunk(2, dim=1)
        biases: list[Tensor | None] = [*known, None]  # the last layer has none
        projected = torch.einsum("kbnsd,ned->kbnse", memory, self.selection_weight)
        if self.granularity == "head":
            of_q = F.linear(q, of_query, biases[0])
            x = F.linear(projected, of_memory)
        else:
            # One row of all heads: [.., s, n d].
            of_q = F.linear(q.transpose(1, 2).flatten(2), of_query, biases[0]).unsqueeze(1)
            x = F.linear(projected.transpose(2, 3).flatten(3), of_memory).unsqueeze(2)
        x = x.add_(of_q)
        for i, (weight, following) in enumerate(zip(others, biases[1:], strict=True)):
            x = F.linear(dropout(x.relu_(), i), weight, following)
        scores = _at_least_fp32(x.squeeze(-1)) / self.config.alpha_temperature
        return scores.softmax(dim=0)

    def _gate(self, q: Tensor, m: Tensor) -> Tensor:
        projected = torch.einsum("bnsd,ned->bnse", m, self.gate_weight)
        similarity = (_at_least_fp32(q) * projected).sum(dim=-1) / math.sqrt(q.shape[-1])
        return _ACTIVATIONS[self.config.gate_activation](
            self.gate_sensitivity * similarity + self.gate_bias
        )

    def measure(
        self,
        correction: Correction,
        real: Tensor | None,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> Measured:
        """The measurements and both losses, before their weights, of every row.

        `real` bool [b, s]: the tokens that are no padding; None for all. `average`: of a tensor
        over the ranks that share the heads; None where this one has them all.

            diversity_loss = mean_(t, i) [1 - Ent(alpha) / ln w], 0 for w = 1
            gate_loss      = (mean G - 1/2)^2 + relu(v0 - Var_t G) / v0
        """
        gate, alpha = correction.gate, correction.alpha
        if real is None:
            real = torch.ones_like(gate[:, 0], dtype=torch.bool)
        counts = real.to(gate.dtype).unsqueeze(1)
        weights = counts / counts.sum(dim=2, keepdim=True).clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return (x * weights).sum(dim=2).mean(dim=1)

        # The gradient of x ln x at 0 is infinite; alpha may underflow to 0.
        tiny = torch.finfo(alpha.dtype).tiny
        entropy = mean(-(alpha * alpha.clamp(min=tiny).log()).sum(dim=0))
        centre = (gate * weights).sum(dim=2, keepdim=True)
        variance = mean((gate - centre).square())
        contribution = mean(_at_least_fp32(correction.query).norm(dim=-1))
        of_heads = torch.stack((mean(gate), variance, entropy, contribution))
        impact, variance, entropy, contribution = (
            of_heads if average is None else average(of_heads)
        ).unbind()
        window = len(alpha)
        diversity = 1 - entropy / math.log(window) if window > 1 else torch.zeros_like(entropy)
        return Measured(
            gate_impact=impact,
            gate_variance=variance,
            alpha_diversity=entropy,
            memory_contribution=contribution,
            using_memory=torch.ones_like(impact),
            diversity_loss=diversity * real.any(dim=1),
            gate_loss=(impact - 0.5).square()
            + torch.relu(GATE_VARIANCE - variance) / GATE_VARIANCE,
        )


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
