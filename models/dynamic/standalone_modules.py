"""Parts of both families as standalone modules, in one process.

Each wraps a part of a real layer and is built from the configuration alone, with hidden states
[b, s, h] in and out; a row is one document. Together they compute the whole layer:

    decision = DTFDecisionLayer(config)(hidden)
    hidden = DTFDynamicLayer(config)(decision.posterior, DTFRouter(config)(decision))

Shapes: b batch, s sequence, h hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.dynamic import layers, pair, surprise
from models.dynamic.block import TokenPositions
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.model import dtf_layer_specs, mod_layer_specs
from models.dynamic.token_gather import Selection
from parallel.carry import LayerSpec, build_layers
from parallel.context import ParallelContext


class DecisionOutput(NamedTuple):
    """Output of a decision layer for every token, [b, s, h].

    `original`: its input. `posterior`: input plus the block's update. `prior`: input plus the
    predicted update, None if the router needs no prior. `prior_loss`: the prior's error, a mean
    over rows. `update`, `expected`: the updates themselves, [s, b, h], which sums in bf16 round.
    """

    original: Tensor
    posterior: Tensor
    prior: Tensor | None
    prior_loss: Tensor | None
    update: Tensor
    expected: surprise.PriorPrediction | None


class RouterOutput(NamedTuple):
    """`scores`, `gate`: fp32 [b, s]. `selection`: the tokens to compute. `losses`: of the router
    and measurements, in training: means over rows."""

    scores: Tensor
    gate: Tensor
    selection: Selection
    losses: dict[str, Tensor]

    @property
    def chosen(self) -> Tensor:
        """The tokens to compute: bool [b, s]."""
        indices, valid = self.selection.indices, self.selection.valid
        there = torch.ones_like(indices, dtype=torch.bool) if valid is None else valid
        return torch.zeros_like(self.scores, dtype=torch.bool).scatter(1, indices, there)


class DTFDecisionLayer(nn.Module):
    """A block for every token, and a small prior that predicts its update."""

    def __init__(self, config: DTFConfig) -> None:
        super().__init__()
        self.config = config
        self.layer: pair.DecisionBlock = _pair(config).decision

    def forward(self, hidden_states: Tensor) -> DecisionOutput:
        x = hidden_states.transpose(0, 1)
        update, expected, _ = self.layer(x, None, None)
        posterior = (x + update).transpose(0, 1)
        if expected is None:
            return DecisionOutput(hidden_states, posterior, None, None, update, None)
        loss = surprise.prior_loss(
            update, expected, normalised=self.config.prior_loss == "nmse", ctx=_single_process(x)
        )
        prior = hidden_states + expected.mean.transpose(0, 1)
        return DecisionOutput(hidden_states, posterior, prior, loss.mean(), update, expected)


class DTFRouter(nn.Module):
    """A router that scores tokens by their surprise and selects among them."""

    def __init__(self, config: DTFConfig) -> None:
        super().__init__()
        self.config = config
        self.layer: surprise.SurpriseRouter = _pair(config).router

    def forward(self, decision: DecisionOutput, tokens: Tensor | None = None) -> RouterOutput:
        """`tokens` int64 [b, s] with router_score=random."""
        posterior, ctx = decision.posterior.transpose(0, 1), _single_process(decision.posterior)
        token_positions = _token_positions(decision.posterior)
        numbers = None
        if self.config.router_score == "random":
            numbers = self.layer.random_numbers(_required(tokens), token_positions)
        surprises = pair.surprise_of(
            decision.update, decision.expected, token_positions, self.config, ctx=ctx
        )
        router_scores, means = self.layer.score_tokens(posterior, surprises, numbers)
        forced = token_positions.document_starts if self.config.force_first else None
        selection, losses = self.layer.choice(posterior, router_scores, forced)
        return RouterOutput(
            router_scores.scores.T, router_scores.gate.T, selection, _means(losses | means)
        )


class DTFDynamicLayer(nn.Module):
    """A block applied to the tokens chosen by a router; the others are unchanged."""

    def __init__(self, config: DTFConfig) -> None:
        super().__init__()
        self.layer: layers.RoutedBlock = _pair(config).dynamic

    def forward(self, posterior: Tensor, routed: RouterOutput) -> Tensor:
        return _apply_block(self.layer, posterior, routed)


class PriorFFN(nn.Module):
    """The prior: predicts a decision layer's update of [b, s, h]; initially 0."""

    def __init__(self, config: DTFConfig) -> None:
        super().__init__()
        prior = _pair(config).decision.prior
        if prior is None:
            raise ValueError(f"router_score={config.router_score} has no prior; choose vpr or ce")
        self.layer: surprise.PriorNetwork = prior

    def forward(self, hidden_states: Tensor) -> Tensor:
        expected: surprise.PriorPrediction = self.layer(hidden_states)
        return expected.mean


class MoDRouter(nn.Module):
    """A router that scores tokens along a learned direction and selects among them."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        self.config = config
        self.layer: layers.DepthRouter = _routed(config).router

    def forward(self, hidden_states: Tensor, tokens: Tensor | None = None) -> RouterOutput:
        """`tokens` int64 [b, s] with router_score=random."""
        x, token_positions = hidden_states.transpose(0, 1), _token_positions(hidden_states)
        if self.config.router_score == "random":
            tokens = _required(tokens)
        router_scores = self.layer.router_scores(x, tokens, token_positions)
        forced = token_positions.document_starts if self.config.force_first else None
        selection, losses = self.layer.choice(x, router_scores, forced)
        return RouterOutput(router_scores.scores.T, router_scores.gate.T, selection, _means(losses))


class MoDLayer(nn.Module):
    """A router and a block applied to the tokens that it chooses; the others are unchanged."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        self.router = MoDRouter(config)
        self.layer: layers.RoutedBlock = _routed(config).dynamic

    def forward(
        self, hidden_states: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """Hidden states [b, s, h], and the router's output."""
        routed = self.router(hidden_states, tokens)
        return _apply_block(self.layer, hidden_states, routed), routed


def _means(of_rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.mean() for name, values in of_rows.items()}


def _apply_block(layer: layers.RoutedBlock, x: Tensor, routed: RouterOutput) -> Tensor:
    y, _ = layer(x.transpose(0, 1), routed.gate.T, routed.selection, _token_positions(x))
    added: Tensor = y.transpose(0, 1)
    return added


def _pair(config: DTFConfig) -> Any:
    return _build_first(dtf_layer_specs(config), pair.DTFPair, config)


def _routed(config: MoDConfig) -> Any:
    return _build_first(mod_layer_specs(config), layers.RoutedLayer, config)


def _build_first(
    specs: list[LayerSpec], kind: type[nn.Module], config: DTFConfig | MoDConfig
) -> Any:
    """Build and initialise the first layer of class `kind`."""
    for spec in specs:
        if spec.module is kind:
            ctx = ParallelContext.single(device=torch.get_default_device())
            return build_layers([spec], ctx, seed=torch.initial_seed())[spec.name]
    raise ValueError(
        f"capacity_gamma={config.capacity_gamma} routes nothing, so the model has no routed layer; "
        "choose a value below 1"
    )


def _single_process(x: Tensor) -> ParallelContext:
    return ParallelContext.single(device=x.device)


def _token_positions(x: Tensor) -> TokenPositions:
    index = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    return TokenPositions(index.expand(x.shape[0], -1), packed=False)


def _required(tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError("router_score=random scores token ids: give tokens [b, s]")
    return tokens
