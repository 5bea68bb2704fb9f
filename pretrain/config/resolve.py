"""Resolution of settings, layout and DeepSpeed JSON, once and before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pretrain.config.deepspeed import DeepSpeedSettings, resolve_ds_config
from pretrain.config.layout import RunLayout, check_layout
from pretrain.config.schema import RunConfig


class ResolvedRun(NamedTuple):
    """The settings of a run, its layout over the processes, and DeepSpeed's settings."""

    config: RunConfig
    layout: RunLayout
    ds_config: DeepSpeedSettings


def resolve_run(
    config: RunConfig, ds_config_path: str | Path | None, *, world_size: int
) -> ResolvedRun:
    """Check `config` for `world_size` processes; opens no data and imports no torch.

    Raises:
        ConfigError: see `check_layout` and `resolve_ds_config`.
    """
    layout = check_layout(config, world_size)
    ds_config = resolve_ds_config(ds_config_path, config, data_size=layout.data)
    return ResolvedRun(config, layout, ds_config)
