"""The equations of models/agiformer/README.md in plain loops over bytes, patches and heads.

For one document, in the dtype of the weights, which are the parameters of the whole model by name.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.agiformer.config import AgiformerConfig

Weights = dict[str, Tensor]


class Told(NamedTuple):
    """`logits` [s, V]; of every patch the steps it took and its ponder cost."""

    logits: Tensor
    steps: list[int]
    ponder: list[Tensor]


def told(weights: Weights, config: AgiformerConfig, text: list[int]) -> Told:
    """What the model says after every byte of `text`."""
    last_bytes = range(0, len(text), config.patch_size)
    latents = [latent(weights, config, text[: t + 1]) for t in last_bytes]
    for number in range(config.num_layers):
        own = {
            name.removeprefix(f"block_{number}."): w
            for name, w in weights.items()
            if name.startswith(f"block_{number}.")
        }
        latents = block(own, config, latents)
    own = {
        n.removeprefix("reasoning."): w for n, w in weights.items() if n.startswith("reasoning.")
    }
    thoughts = [thought(own, config, x) for x in latents]
    logits = [
        said(weights, config, thoughts[t // config.patch_size][0], text, t)
        for t in range(len(text))
    ]
    steps, ponder = [n for _, n, _ in thoughts], [cost for _, _, cost in thoughts]
    return Told(torch.stack(logits), steps, ponder)


def latent(w: Weights, config: AgiformerConfig, seen: list[int]) -> Tensor:
    nothing = w["encoder.tokens.weight"].new_zeros(config.byte_size)
    kernel = [nothing] * config.patch_kernel + [w["encoder.tokens.weight"][byte] for byte in seen]
    stacked = torch.stack(kernel[-config.patch_kernel :], dim=1).flatten()
    mixed = w["encoder.mix.weight"] @ stacked + w["encoder.mix.bias"]
    return rms(mixed, config) * w["encoder.norm.weight"]


def block(w: Weights, config: AgiformerConfig, latents: list[Tensor]) -> list[Tensor]:
    normed = [rms(x, config) * w["norm.weight"] for x in latents]
    out = []
    for i, x in enumerate(latents):
        a = torch.cat([attended(w, config, normed, i, n) for n in range(config.num_heads)])
        heads = [remembered(w, config, normed, i, n) for n in range(config.num_heads)]
        x = x + fused(w, config, normed[i], a, heads)
        u = rms(x, config) * w["mlp_norm.weight"]
        hidden = F.silu(w["mlp.gate.weight"] @ u) * (w["mlp.up.weight"] @ u)
        out.append(x + w["mlp.down.weight"] @ hidden)
    return out


def attended(w: Weights, config: AgiformerConfig, u: list[Tensor], i: int, head: int) -> Tensor:
    first = max(0, i - config.window_size + 1)
    query = turned(head_of(w["attention.query.weight"] @ u[i], config, head), i, config)
    keys = [
        turned(head_of(w["attention.key.weight"] @ u[j], config, head), j, config)
        for j in range(first, i + 1)
    ]
    scores = torch.stack([query @ key for key in keys]) / math.sqrt(config.head_dim)
    values = [
        head_of(w["attention.value.weight"] @ u[j], config, head) for j in range(first, i + 1)
    ]
    return scores.softmax(dim=0) @ torch.stack(values)


def turned(x: Tensor, position: int, config: AgiformerConfig) -> Tensor:
    half = config.head_dim // 2
    out = x.clone()
    for pair in range(half):
        angle = position * config.rope_theta ** (-2 * pair / config.head_dim)
        cos, sin = (torch.tensor(f(angle)).float().to(x.dtype) for f in (math.cos, math.sin))
        out[pair] = x[pair] * cos - x[pair + half] * sin
        out[pair + half] = x[pair + half] * cos + x[pair] * sin
    return out


def remembered(w: Weights, config: AgiformerConfig, u: list[Tensor], i: int, head: int) -> Tensor:
    """`sum_j (q_i . k_j) (prod lambda) v_j` over the same without v: no state at all."""
    query = F.elu(head_of(w["memory.query.weight"] @ u[i], config, head)) + 1
    query = query / math.sqrt(config.head_dim)
    above, below = u[0].new_zeros(config.head_dim), u[0].new_zeros(())
    for j in range(i + 1):
        key = F.elu(head_of(w["memory.key.weight"] @ u[j], config, head)) + 1
        value = head_of(w["memory.value.weight"] @ u[j], config, head)
        kept = u[0].new_ones(())
        for t in range(j + 1, i + 1):
            kept = kept * decay(w, config, u[t], head)
        above, below = above + (query @ key) * kept * value, below + (query @ key) * kept
    return above / (below + 1e-6)


def decay(w: Weights, config: AgiformerConfig, u: Tensor, head: int) -> Tensor:
    logit = w["memory.decay.weight"][head] @ u + w["memory.decay_bias"][head]
    own = config.decay_floor + (1 - config.decay_floor) * logit.sigmoid()
    return (w["memory.plasticity"].squeeze() * own).clamp(math.exp(-20), 1.0)


def fused(w: Weights, config: AgiformerConfig, u: Tensor, a: Tensor, heads: list[Tensor]) -> Tensor:
    gate = (w["fusion.gate"].squeeze(0) @ u + w["fusion.gate_bias"].squeeze()).sigmoid()
    if config.fusion == "triple":
        a = w["fusion.attention.weight"] @ a
        m = rms(w["fusion.memory.weight"] @ torch.cat(heads), config)
        m = m * w["fusion.memory_norm.weight"]
    else:
        m = torch.cat([rms(x, config) * g for x, g in zip(heads, w["fusion.gains"], strict=True)])
    return w["fusion.output.weight"] @ (gate * a + (1 - gate) * m)


def thought(w: Weights, config: AgiformerConfig, x: Tensor) -> tuple[Tensor, int, Tensor]:
    s = rms(x, config) * w["norm.weight"]
    out, total = torch.zeros_like(s), s.new_zeros(())
    for n in range(1, config.thinking_steps + 1):
        c = rms(s, config) * w["step_norm.weight"]
        hidden = F.gelu(w["up.weight"] @ c + w["up.bias"])
        gate = (w["gate.weight"] @ c + w["gate.bias"]).sigmoid()
        update = gate * (w["down.weight"] @ hidden + w["down.bias"])
        p = (w["halt"].squeeze(0) @ c + w["halt_bias"].squeeze()).sigmoid()
        s = s + ((1 - p) * update if config.halting == "soft" else update)
        if config.halting == "soft":
            continue
        if total + p >= 1 - config.act_epsilon or n == config.thinking_steps:
            return out + (1 - total) * s, n, n + 1 - total
        out, total = out + p * s, total + p
    return s, config.thinking_steps, total


def said(w: Weights, config: AgiformerConfig, z: Tensor, text: list[int], t: int) -> Tensor:
    """The logits of byte t + 1."""
    size, place = config.patch_size, t % config.patch_size
    project = w["head.project.weight"].unflatten(0, (config.head_hidden, size))
    c = project[:, place] @ z
    if config.byte_head == "causal":
        patch = text[t - place + 1 : t + 1]  # the bytes of the patch before byte t + 1
        for j, byte in enumerate(patch):
            pair = place * (place - 1) // 2 + j
            c = c + w["head.table"][pair * config.vocab_size + byte]
    hidden = F.gelu(w["head.hidden.weight"] @ F.gelu(c))
    return w["head.output.weight"] @ hidden


def head_of(x: Tensor, config: AgiformerConfig, head: int) -> Tensor:
    return x[head * config.head_dim : (head + 1) * config.head_dim]


def rms(x: Tensor, config: AgiformerConfig) -> Tensor:
    return x / (x.square().mean() + config.rms_norm_eps).sqrt()
