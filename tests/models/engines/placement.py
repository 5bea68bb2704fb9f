"""Weights on other devices, and models built without weights, by accelerate."""

from __future__ import annotations

import warnings
from typing import Any

import accelerate
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.engines.exports import GREEDY, TOKENS, Engine, assert_near, logits_of


def _check(model: Any, engine: Engine) -> None:
    plain = engine.load()
    assert_near(logits_of(model), logits_of(plain))
    assert torch.equal(model.generate(TOKENS, **GREEDY), plain.generate(TOKENS, **GREEDY))


def disk_offload(engine: Engine) -> None:
    _check(engine.load(device_map={"": "disk"}, offload_folder=str(engine.folder)), engine)


def cpu_offload(engine: Engine) -> None:
    model = accelerate.cpu_offload(engine.load(), execution_device=torch.device("cpu"))
    _check(model, engine)


def empty_weights_and_dispatch(engine: Engine) -> None:
    config = AutoConfig.from_pretrained(engine.directory, trust_remote_code=True)
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.tie_weights()
    with warnings.catch_warnings(action="ignore"):
        model = accelerate.load_checkpoint_and_dispatch(
            model, str(engine.directory), device_map={"": "cpu"}
        )
    _check(model.eval(), engine)
