"""`training.logits_parts` takes effect in a head, or is refused."""

from __future__ import annotations

import pytest

from models.registry import family_names
from parallel.context import ParallelContext
from pretrain.config import ConfigError
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine.train_spec import TrainSpec, check_model
from tests.models.families import CASES
from tests.pretrain.tiny_run import tiny_run
from tests.refusals import assert_refused

_WHOLE = {"agiformer"}  # the 256 logits of a byte


def _check(data, family: str) -> None:
    model = CASES[family].config.model_dump()
    config = tiny_run(data, model=model, training__logits_parts=4)
    ds_config = resolve_ds_config(None, config, data_size=1)
    check_model(TrainSpec.of(config, ds_config, ParallelContext.single()))


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
