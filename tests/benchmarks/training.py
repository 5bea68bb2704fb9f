"""One training step of ours and of a plain loop over transformers' model of the same shape.

Ours is what a run executes: `pretrain.engine`, DeepSpeed, ZeRO-1, fused AdamW, clipping. Theirs is
the loop that anyone would write: forward, backward, clip_grad_norm_, fused AdamW, zero_grad.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_tools.batch import Batch
from models.base import ModelFamily
from pretrain.config import RunConfig, parse_config
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine import (
    Engine,
    RunPlan,
    build_context,
    build_engine,
    build_precision,
    check_model,
)

LEARNING_RATE = 3e-4


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


def start_engine(run: RunConfig, *, device: torch.device, ds_config: str | None = None) -> Engine:
    """The engine of `run` in this process (collective over the initialised process group)."""
    resolved = resolve_ds_config(ds_config, run, data_size=1)
    ctx = build_context(run, precision=build_precision(run), device=device)
    plan = RunPlan.of(run, resolved, ctx)
    check_model(plan)
    return build_engine(plan)


class OurStep(NamedTuple):
    """`Engine.train_step` over one micro-batch; returns the loss, which waits for the device."""

    engine: Engine

    def __call__(self, batch: Batch) -> float:
        result = self.engine.train_step(iter([batch]), learning_rate=LEARNING_RATE)
        return result.loss.item()


class TheirStep(NamedTuple):
    """The same step of a plain loop. With `autocast` weights stay fp32, as our master weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool

    def __call__(self, batch: Batch) -> float:
        device = next(self.model.parameters()).device
        tokens, labels = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.labels))
        context: Any = contextlib.nullcontext()
        if self.autocast:
            context = torch.autocast(device.type, torch.bfloat16)
        with context:
            # shift_labels: labels that are already shifted, as ours are
            loss = self.model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def transformers_step(
    family: ModelFamily, run: RunConfig, weights: nn.Module | None, *, dtype: torch.dtype
) -> TheirStep:
    """transformers' model of the run's shape, from the same weights where they are given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    contents = family.hf.to_config(run.model) | {"use_cache": False}
    config = AutoConfig.for_model(contents.pop("model_type"), **contents)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if weights is not None:
        names = family.hf.names(run.model)
        state = {names[name]: p.detach().to(dtype) for name, p in weights.named_parameters()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - set(family.hf.tied(run.model)):
            raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    return TheirStep(model, optimizer, run.training.precision != "fp32" and dtype.itemsize == 4)


def random_batch(run: RunConfig, *, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (run.training.batch_size, run.data.sequence_length + 1)
    stream: Tensor = torch.randint(run.model.vocab_size, shape, generator=generator)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None)
