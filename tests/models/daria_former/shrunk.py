"""The configured `tiny` size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from models.daria_former.config import DariaFormerConfig

_TINY = Path(__file__).parents[3] / "configs" / "model" / "daria_former" / "tiny.yaml"


def shrunk(**changes: Any) -> DariaFormerConfig:
    return DariaFormerConfig.from_dict(yaml.safe_load(_TINY.read_text()) | changes)
