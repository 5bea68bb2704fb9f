"""A decoder of Llama shape with AMRPA, written from the equations: one head and one token at a
time, with the S x S patterns and the S x S bias spelled out. Nothing of the package is used."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Found(NamedTuple):
    logits: Tensor
    diversity_loss: Tensor  # [b], means over layers
    gate_loss: Tensor
    gate_impact: Tensor
    gate_variance: Tensor
    alpha_diversity: Tensor
    memory_contribution: Tensor


def oracle(weights: dict[str, Tensor], config, amrpa, tokens: Tensor, reads: dict) -> Found:
    """`reads`: layer -> the layers it reads, nearest first."""
    rows = [_row(weights, config, amrpa, row, reads) for row in tokens]
    return Found(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _row(weights, config, amrpa, tokens, reads) -> Found:
    x = weights["model.embed_tokens.weight"][tokens]
    patterns: list[list[Tensor]] = []  # of every layer and head
    measured = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        n = _norm(x, weights[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
        memory = None
        if layer in reads:
            prefix = f"{name}.self_attn.amrpa.{layer}."
            memory = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        attended, own, values = _attention(
            weights, name, config, amrpa, n, memory, [patterns[i] for i in reads.get(layer, ())]
        )
        patterns.append([a.detach() for a in own] if amrpa.detach_history else own)
        if values is not None:
            measured.append(values)
        x = x + attended
        n = _norm(x, weights[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = n @ weights[f"{name}.mlp.gate_proj.weight"].T
        up = n @ weights[f"{name}.mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    x = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    means = [torch.stack(parts).mean() for parts in zip(*measured, strict=True)]
    return Found(x @ weights["lm_head.weight"].T, *means)


def _attention(weights, name, config, amrpa, x, memory, history):
    size, heads = len(x), config.num_attention_heads
    d = config.head_dim
    q, k, v = (
        (x @ weights[f"{name}.self_attn.{part}_proj.weight"].T).view(size, -1, d) for part in "qkv"
    )
    group = heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    outputs, patterns, all_gates, all_alphas, norms = [], [], [], [], []
    corrections = [None] * heads
    if memory is not None:
        corrections, all_gates, all_alphas, norms = _corrections(
            amrpa, memory, q, v, history, group
        )
    for head in range(heads):
        scores = x.new_full((size, size), -math.inf)
        for t in range(size):
            for s in range(t + 1):
                key = _rotate(k[s, head // group], s, theta)
                score = _rotate(q[t, head], t, theta) @ key / math.sqrt(d)
                if memory is not None:  # the bias G * (W_m M V) K^T
                    score = score + _rotate(corrections[head][t], t, theta) @ key / math.sqrt(d)
                scores[t, s] = score
        pattern = torch.softmax(scores, dim=-1)
        patterns.append(pattern)
        outputs.append(pattern @ v[:, head // group])
    y = torch.cat(outputs, dim=-1) @ weights[f"{name}.self_attn.o_proj.weight"].T
    if memory is None:
        return y, patterns, None
    return y, patterns, _measure(torch.stack(all_gates), torch.stack(all_alphas), norms)


def _corrections(amrpa, memory, q, v, history, group):
    """For every head: G W_m m, G, alpha and norms of all tokens."""
    size, heads, d = q.shape
    window = len(history)
    faded = []  # of head: M_k = gamma^k A_k + epsilon U, a list over k
    uniform = torch.tril(torch.ones(size, size, dtype=q.dtype))
    uniform = uniform / uniform.sum(dim=1, keepdim=True)
    for head in range(heads):
        faded.append(
            [
                amrpa.memory_decay ** (k + 1) * history[k][head] + amrpa.memory_noise * uniform
                for k in range(window)
            ]
        )
    scores = q.new_zeros(heads, size, window)
    for t in range(size if window > 1 else 0):
        for k in range(window):
            projected = [
                memory["selection_weight"][head] @ (faded[head][k] @ v[:, head // group])[t]
                for head in range(heads)
            ]
            if amrpa.granularity == "token":
                scores[:, t, k] = _mlp(memory, torch.cat([*q[t], *projected]))
            else:
                for head in range(heads):
                    scores[head, t, k] = _mlp(memory, torch.cat([q[t, head], projected[head]]))
    alpha = torch.softmax(scores / amrpa.alpha_temperature, dim=-1)
    corrections, gates, norms = [], [], []
    for head in range(heads):
        pattern = sum(alpha[head, :, k, None] * faded[head][k] for k in range(window))
        m = pattern @ v[:, head // group]
        similarity = (q[:, head] * (m @ memory["gate_weight"][head].T)).sum(-1) / math.sqrt(d)
        gate = ACTIVATIONS[amrpa.gate_activation](
            memory["gate_sensitivity"] * similarity + memory["gate_bias"]
        )
        corrections.append(gate[:, None] * (m @ memory["memory_weight"][head].T))
        gates.append(gate)
        norms.append(corrections[-1].norm(dim=-1))
    return corrections, gates, list(alpha), norms


def _mlp(memory, x):
    for i in range(sum(name.startswith("mlp_bias") for name in memory)):
        x = (memory[f"mlp_weight_{i}"] @ x + memory[f"mlp_bias_{i}"]).clamp(min=0)
    return (memory["score_weight"] @ x).squeeze(-1)


def _measure(gates, alphas, norms):
    """gates [n, s], alphas [n, s, w]."""
    window = alphas.shape[-1]
    entropy = -(alphas * alphas.log()).sum(-1).mean()
    variance = gates.var(dim=1, correction=0).mean()
    diversity = 1 - entropy / math.log(window) if window > 1 else 0 * entropy
    gate_loss = (gates.mean() - 0.5) ** 2 + torch.relu(0.02 - variance) / 0.02
    return diversity, gate_loss, gates.mean(), variance, entropy, torch.stack(norms).mean()


def _norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _rotate(x, position, theta):
    half = len(x) // 2
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    first, second = x[:half], x[half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin))
