"""Both families for one row, token by token, written from their equations: fp64, Python loops.

Shares no code with the models but the names of their parameters and the table of random numbers.
Routed layers are computed for one chosen token after the other, over an explicit list of the chosen
tokens that it may see; nothing is gathered or scattered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.scores import next_keys, random_scores

# (name of the layer, scores, predictor's logits, forced tokens) -> chosen tokens
Rule = Callable[[str, list[float], "list[float] | None", set[int]], set[int]]


class Row(NamedTuple):
    """`logits` [s, V]; `aux`: losses of the row, unweighted, summed over layers."""

    logits: Tensor
    aux: dict[str, Tensor]


class _Scope:
    """Parameters below a name, in fp64."""

    def __init__(self, parameters: dict[str, Tensor], prefix: str = "") -> None:
        self.parameters, self.prefix = parameters, prefix

    def __call__(self, name: str) -> Tensor:
        return self.parameters[self.prefix + name].double()

    def get(self, name: str, default: float) -> Any:
        return self(name) if self.prefix + name in self.parameters else default

    def below(self, name: str) -> _Scope:
        return _Scope(self.parameters, f"{self.prefix}{name}.")


def best(k: int) -> Rule:
    """The k best, forced ones first, of equal ones the earlier."""

    def choose(_: str, scores: list[float], __: Any, forced: set[int]) -> set[int]:
        order = sorted(range(len(scores)), key=lambda t: (t not in forced, -scores[t], t))
        return set(order[:k])

    return choose


def above(config: MoDConfig | DTFConfig, taus: dict[str, float]) -> Rule:
    """The causal rule of the configuration."""
    least = math.log(config.causal_threshold / (1 - config.causal_threshold))

    def choose(
        name: str, scores: list[float], logits: list[float] | None, forced: set[int]
    ) -> set[int]:
        values, limit = scores, least
        if config.causal_router == "threshold":
            limit = taus[name]
        elif config.causal_router == "predictor":
            assert logits is not None
            values = logits
        return {t for t, value in enumerate(values) if value > limit} | forced

    return choose


def row(
    config: MoDConfig | DTFConfig,
    parameters: dict[str, Tensor],
    tokens: Tensor,
    rule: Rule,
    documents: list[int] | None = None,
) -> Row:
    """One row `tokens` [s]; `documents`: the document of every token."""
    p = _Scope(parameters)
    where = _Where(config, tokens, documents or [0] * len(tokens))
    x = p("embedding.tokens.weight")[tokens]
    aux: dict[str, Tensor] = {}
    if isinstance(config, MoDConfig):
        for i in range(config.num_layers):
            layer = p.below(f"layer_{i}")
            if i % config.mod_every == config.mod_offset:
                x = _mod_layer(config, layer, x, rule, where, aux, i)
            else:
                x = x + _block(config, layer.below("block"), x, None, where)
    else:
        for i in range(config.num_layers // 2):
            x = _pair(config, p.below(f"pair_{i}"), x, rule, where, aux, i)
        if config.num_layers % 2:
            layer = p.below(f"layer_{config.num_layers - 1}")
            x = x + _block(config, layer.below("block"), x, None, where)
    x = _rms(x, p("head.norm.weight"), config)
    return Row(x @ p("head.output.weight").T, aux)


class _Where:
    """Positions and documents of the tokens of a row."""

    def __init__(self, config: Any, tokens: Tensor, documents: list[int]) -> None:
        self.config, self.tokens, self.documents = config, tokens, documents
        self.positions = [t - documents.index(d) for t, d in enumerate(documents)]
        self.forced = {t for t, q in enumerate(self.positions) if q == 0 and config.force_first}

    def random(self, number: int) -> Tensor:
        """The scores of routed layer `number` of the model."""
        keys = self.tokens[None]
        for _ in range(number):
            keys = next_keys(keys)
        return random_scores(keys, torch.tensor([self.positions]))[0].double()


def _mod_layer(
    config: MoDConfig, p: _Scope, x: Tensor, rule: Rule, where: _Where, aux: Any, layer: int
) -> Tensor:
    r = p.below("router")
    if config.router_score == "random":
        scores = where.random(layer // config.mod_every)
        gate = torch.ones_like(scores)
    else:
        scores = _linear(config, r, x)
        gate = scores if config.gate_fn == "raw" else torch.sigmoid(scores)
        if config.gate_fn == "st":
            gate = gate / gate.detach()
        _add(aux, "router_z_loss", (scores**2).mean())
    chosen = _choose(config, p, x, scores, rule, where, aux)
    delta = _block(config, p.below("dynamic.block"), x, chosen, where)
    return torch.stack([x[t] + gate[t] * delta[t] if t in chosen else x[t] for t in range(len(x))])


def _pair(
    config: DTFConfig, p: _Scope, x: Tensor, rule: Rule, where: _Where, aux: Any, pair: int
) -> Tensor:
    delta = _block(config, p.below("decision.block"), x, None, where)
    post, kind = x + delta, config.router_score
    expected = logvar = None
    if kind in ("vpr", "ce", "dch"):
        expected, logvar = _prior(config, p.below("decision"), x)
        _add(aux, "prior_loss", _prior_loss(config, delta.detach(), expected, logvar))
    if config.router_detach:
        cut = [None if e is None else e.detach() for e in (delta, expected, logvar)]
    else:
        cut = [delta, expected, logvar]
    static = (cut[0] ** 2).mean(-1)
    change = None if cut[1] is None else _error(cut[0], cut[1], cut[2])
    average = _average(config, static.detach(), where)
    norm = average + 1e-8 if config.surprise_norm == "ma" else torch.ones_like(average)
    if kind == "linear":
        scores = _linear(config, p.below("router"), post)
        gate = torch.sigmoid(scores)
        _add(aux, "router_z_loss", (scores**2).mean())
    elif kind == "random":
        scores = where.random(pair)
        gate = torch.ones_like(scores)
    elif kind in ("dst", "dch"):
        scores = (static if kind == "dst" else change) / norm
        gate = torch.ones_like(scores)
    else:
        scores, gate = _criteria(config, p.below("router.criteria"), static, change, average, norm)
    if config.gate_fn == "st" and kind not in ("random", "dst", "dch"):
        gate = gate / gate.detach()
    chosen = _choose(config, p, post, scores, rule, where, aux)
    second = _block(config, p.below("dynamic.block"), post, chosen, where)
    return torch.stack(
        [post[t] + gate[t] * second[t] if t in chosen else post[t] for t in range(len(x))]
    )


def _criteria(
    config: DTFConfig, p: _Scope, static: Tensor, change: Any, average: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    skipped, score = torch.ones_like(static), torch.zeros_like(static)  # 1 - G, and the score
    if config.router_score in ("vpr", "ce"):
        offset = p.get("log_o_ce", math.log(config.ce_criterion_offset_init))
        a = torch.log1p(p("beta_ce").exp()) * ((static - change) / norm + offset)
        skipped, score = skipped * torch.sigmoid(-a), score + F.softplus(a)
    if config.router_score in ("vpr", "cu"):
        multiplier = p.get("m_cu", config.cu_detection_multiplier_init)
        b = torch.log1p(p("beta_cu").exp()) * ((static - multiplier * average) / norm)
        skipped, score = skipped * torch.sigmoid(-b), score + F.softplus(b)
    return score, 1 - skipped


def _average(config: DTFConfig, static: Tensor, where: _Where) -> Tensor:
    values = []
    for t, d in enumerate(where.documents):
        start = where.documents.index(d)
        if config.ma_skip_first and t > start:
            start += 1
        window = [static[max(j, start)] for j in range(t - config.ma_window + 1, t + 1)]
        values.append(torch.stack(window).sum() / config.ma_window)
    return torch.stack(values)


def _prior(config: DTFConfig, p: _Scope, x: Tensor) -> tuple[Tensor, Tensor | None]:
    n = _rms(x.detach() if config.prior_detach_input else x, p("prior_norm.weight"), config)
    u = n @ p("prior.up.weight").T + p("prior.up.bias")
    if config.prior_type == "swiglu":
        u = F.silu(n @ p("prior.gate.weight").T + p("prior.gate.bias")) * u
    else:
        u = F.silu(u)
    y = u @ p("prior.down.weight").T + p("prior.down.bias")
    h = config.hidden_size
    return (y, None) if config.surprise == "mse" else (y[:, :h], y[:, h:].clamp(-10, 10))


def _error(delta: Tensor, expected: Tensor, logvar: Tensor | None) -> Tensor:
    if logvar is None:
        return ((delta - expected) ** 2).mean(-1)
    return 0.5 * (logvar + ((delta - expected) ** 2 + 1) / logvar.exp()).mean(-1)


def _prior_loss(config: DTFConfig, delta: Tensor, expected: Tensor, logvar: Any) -> Tensor:
    error = _error(delta, expected, logvar)
    if config.prior_loss == "mse" or logvar is not None:
        return error.mean()
    return error.sum() / (delta**2).mean(-1).sum()


def _linear(config: Any, p: _Scope, x: Tensor) -> Tensor:
    u = x if config.router_input == "raw" else _rms(x, None, config)
    return u @ p("score.weight")


def _choose(
    config: Any, p: _Scope, x: Tensor, scores: Tensor, rule: Rule, where: _Where, aux: Any
) -> set[int]:
    logits = None
    if config.causal_router == "predictor":
        choice = p.below("router.choice.predictor")
        logits = F.silu(x.detach() @ choice("up").T) @ choice("down")[0]
    name = p.prefix + "router.choice.tokens.threshold.tau"
    listed = None if logits is None else logits.tolist()
    chosen = rule(name, scores.tolist(), listed, where.forced)
    if config.causal_router == "aux":
        logits = scores
    if logits is not None:
        targets = [1.0 if t in chosen else 0.0 for t in range(len(x))]
        losses = [-F.logsigmoid(v if y else -v) for v, y in zip(logits, targets, strict=True)]
        _add(aux, "router_loss", torch.stack(losses).mean())
    return chosen


def _block(
    config: Any, p: _Scope, x: Tensor, chosen: set[int] | None, where: _Where
) -> dict[int, Tensor] | Tensor:
    """What the block adds to the chosen tokens, by token; None: to all, [s, h]."""
    computed = sorted(range(len(x)) if chosen is None else chosen)
    n = _rms(x, p("attention_norm.weight"), config)
    q, k, v = (_project(config, p.below("attention"), kind, n, where) for kind in "qkv")
    deltas = {}
    for i in computed:
        seen = [j for j in computed if j <= i and where.documents[j] == where.documents[i]]
        a = _attend(q[i], k[seen], v[seen]) @ p("attention.output.weight").T
        m = _rms(x[i] + a, p("mlp_norm.weight"), config)
        gate, up = (m @ p(f"mlp.{kind}.weight").T for kind in ("gate", "up"))
        deltas[i] = a + (F.silu(gate) * up) @ p("mlp.down.weight").T
    return deltas if chosen is not None else torch.stack([deltas[i] for i in computed])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query [n, d] over keys and values [j, g, d] -> [n d]."""
    heads = []
    for head in range(q.shape[0]):
        group = head * k.shape[1] // q.shape[0]
        scores = k[:, group] @ q[head] / math.sqrt(q.shape[1])
        heads.append(scores.softmax(0) @ v[:, group])
    return torch.cat(heads)


def _project(config: Any, p: _Scope, kind: str, n: Tensor, where: _Where) -> Tensor:
    name = {"q": "query", "k": "key", "v": "value"}[kind]
    y = n @ p(f"{name}.weight").T + p.get(f"{name}.bias", 0.0)
    y = y.unflatten(-1, (-1, config.head_size))
    if kind == "v":
        return y
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.tensor(where.positions, dtype=torch.float64)[:, None, None] * frequencies
    first, second = y[..., :half], y[..., half:]
    return torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        -1,
    )


def _rms(x: Tensor, weight: Tensor | None, config: Any) -> Tensor:
    y = x / ((x**2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    return y if weight is None else y * weight


def _add(aux: dict[str, Tensor], name: str, value: Tensor) -> None:
    aux[name] = aux.get(name, torch.zeros((), dtype=torch.float64)) + value
