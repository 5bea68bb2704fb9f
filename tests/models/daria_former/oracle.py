"""The whole model for one document, written from its equations: fp64, loops, S x S matrices.

`logits(config, parameters, tokens)` shares no code with the model but the names of its parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.daria_former.config import DariaFormerConfig


class _Scope:
    """Parameters below a name, in fp64."""

    def __init__(self, parameters: dict[str, Tensor], prefix: str = "") -> None:
        self.parameters, self.prefix = parameters, prefix

    def __call__(self, name: str) -> Tensor:
        return self.parameters[self.prefix + name].double()

    def has(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.parameters)

    def below(self, name: str) -> _Scope:
        return _Scope(self.parameters, f"{self.prefix}{name}.")


def logits(
    config: DariaFormerConfig,
    parameters: dict[str, Tensor],
    tokens: Tensor,
    *,
    modality: Tensor | None = None,
    persona: Tensor | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """Logits [s, V] of one document `tokens` [s]; `initial` [E]: the emotion state before it."""
    p = _Scope(parameters)
    e = p.below("embedding")
    x = e("tokens.weight")[tokens]
    router, priors = e.below("router"), x.new_zeros(len(x), 1)
    if router.has("weight"):
        priors = _rms(x, router("norm.weight"), config) @ router("weight").T + router("bias")
    emotion = _site(config, e.below("emotion"), x, None, initial)
    bank = {}
    if config.has("memory") and config.persistent_memory_slots:
        bank["keys"], bank["values"] = e("persistent").chunk(2)
    if config.has("persona"):
        vector = e("persona") if persona is None else persona.double()
        bank["persona"] = e("persona_slots") + e("persona_projection") @ vector
    for i in range(config.num_layers):
        b = p.below(f"block_{i}")
        n = _adaptive(config, b.below("attention_norm"), x, emotion)
        a = _attention(config, b.below("attention"), n, priors, bank, modality)
        a = a * (1 + torch.tanh(emotion @ b("attention_scale").T))
        n = _adaptive(config, b.below("ffn_norm"), x + a, emotion)
        f = _ffn(config, b.below("ffn"), n, emotion)
        stacked = torch.cat((a, f, _rms(x, None, config)), dim=-1)
        g = 2 * torch.softmax(stacked @ b("fusion.gate").T + b("fusion.bias"), dim=-1)
        u = g[:, :1] * a + g[:, 1:2] * f + g[:, 2:] * _rms(x, None, config)
        x = x + _rhythm(config, b.below("rhythm"), u) * u
        if b.has("emotion."):
            emotion = _site(config, b.below("emotion"), x, emotion)
    h = p.below("head")
    mood = torch.softmax(emotion @ h("category").T, dim=-1)
    y = _rms(x, h("norm.weight"), config) + emotion @ h("style").T + mood @ h("category_style").T
    r = h.below("rhythm")
    need = torch.sigmoid(y @ r("need").T)
    y = y + 0.1 * (y @ r("down").T @ r("up").T) * (r("scale") * need + r("bias"))
    name = "embedding.tokens.weight" if config.weight_tying else "head.output.weight"
    return (y @ p(name).T) / (1 + 0.5 * torch.tanh(emotion @ h("temperature").T))


def _rms(x: Tensor, weight: Tensor | None, config: DariaFormerConfig) -> Tensor:
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
    return y if weight is None else y * weight


def _adaptive(config: DariaFormerConfig, p: _Scope, x: Tensor, emotion: Tensor) -> Tensor:
    if config.norm_type == "rms":
        y = _rms(x, p("weight"), config)
    else:
        y = F.layer_norm(x, x.shape[-1:], p("weight"), p("bias"), config.norm_eps)
    return y * (1 + emotion @ p("scale").T) + emotion @ p("shift").T


def _site(
    config: DariaFormerConfig,
    p: _Scope,
    x: Tensor,
    previous: Tensor | None,
    initial: Tensor | None = None,
) -> Tensor:
    gates = _rms(x, p("norm.weight"), config) @ p("input").T
    gates = gates + torch.cat((p("write_bias"), p("bias")))
    if previous is not None:
        gates = gates + previous @ p("previous").T
    size, states = config.emotion_dim, []
    state = x.new_zeros(size) if initial is None else initial.double()
    for row in gates:
        if config.esv_mode == "mingru":
            z, c = torch.sigmoid(row[:size]), torch.tanh(row[size:])
        else:
            own = p("recurrent") @ state
            z, r = torch.sigmoid((row + own)[: 2 * size]).split(size)
            c = torch.tanh(row[2 * size :] + r * own[2 * size :])
        state = (1 - z) * state + z * c
        states.append(state)
    return torch.stack(states)


def _ffn(config: DariaFormerConfig, p: _Scope, x: Tensor, emotion: Tensor) -> Tensor:
    mood = emotion @ p("emotion").T + p("emotion_bias")
    up = x @ p("up_proj.weight").T
    if config.ffn_activation == "swiglu":
        inner = F.silu(x @ p("gate_proj.weight").T + mood) * up
    else:
        inner = {"gelu": F.gelu, "relu": F.relu}[config.ffn_activation](up + mood)
    return inner @ p("down_proj.weight").T


def _rhythm(config: DariaFormerConfig, p: _Scope, u: Tensor) -> Tensor:
    mean, spread = u.mean(-1, keepdim=True), u.var(-1, keepdim=True, correction=0).log1p()
    inner = _rms(u, None, config) @ p("down").T
    inner = inner + torch.cat((mean, spread), dim=-1) @ p("statistics").T
    if config.rhythm_rank:
        inner = inner @ p("up").T
    return 2 * torch.sigmoid(inner + p("bias"))


def _attention(
    config: DariaFormerConfig,
    p: _Scope,
    x: Tensor,
    priors: Tensor,
    bank: dict[str, Tensor],
    modality: Tensor | None,
) -> Tensor:
    names = config.all_paths
    logits = x.new_zeros(len(x), config.num_heads, len(names))
    if p.has("gate.weight"):
        logits = (x @ p("gate.weight").T).unflatten(-1, (-1, len(names))) + p("gate_bias")
        logits = logits + priors[:, None, : len(names)]
    if "modality" in names and modality is None:
        logits[..., names.index("modality")] = -math.inf
    gates = logits.softmax(-1) if config.gate_type == "softmax" else logits.sigmoid()
    shared = _heads(config, x @ p("q_proj.weight").T)
    mixed = torch.zeros_like(shared)
    for i, name in enumerate(names):
        path = p.below(f"paths.{name}")
        q = shared * path("query_gain")
        if name in ("local", "long"):
            out = _over_tokens(config, path, name, q, x)
        elif name == "memory":
            out = _memory(config, path, q, x, priors[:, -1], bank)
        else:
            source = bank["persona"] if name == "persona" else modality
            source = x.new_zeros((0, x.shape[1])) if source is None else source.double()
            k, v = _keys_values(config, path, source, source)
            out = torch.stack([_read(config, q[t], k, v, empty=True) for t in range(len(x))])
        mixed = mixed + gates[:, :, i : i + 1] * path("output_gain") * _rms(out, None, config)
    return mixed.flatten(1) @ p("o_proj.weight").T


def _heads(config: DariaFormerConfig, x: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, config.head_size))
    return _rms(x, None, config) if config.qk_norm else x


def _keys_values(
    config: DariaFormerConfig, p: _Scope, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """[m, g, d] each."""
    k = _heads(config, keys @ p("k_proj.weight").T) * p("key_gain")
    return k, (values @ p("v_proj.weight").T).unflatten(-1, (-1, config.head_size))


def _read(
    config: DariaFormerConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    empty: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one token: q [n, d], k and v [m, g, d], bias [m, g]; [n, d]."""
    group = config.num_heads // config.num_kv_heads
    rows = []
    for head in range(config.num_heads):
        scores = k[:, head // group] @ q[head] / math.sqrt(config.head_size)
        if bias is not None:
            scores = scores + bias[:, head // group]
        values = v[:, head // group]
        if empty:
            scores = torch.cat((scores, scores.new_zeros(1)))
            values = torch.cat((values, values.new_zeros(1, values.shape[1])))
        rows.append(scores.softmax(0) @ values)
    return torch.stack(rows)


def _over_tokens(config: DariaFormerConfig, p: _Scope, name: str, q: Tensor, x: Tensor) -> Tensor:
    base = config.rope_base if name == "local" else config.rope_base_long
    base *= config.rope_scaling_factor ** (config.head_size / (config.head_size - 2))
    k, v = _keys_values(config, p, x, x)
    out = []
    for t in range(len(x)):
        first = max(0, t + 1 - config.sliding_window_size) if name == "local" else 0
        keys = torch.stack([_turned(k[j], j, base) for j in range(first, t + 1)])
        values = v[first : t + 1]
        if name == "long" and p.has("sinks"):
            sinks = p("sinks").transpose(0, 2)  # [G, 2, g, d]
            keys, values = torch.cat((sinks[:, 0], keys)), torch.cat((sinks[:, 1], values))
        out.append(_read(config, _turned(q[t], t, base), keys, values, empty=False))
    return torch.stack(out)


def _turned(x: Tensor, position: int, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = position / base ** (torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _memory(
    config: DariaFormerConfig,
    p: _Scope,
    q: Tensor,
    x: Tensor,
    worth: Tensor,
    bank: dict[str, Tensor],
) -> Tensor:
    k, v = _keys_values(config, p, x, x)
    anchors = x @ p("anchor.weight").T + p("segment_gain") * torch.sigmoid(worth).unsqueeze(-1)
    group = config.num_heads // config.num_kv_heads
    out = []
    for t in range(len(x)):
        start = t // config.segment_len * config.segment_len
        slots = []
        for stride, most in (
            (config.working_stride, config.working_memory_slots),
            (config.episodic_stride, config.episodic_memory_slots),
        ):
            complete = range(0, start - start % stride, stride)
            for first in list(complete)[-most:]:
                span = slice(first, first + stride)
                w = anchors[span].softmax(0).unsqueeze(-1)
                slots.append(((w * k[span]).sum(0), (w * v[span]).sum(0)))
        if "keys" in bank:
            slots += list(zip(*_keys_values(config, p, bank["keys"], bank["values"]), strict=True))
        if not slots:
            out.append(torch.zeros_like(q[t]))
            continue
        keys, values = (torch.stack(parts) for parts in zip(*slots, strict=True))
        if start == 0:
            query = p("initial_query") if p.has("initial_query") else q.new_zeros(keys.shape[1:])
        else:
            query = q[start - config.segment_len : start].mean(0).unflatten(0, (-1, group)).mean(1)
        rho = (keys * query).sum(-1) / math.sqrt(config.head_size)  # [m, g]
        rows = []
        for g in range(config.num_kv_heads):
            best = rho[:, g].topk(min(config.memory_top_k, len(slots))).indices
            bias = (rho[best, g] - rho[best, g].max()).clamp(min=-30)
            for head in range(g * group, (g + 1) * group):
                scores = keys[best, g] @ q[t, head] / math.sqrt(config.head_size) + bias
                w = torch.cat((scores, scores.new_zeros(1))).softmax(0)[:-1]
                rows.append(w @ values[best, g])
        out.append(torch.stack(rows))
    return torch.stack(out)
