"""One training step of ours and of a plain loop over transformers' model of the same shape.

Ours is what a run executes: `pretrain.engine.engine`, DeepSpeed, ZeRO-1, fused AdamW, clipping.
Theirs is the loop that anyone would write: forward, backward, clip_grad_norm_, fused AdamW,
zero_grad.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.loading.batch import Batch
from models.base import HFMapping
from models.registry import get_family
from pretrain.config import RunConfig, parse_config
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine.build import build_engine
from pretrain.engine.engine import Engine
from pretrain.engine.phases import Phase
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision, check_model

LEARNING_RATE = 3e-4
ADAMW: dict[str, Any] = {
    "lr": LEARNING_RATE,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "fused": True,
}


def no_phase(name: str) -> AbstractContextManager[None]:
    """What a step enters around its phases unless they are measured."""
    return contextlib.nullcontext()


def run_config(
    model: Mapping[str, Any], *, seq_length: int, batch_size: int, **training: Any
) -> RunConfig:
    """A run whose data is never opened; `training` are settings of that section."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"family": "llama", **model},
            "data": {"train": "unused", "sequence_length": seq_length},
            "training": {
                "max_steps": 1000,
                "batch_size": batch_size,
                "lr": LEARNING_RATE,
                **training,
            },
        }
    )


def start_engine(
    config: RunConfig, *, device: torch.device, ds_config: str | None = None
) -> Engine:
    """The engine of `config` in this process (collective over the initialised process group)."""
    settings = resolve_ds_config(ds_config, config, data_size=1)
    ctx = build_context(config, precision=build_precision(config), device=device)
    spec = TrainSpec.of(config, settings, ctx)
    check_model(spec)
    return build_engine(spec)


class OurStep:
    """`Engine.train_step` over one micro-batch. The loss stays on the device."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def phase(self) -> Phase:
        """What is entered around each phase of a step."""
        return no_phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.engine.record_phases(phase)

    def __call__(self, batch: Batch) -> Tensor:
        return self.engine.train_step(iter([batch]), learning_rate=LEARNING_RATE).loss


class TheirStep:
    """The same step of a plain loop. Under autocast weights stay fp32, as our master weights."""

    def __init__(self, model: nn.Module, *, autocast: bool) -> None:
        self.model = model
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        self.phase: Phase = no_phase

    def __call__(self, batch: Batch) -> Tensor:
        with self.phase("data"):
            tokens, labels = (x.to(self.device, non_blocking=True) for x in batch[:2])
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        with self.phase("forward"), autocast:
            # shift_labels: labels that are already shifted, as ours are
            loss = self.model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def transformers_model(config: RunConfig, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' model of the run's shape, with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    contents = _hf_mapping(config).to_config(config.model) | {"use_cache": False}
    theirs = AutoConfig.for_model(contents.pop("model_type"), **contents)
    with device:
        model = AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa", dtype=dtype)
    return model.train()


def copy_weights(config: RunConfig, ours: nn.Module, theirs: nn.Module) -> None:
    """Give transformers' model the weights of ours.

    Raises:
        RuntimeError: a weight of either has no counterpart.
    """
    mapping = _hf_mapping(config)
    state = hf_weights(config, ours)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    if unexpected or set(missing) - set(mapping.tied(config.model)):
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")


def hf_weights(config: RunConfig, ours: nn.Module) -> dict[str, Tensor]:
    """The weights of ours by transformers' names, not copied."""
    names = _hf_mapping(config).names(config.model)
    return {names[name]: p.detach() for name, p in ours.named_parameters()}


def _hf_mapping(config: RunConfig) -> HFMapping:
    mapping = get_family(config.model.family).hf
    if mapping is None:
        raise ValueError(f"transformers has no model like {config.model.family}")
    return mapping


def random_batch(config: RunConfig, *, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.training.batch_size, config.data.sequence_length + 1)
    stream: Tensor = torch.randint(config.model.vocab_size, shape, generator=generator)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None)
