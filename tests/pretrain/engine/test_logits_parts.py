"""`training.logits_parts` takes effect in a head, or is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from models.base import LossOutput, TokenInputs
from models.common.decoder import LMHead
from models.registry import family_names
from parallel.carry import LayerSpec
from parallel.context import ParallelContext
from pretrain.config import ConfigError
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine.build import _after_each, _build_whole
from pretrain.engine.train_spec import TrainSpec, check_model
from tests.models.families import CASES
from tests.pretrain.tiny_run import tiny_run
from tests.refusals import assert_refused

_WHOLE = {"agiformer"}  # the 256 logits of a byte


def _spec(data, family: str, parts: int = 4) -> TrainSpec:
    model = CASES[family].config.model_dump()
    config = tiny_run(data, model=model, training__logits_parts=parts)
    ds_config = resolve_ds_config(None, config, data_size=1)
    return TrainSpec.of(config, ds_config, ParallelContext.single())


def _check(data, family: str) -> None:
    check_model(_spec(data, family))


class _Capped(LMHead):
    def forward(self, carry):
        return 30.0 * torch.tanh(super().forward(carry) / 30.0)


class _Method(nn.Module):
    """A head in which `output` is no layer."""

    def __init__(self, config, *, ctx):
        super().__init__()
        self.head = LMHead(config, ctx=ctx)

    def output(self, carry):
        return self.head(carry)

    forward = output


def _with_head(spec: TrainSpec, head: type[nn.Module]) -> TrainSpec:
    def layer_specs(config, *, segmented=False):
        own = spec.family.layer_specs(config, segmented=segmented)
        return [*own[:-1], LayerSpec("head", head, {"config": config}, recompute=False)]

    return spec._replace(family=dataclasses.replace(spec.family, layer_specs=layer_specs))


def _own_loss(output, labels, *, config, ctx, num_scored=None):
    loss = nn.functional.cross_entropy(output.flatten(0, 1), labels.T.flatten())
    return LossOutput(loss, {"lm_loss": loss.detach()})


@pytest.mark.parametrize("part", ["head", "loss"])
def test_a_head_or_loss_that_needs_the_logits_themselves_is_refused_with_parts(part, data):
    def spec(parts: int) -> TrainSpec:
        plain = _spec(data, "llama", parts)
        if part == "head":
            return _with_head(plain, _Capped)
        return plain._replace(family=dataclasses.replace(plain.family, loss=_own_loss))

    check_model(spec(1))
    with assert_refused(
        "training.logits_parts",
        value=4,
        constraint=("llama", "LogitsInParts"),
        remedy=("training.logits_parts=1", "parallel.cross_entropy"),
        error=ConfigError,
    ):
        check_model(spec(4))


def test_a_loss_that_asks_for_values_is_none_that_needs_the_logits_themselves(data):
    spec = _spec(data, "llama")

    def loss(output, labels, **kwargs):
        return spec.family.loss(output, labels.clamp(max=int(labels.max())), **kwargs)

    check_model(spec._replace(family=dataclasses.replace(spec.family, loss=loss)))


def test_a_head_may_use_the_name_of_the_layer_for_something_else(data):
    spec = _with_head(_spec(data, "llama", parts=1), _Method)
    check_model(spec)
    model = _build_whole(spec, _after_each(spec, None))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert model(TokenInputs(tokens)).shape == (8, 1, spec.config.model.vocab_size)


@pytest.mark.parametrize("family", sorted(set(family_names()) - _WHOLE))
def test_the_heads_of_these_families_leave_the_logits_to_the_loss(family, data):
    _check(data, family)


@pytest.mark.parametrize("family", sorted(_WHOLE))
def test_a_head_that_computes_its_logits_whole_is_refused(family, data):
    with assert_refused(
        "training.logits_parts",
        value=4,
        constraint=family,
        remedy="training.logits_parts=1",
        error=ConfigError,
    ):
        _check(data, family)
