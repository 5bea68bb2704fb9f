"""Models named by type and published size, or by a checkpoint.

    model_type=dtf model.base_model_name=Qwen/Qwen2.5-0.5B model.num_hidden_layers=6

stands for `model.family=dtf` and, where `model` does not say otherwise, the sizes of that model.
Weights come from `training.init_from` alone.

    model=checkpoint training.init_from=DIR

stands for the model of that checkpoint, where `model` does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import yaml

from parallel.checkpoint.manifest import load_manifest
from parallel.checkpoint.newest import find_manifest
from pretrain.config.errors import nearest, show
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS

CHECKPOINT = "checkpoint"
_NO_MODEL = "its manifest names no model; give the path of a checkpoint, a run or a converted model"
_NAMES = ("base_model_name", "pretrained_model_name")


def implied_defaults(settings: MutableMapping[Any, Any]) -> list[Any]:
    """The defaults list for a run file with `model_type` and no `defaults`; otherwise empty.

    `model_type` is removed from the settings and overrides that of configs/base.yaml.
    """
    if "model_type" not in settings:
        return []
    return ["/base", {"override model_type": settings.pop("model_type")}]


def resolve_model_type(values: dict[str, Any]) -> None:
    """Replace `model_type` by `model.family`.

    Raises:
        ConfigError: they differ.
    """
    model_type = values.pop("model_type", None)
    if model_type is None:
        return
    model = values.setdefault("model", {})
    if isinstance(model, dict) and model.setdefault("family", model_type) != model_type:
        raise ConfigError(
            f"model_type={show(model_type)} is another spelling of model.family, which is "
            f"{show(model['family'])}; remove one of them"
        )


def preset_of(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the name of a checkpoint or a base model in `model`; returns the settings it names.

    Raises:
        ConfigError: a name is unknown, or contradicts another setting.
    """
    model = values.get("model")
    if model == CHECKPOINT:
        model = values["model"] = {"family": CHECKPOINT}
    if not isinstance(model, dict):
        return {}
    preset: dict[str, Any] = {}
    if model.get("family") == CHECKPOINT:
        del model["family"]
        preset = _of_checkpoint(values.get("training"))
    names = {key: model.pop(key) for key in _NAMES if key in model}
    if names:
        preset = _sizes(names, model.get("family", preset.get("family"))) | preset
    return preset


def _of_checkpoint(training: Any) -> dict[str, Any]:
    """The model settings of the checkpoint at `training.init_from`."""
    path = training.get("init_from") if isinstance(training, Mapping) else None
    if not isinstance(path, str):
        raise ConfigError(
            f"model={CHECKPOINT} is the model of training.init_from, which is {show(path)}; set it "
            "to a checkpoint, a run or a converted model"
        )
    try:
        stored = load_manifest(find_manifest(Path(path))).config["model"]
        return {key: value for key, value in stored.items() if value != CHECKPOINT}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError | OSError) else _NO_MODEL
        raise ConfigError(f"training.init_from={path!r}: {' '.join(reason.split())}") from error


def _sizes(names: Mapping[str, Any], family: Any) -> dict[str, Any]:
    """The settings of the file in configs/model that belongs to a base model."""
    if len(set(names.values())) > 1:
        raise ConfigError(f"model.{' and model.'.join(names)} differ; remove one of them")
    key, name = next(iter(names.items()))
    known = _base_models()
    if name not in known:
        guess = nearest(str(name), known)
        remedy = f"did you mean {guess!r}?" if guess else f"known are {', '.join(known)}"
        if Path(str(name)).is_dir():
            remedy = (
                "to begin with the weights of a directory convert it with python -m models.convert "
                "from-hf, and set training.init_from and the name of the published model"
            )
        raise ConfigError(f"model.{key}={show(name)} is no base model; {remedy}")
    path = CONFIGS / "model" / str(family) / f"{known[name]}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"model.{key}={show(name)}: there are no such sizes of model.family={show(family)}; "
            "choose another model_type, or set the sizes one by one"
        )
    sizes: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return sizes


def _base_models() -> dict[str, str]:
    files = sorted((CONFIGS / "base_models").glob("*.yaml"))
    return {name: size for file in files for name, size in yaml.safe_load(file.read_text()).items()}
