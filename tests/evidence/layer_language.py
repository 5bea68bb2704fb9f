"""Byte language modelling with memory across layers, beside a llama and attention residuals.

Text, split, rows and optimizer are those of `language`. Every arm spends the same forward FLOPs per
byte, by the size of its FFN, and sees the same bytes in as many steps, at two learning rates. Two
controls say where a difference comes from: a llama with the small FFN that the memory leaves room
for, and the memory without its two losses.

Attention residuals (arXiv 2603.15031) are the control: memory across layers of another kind, in its
plain form over all layers. The input of every attention and every FFN is

    h_l = sum_(i < l) softmax_i(w_l . rmsnorm(v_i)) v_i

with v_0 the embedding, v_i the outputs of the layers before, and w_l = 0 at first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY as AMRPA
from models.base import Counts, ModelFamily
from models.common.decoder import (
    DecoderCarry,
    LMHead,
    decoder_attention,
    decoder_carry_schema,
    decoder_mlp,
    decoder_norm,
    decoder_rotary,
    decoder_specs,
)
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import LayerSpec
from parallel.context import ParallelContext
from parallel.sharding import Constant, Sharding, declare
from tests.benchmarks.timing import Table
from tests.evidence.language import (
    LENGTH,
    ROWS,
    VOCAB,
    Arm,
    Corpus,
    bits_per_byte,
    fit,
    rows_at,
)
from tests.evidence.training import future_leak, over_seeds, with_flops

STEPS, RATES = 120, (4e-3, 8e-3)
TEST_ROWS = 128
FFN = 192  # of the arm that decides the FLOPs of all, the memory of kind qk


class Mixture(nn.Module):
    """A softmax over the outputs of the layers before, and the weighted sum: [s, b, h]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.hidden_size))
        declare(self.query, Sharding(), Constant(0.0))

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        values = torch.stack(outputs)
        weights = (F.rms_norm(values, values.shape[-1:]) @ self.query).softmax(dim=0)
        return (weights.unsqueeze(-1) * values).sum(dim=0)


class ResidualBlock(nn.Module):
    """Attention and FFN that read a mixture; `carry.hidden` is the tuple of all outputs so far."""

    def __init__(self, config: LlamaConfig, *, rotary: Any, ctx: ParallelContext) -> None:
        super().__init__()
        self.mixtures = nn.ModuleList(Mixture(config) for _ in range(2))
        self.norms = nn.ModuleList(decoder_norm(config, ctx=ctx) for _ in range(2))
        self.attention = decoder_attention(config, rotary=rotary, ctx=ctx)
        self.mlp = decoder_mlp(config, ctx=ctx)

    def forward(self, carry: DecoderCarry) -> DecoderCarry:
        outputs = carry.hidden if isinstance(carry.hidden, tuple) else (carry.hidden,)
        for layer, mixture, norm in zip(
            (self.attention, self.mlp), self.mixtures, self.norms, strict=True
        ):
            outputs = (*outputs, layer(norm(mixture(outputs))))
        return carry._replace(hidden=outputs)


class ResidualHead(nn.Module):
    def __init__(self, config: LlamaConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.mixture = Mixture(config)
        self.head = LMHead(config, ctx=ctx)

    def forward(self, carry: DecoderCarry) -> Tensor:
        return self.head(carry._replace(hidden=self.mixture(carry.hidden)))


def _residual_specs(config: LlamaConfig, *, segmented: bool = False) -> list[LayerSpec]:
    shared = {"config": config, "rotary": decoder_rotary(config)}
    blocks = [LayerSpec(f"block_{i}", ResidualBlock, shared) for i in range(config.num_layers)]
    return decoder_specs(config, blocks, segmented=segmented, tied=False, head=ResidualHead)


def _residual_parameters(config: LlamaConfig) -> int:
    """Those of llama, and a query per attention, FFN and head."""
    return LLAMA.num_parameters(config) + (2 * config.num_layers + 1) * config.hidden_size


def _residual_flops(config: LlamaConfig, length: int) -> float:
    """Those of llama, and `4 h` for every output that an attention, FFN or the head reads."""
    reads = (2 * config.num_layers + 1) * (2 * config.num_layers + 2) // 2
    return LLAMA.flops(config, length) + 4.0 * config.hidden_size * reads


RESIDUALS = ModelFamily(
    name="attention residuals",
    config_cls=LlamaConfig,
    layer_specs=_residual_specs,
    carry_schema=decoder_carry_schema,
    counts=Counts(_residual_parameters, _residual_flops),
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "max_position_embeddings": LENGTH,
}
_MEMORY: dict[str, Any] = {"target_layers": "last_2", "alpha_mlp_hidden": 32}
_FLOPS = AMRPA.flops(AMRPALlamaConfig(**_SHAPE, **_MEMORY, intermediate_size=FFN), LENGTH)


def _arm(family: ModelFamily, config_cls: type[Any], **changes: Any) -> Arm:
    return Arm(family, with_flops(config_cls, _SHAPE | changes, family, _FLOPS, length=LENGTH))


_QK = _arm(AMRPA, AMRPALlamaConfig, **_MEMORY)
ARMS = {
    "llama": _arm(LLAMA, LlamaConfig),
    "attention residuals": _arm(RESIDUALS, LlamaConfig),
    "amrpa, qk": _QK,
    "amrpa, context": _arm(AMRPA, AMRPALlamaConfig, **_MEMORY, history_kind="context"),
}
CONTROLS = {
    "amrpa, qk, cross entropy alone": Arm(
        AMRPA, _QK.config.model_copy(update={"diversity_weight": 0.0, "gate_reg_weight": 0.0})
    ),
    f"llama, FFN of {FFN}": Arm(LLAMA, LlamaConfig(**_SHAPE, intermediate_size=FFN)),
}


def tables(num_seeds: int, *, steps: int = STEPS) -> Iterator[Table]:
    """Bits per byte of every arm over seeds, and their distance to llama's of the same seed."""
    corpus = Corpus.of_the_library()
    title = f"Held-out text after {steps} steps, {steps * ROWS * LENGTH:,} bytes"
    for lr in RATES:
        yield Table(f"{title}, learning rate {lr:g}", HEADER, _rows(corpus, lr, num_seeds, steps))


HEADER = (
    "", "FFN", "parameters", "MFLOP per byte", "bits per byte", "beside llama", "mean gate", "leak",
)  # fmt: skip


def _rows(corpus: Corpus, lr: float, num_seeds: int, steps: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    reference: list[float] = []
    sample = rows_at(corpus.test, torch.tensor([0, 1000])).tokens
    for name, arm in (ARMS | CONTROLS).items():
        fitted = [fit(arm, corpus, lr=lr, seed=seed, steps=steps) for seed in range(num_seeds)]
        bits = [bits_per_byte(each, arm, corpus.test, rows=TEST_ROWS) for each in fitted]
        print(f"{name}, {lr:g}: {bits}", flush=True)
        reference = reference or bits
        leaks = [future_leak(each.model, sample, vocab_size=VOCAB) for each in fitted]
        gates = [each.terms["gate_impact"] for each in fitted if arm.family is AMRPA]
        rows.append(
            (
                name,
                f"{arm.config.intermediate_size}",
                f"{arm.family.num_parameters(arm.config):,}",
                f"{arm.family.flops(arm.config, LENGTH) / 1e6:.3f}",
                over_seeds(bits),
                over_seeds([a - b for a, b in zip(bits, reference, strict=True)]),
                over_seeds(gates) if gates else "-",
                f"{max(leaks):g}",
            )
        )
    return rows
