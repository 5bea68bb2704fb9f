"""Settings of a model from a YAML file. No torch."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from models.daria_former.config import DariaFormerConfig


def read_config(path: Path) -> DariaFormerConfig:
    """A YAML file of settings.

    Raises:
        ValueError: not YAML, or the first setting that is unknown or out of its range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is not a YAML file of settings: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; write lines such as `num_layers: 12`")
    try:
        return DariaFormerConfig.from_dict(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        where = f"{path}: {key}={first['input']!r}" if key else str(path)
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
