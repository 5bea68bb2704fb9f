"""Runs drawn at random: layouts and features, as command lines. No torch."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from models.registry import family_names, get_config_class
from pretrain.files import CONFIGS

_BASE = "demo"  # the run file that every draw changes
_ON = 0.35  # share of the draws in which a setting is not at its default

# Setting -> values to draw from; the config layer decides which of them fit together.
_LAYOUT: dict[str, Sequence[Any]] = {
    "parallel.tensor": (1, 2),
    "parallel.pipeline": (1, 1, 2, 2, 3, 4),
    "parallel.expert": (1, 1, 2),
    "parallel.sequence_parallel": (False, True),
    "training.batch_size": (1, 2),
    "training.gradient_accumulation_steps": (1, 2),
}
_FEATURES: dict[str, Sequence[Any]] = {
    "training.activation_recomputation": ("full",),
    "training.precision": ("bf16",),
    "training.z_loss": (0.01,),
    "training.logits_parts": (2, 8),
    "training.weight_decay": (0.0,),
    "training.grad_clip": (0.0,),
    "training.betas": ([0.0, 0.99], [0.9, 0.999]),
    "training.schedule": ("constant", "wsd"),
    "training.lr_multipliers": ({"block": 0.5}, {"layer": 3.0}, {"embedding": 0.1, "norm": 10.0}),
    "training.batch_ramp": ([{"until_tokens": 9000, "sequences_per_step": 2}],),
    "data.reset_at_documents": (True,),
    "data.kind": ("bytes",),
    "data.num_workers": (0,),
    "data.stages": (
        [{"until_step": 100, "sequence_length": 64}, {}],
        [{"until_step": 100, "sequence_length": 32}, {"sequence_length": 128}],
    ),
    "checkpoint.asynchronous": (True,),
    "model.num_experts": (4,),
    "model.experts_per_token": (1, 2),
    "model.lora_rank": (8,),
    "model.qkv_bias": (True,),
}
_ZERO: dict[str, Sequence[Any]] = {
    "stage": (0, 1, 1, 2, 3),
    "offload_optimizer": ({"device": "cpu"},),
    "offload_param": ({"device": "cpu"},),
    "overlap_comm": (True, False),
    "contiguous_gradients": (False,),
    "reduce_scatter": (False,),
    "stage3_param_persistence_threshold": (100,),
}


class Draw(NamedTuple):
    """A run as a command line: the family's size, overrides of the run file, DeepSpeed's JSON, and
    by how much the batch grows at the resume."""

    model: str
    overrides: tuple[tuple[str, Any], ...]
    zero: tuple[tuple[str, Any], ...]
    ranks: int
    resume_batch: int = 1

    @property
    def run_file(self) -> str:
        return _BASE

    @property
    def settings(self) -> list[str]:
        """Overrides of the run file."""
        return [f"model={self.model}", *(f"{key}={_text(value)}" for key, value in self.overrides)]

    @property
    def ds_config(self) -> str:
        """DeepSpeed's JSON, as text."""
        return json.dumps({"zero_optimization": dict(self.zero)})

    @property
    def line(self) -> str:
        """A line of a shell that repeats this run."""
        line = ["--config-name", _BASE, "--ranks", str(self.ranks), "--depth", "own"]
        line += ["--resume-batch", str(self.resume_batch)] * (self.resume_batch > 1)
        return "python -m pretrain.prove " + shlex.join(
            [*line, "--ds_config", self.ds_config, *self.settings]
        )

    def simpler(self) -> Iterator[Draw]:
        """The same run with one setting less, or on fewer ranks; layouts first."""
        for ranks in (1, 2):
            if ranks < self.ranks:
                yield self._replace(ranks=ranks)
        if self.resume_batch > 1:
            yield self._replace(resume_batch=1)
        for name in ("overrides", "zero"):
            settings = getattr(self, name)
            for number, (key, _) in enumerate(settings):
                if key != "stage":
                    left = settings[:number] + settings[number + 1 :]
                    yield self._replace(**{name: left})
        for number, (key, value) in enumerate(self.zero):
            if key == "stage" and value > 1:
                lower = (("stage", value - 1),)
                yield self._replace(zero=self.zero[:number] + lower + self.zero[number + 1 :])


def draws(seed: int, *, family: str | None = None) -> Iterator[Draw]:
    """An endless sequence of runs, the same for a seed."""
    dice = random.Random(seed)
    families = [family] if family else list(family_names())
    while True:
        name = dice.choice(families)
        overrides = {key: dice.choice(values) for key, values in _LAYOUT.items()}
        features = {key: dice.choice(values) for key, values in _FEATURES.items()}
        fields = get_config_class(name).model_fields
        features |= {key: dice.choice(values) for key, values in _switches(name).items()}
        on = _ON * dice.random()
        overrides |= {
            key: value
            for key, value in features.items()
            if dice.random() < on
            and (not key.startswith("model.") or key.removeprefix("model.") in fields)
        }
        overrides |= _required(overrides, fields)
        zero = {"stage": dice.choice(_ZERO["stage"])}
        zero |= {
            key: dice.choice(values)
            for key, values in _ZERO.items()
            if key != "stage" and dice.random() < on
        }
        ranks, resume_batch = dice.choice((1, 2, 4, 4)), dice.choice((1, 1, 2))
        yield Draw(_size(name), tuple(overrides.items()), tuple(zero.items()), ranks, resume_batch)


def _required(settings: Mapping[str, Any], fields: Container[str]) -> dict[str, Any]:
    """Settings that a drawn one cannot be without."""
    needed: dict[str, Any] = {}
    if settings.get("training.schedule") == "wsd":
        needed["training.decay_steps"] = 1
    if settings.get("training.schedule") == "constant":
        needed["training.min_lr_ratio"] = 0.1
    if settings.get("data.kind") == "bytes":
        needed["data.tokenizer"] = None
    if settings["parallel.expert"] > 1 and "num_experts" in fields:
        needed["model.num_experts"] = 4
    return needed


def _switches(family: str) -> dict[str, list[Any]]:
    """Every switch and choice of a family's configuration that is not at its default."""
    found: dict[str, list[Any]] = {}
    for name, field in get_config_class(family).model_fields.items():
        if field.annotation is bool:
            found[f"model.{name}"] = [not field.default]
        elif get_origin(field.annotation) is Literal:
            others = [x for x in get_args(field.annotation) if x != field.default]
            if others:
                found[f"model.{name}"] = others
    return found


def _size(family: str) -> str:
    """The smallest configuration of a family, by the size of its name in configs/model."""
    sizes = sorted((CONFIGS / "model" / family).glob("*.yaml"))
    names = [path.stem for path in sizes]
    return f"{family}/{'demo' if 'demo' in names else names[0]}"


def _text(value: Any) -> str:
    """A value as an override takes it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")
