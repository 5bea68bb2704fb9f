"""A row of a DART, place by place, from its equations: fp64, whole masks, Python loops.

Shares no code with the model but the names of its parameters and the random numbers of its noise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.common.counter_rng import normal
from models.dart.config import DARTConfig
from models.dart.noise import NORMAL


class RowNoise(NamedTuple):
    """Noise of a row: the level and the key of every place, whether it shows no token, and the
    first place that it can see."""

    levels: list[int]
    hidden: list[bool]
    begins: list[int]
    keys: Tensor


class Row(NamedTuple):
    """Logits [s, V] of both streams."""

    logits: Tensor
    draft_logits: Tensor


def kept(config: DARTConfig, k: int) -> float:
    """alpha of level k."""
    t, steps = k / config.diffusion_steps, config.diffusion_steps
    if k == steps:
        return 0.0
    if config.diffusion_schedule == "cosine":
        f = [math.cos(math.pi / 2 * (x + 0.008) / 1.008) ** 2 for x in (t, 0.0)]
        return f[0] / f[1]
    if config.diffusion_type == "masked":
        return 1 - t if config.diffusion_schedule == "linear" else (1 - t) ** 2
    product = 1.0
    for j in range(k):
        share = j / (steps - 1)
        if config.diffusion_schedule == "linear":
            beta = 1e-4 + share * (0.02 - 1e-4)
        else:
            beta = (math.sqrt(1e-4) + share * (math.sqrt(0.02) - math.sqrt(1e-4))) ** 2
        product *= 1 - min(beta * 1000 / steps, 0.999)
    return product


class _Oracle:
    def __init__(self, parameters: dict[str, Tensor], config: DARTConfig, noise: RowNoise) -> None:
        self.p, self.config, self.noise = parameters, config, noise
        self.length = len(noise.levels)
        self.starts = [
            first + (i - first) // config.block_size * config.block_size
            for i, first in enumerate(noise.begins)
        ]

    def norm(self, x: Tensor, name: str | None) -> Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return y if name is None else y * self.p[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def rotated(self, head: Tensor, position: int) -> Tensor:
        d = self.config.head_size
        steps = torch.arange(0, d, 2, dtype=torch.float32)
        angles = position * (1.0 / self.config.rope_theta ** (steps / d))  # fp32, as the table
        cos, sin = angles.cos().double(), angles.sin().double()
        a, b = head[: d // 2], head[d // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin))

    def heads(self, x: Tensor, name: str, *, shift: int | None) -> list[list[Tensor]]:
        """[place][head], turned by the place's position + shift."""
        projected = self.linear(x, name).unflatten(-1, (-1, self.config.head_size))
        return [
            [
                head if shift is None else self.rotated(head, i - self.noise.begins[i] + shift)
                for head in heads.unbind()
            ]
            for i, heads in enumerate(projected.unbind())
        ]

    def keys_values(
        self, x: Tensor, attention: str, *, shift: int
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        keys = self.heads(x, f"{attention}.key", shift=shift)
        return list(zip(keys, self.heads(x, f"{attention}.value", shift=None), strict=True))

    def mixed(
        self, q: list[list[Tensor]], seen: list[list[tuple[list[Tensor], list[Tensor]]]]
    ) -> Tensor:
        """Attention of every place over its own list of keys and values."""
        group = self.config.num_heads // self.config.num_kv_heads
        rows = []
        for queries, pairs in zip(q, seen, strict=True):
            outputs = []
            for n, query in enumerate(queries):
                scores = [(query * k[n // group]).sum() for k, _ in pairs]
                weights = torch.stack(scores).div(math.sqrt(len(query))).softmax(0)
                outputs.append(
                    sum(w * v[n // group] for w, (_, v) in zip(weights, pairs, strict=True))
                )
            rows.append(torch.cat(outputs))
        return torch.stack(rows)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = self.linear(x, f"{name}.gate")
        return self.linear(gate * gate.sigmoid() * self.linear(x, f"{name}.up"), f"{name}.down")

    def modulation(self, level: int) -> Tensor:
        time = 1000.0 * level / self.config.diffusion_steps
        angles = [time * 10_000.0 ** (-j / 128) for j in range(128)]
        waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        c = self.linear(torch.tensor(waves, dtype=torch.float64), "embedding.time.inner")
        c = self.linear(c * c.sigmoid(), "embedding.time.outer")
        return self.linear(c * c.sigmoid(), "embedding.time.modulation")

    def noised(self, i: int, tokens: list[int]) -> Tensor:
        if self.noise.hidden[i]:
            return self.p["embedding.mask"]
        e = self.p["embedding.tokens.weight"][tokens[i + 1]]
        if self.config.diffusion_type == "masked":
            return e
        signal = kept(self.config, self.noise.levels[i])
        epsilon = normal(self.noise.keys[i : i + 1], len(e), stream=NORMAL)[0].double()
        return math.sqrt(signal) * self.norm(e, None) + math.sqrt(1 - signal) * epsilon

    def diffusion(self, y: Tensor, z: Tensor, pair: str, table: Tensor) -> Tensor:
        block = f"{pair}.{'diffusion' if self.config.trunk == 'dual' else 'causal'}"
        attention = f"{block}.attention"
        rows = [(self.modulation(level) + table).chunk(6) for level in self.noise.levels]
        g1, b1, a1, g2, b2, a2 = (torch.stack(x) for x in zip(*rows, strict=True))
        x = self.norm(z, f"{block}.attention_norm") * (1 + g1) + b1
        clean = self.norm(y, f"{block}.attention_norm")
        own = self.keys_values(x, attention, shift=1)
        context = self.keys_values(clean, attention, shift=0)
        seen = [
            [context[j] for j in range(self.noise.begins[i], self.starts[i] + 1)]
            + [
                own[j]
                for j in range(self.length)
                if self.starts[j] == self.starts[i]
                and (j <= i or self.noise.levels[i] < self.config.diffusion_steps)
            ]
            for i in range(self.length)
        ]
        mixed = self.mixed(self.heads(x, f"{attention}.query", shift=1), seen)
        z = z + (1 + a1) * self.linear(mixed, f"{attention}.output")
        x = self.norm(z, f"{block}.mlp_norm") * (1 + g2) + b2
        return z + (1 + a2) * self.mlp(x, f"{block}.mlp")

    def causal(self, y: Tensor, z: Tensor, pair: str) -> Tensor:
        block, attention = f"{pair}.causal", f"{pair}.causal.attention"
        x = self.norm(y, f"{block}.attention_norm")
        pairs = self.keys_values(x, attention, shift=0)
        seen = [pairs[self.noise.begins[i] : i + 1] for i in range(self.length)]
        mixed = self.mixed(self.heads(x, f"{attention}.query", shift=0), seen)
        y = y + self.linear(mixed, f"{attention}.output")
        y = y + self.mlp(self.norm(y, f"{block}.mlp_norm"), f"{block}.mlp")
        plan = self.norm(z, None)
        if self.config.exchange_size:
            plan = self.linear(plan, f"{pair}.exchange.down")
        plan = self.linear(plan, f"{pair}.exchange.up")
        on = [float(level == self.config.diffusion_steps) for level in self.noise.levels]
        return y + torch.tensor(on, dtype=torch.float64).unsqueeze(-1) * plan

    def row(self, tokens: list[int]) -> Row:
        table = self.p["embedding.tokens.weight"]
        y = torch.stack([table[token] for token in tokens])
        z = torch.stack([self.noised(i, tokens) for i in range(self.length)])
        for i in range(self.config.num_pairs):
            for repeat in range(self.config.recursions):
                z = self.diffusion(y, z, f"pair_{i}", self.p[f"pair_{i}.table"][repeat])
                y = self.causal(y, z, f"pair_{i}")
        tied = self.config.tie_embeddings
        head = self.p["embedding.tokens.weight" if tied else "head.output.weight"]
        return Row(self.norm(y, "head.norm") @ head.T, self.norm(z, "head.noised_norm") @ head.T)


def told(
    parameters: dict[str, Tensor], config: DARTConfig, tokens: list[int], noise: RowNoise
) -> Row:
    """Logits of a row with this noise."""
    return _Oracle(parameters, config, noise).row(tokens)


def losses_of(row: Row, noise: Any, labels: list[int], config: DARTConfig) -> Tensor:
    """[3]: sums of the causal, the diffusion and the draft losses of a row. `noise`: the levels
    and targets that were drawn."""
    causal, diffusion, draft = [], [], []
    levels, targets = noise.levels[0].tolist(), noise.targets[0].tolist()
    for i, (label, level, target) in enumerate(zip(labels, levels, targets, strict=True)):
        causal.append(-row.logits[i].log_softmax(-1)[label])
        loss = -row.draft_logits[i].log_softmax(-1)[label]
        if target == 1:
            weight = 1.0
            if config.diffusion_type == "masked":
                gone = kept(config, level - 1) - kept(config, level)
                weight = config.diffusion_steps * gone / (1 - kept(config, level))
            diffusion.append(weight / (1 - config.p_plan) * loss)
        if target == 2:
            draft.append(loss / config.p_plan)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([sum(part, zero) for part in (causal, diffusion, draft)])
