"""A model configuration from settings, or from a YAML file of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from models.common.config import first_problem
from parallel.checkpoint.errors import brief

Config = TypeVar("Config", bound=BaseModel)


def checked_settings(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration with these settings.

    Raises:
        ValueError: the first setting that is unknown or out of range, in one line.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def read_settings(path: Path, config_class: type[Config]) -> Config:
    """The configuration that a YAML file of settings describes.

    Raises:
        ValueError: not YAML, or the first setting that is unknown or out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = brief(error)
        raise ValueError(f"{path} is not a YAML file of settings: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; write lines such as `num_layers: 12`")
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        where = f"{path}: {key}={first['input']!r}" if key else str(path)
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
