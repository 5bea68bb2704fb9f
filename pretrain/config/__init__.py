"""The configuration of a run: schema, composition from YAML, layout, DeepSpeed's JSON. No torch."""

from pretrain.config.schema import RunConfig, parse_config, resolved, to_yaml
from pretrain.config.sections import LoggingConfig, WandbConfig
from pretrain.config.training import TrainingConfig
from pretrain.errors import ConfigError

__all__ = [
    "ConfigError",
    "LoggingConfig",
    "RunConfig",
    "TrainingConfig",
    "WandbConfig",
    "parse_config",
    "resolved",
    "to_yaml",
]
