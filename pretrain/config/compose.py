"""Compose a RunConfig from a run file, the files that it builds on, and the command line.

A run file is YAML with a `defaults` list (`pretrain.config.defaults`); a command line has overrides
(`pretrain.config.overrides`). `group=option` replaces the option that files choose; if they
choose none, it is applied after all of them. Settings are then overridden in the order given, and
finally `${section.key}` and OmegaConf's other interpolations are resolved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.defaults import DefaultsTree
from pretrain.config.input_checks import check_override
from pretrain.config.overrides import Override, parse_override
from pretrain.config.schema import RunConfig, parse_config
from pretrain.config.search_path import SearchPath
from pretrain.errors import ConfigError


def compose_config(
    config_name: str, *, config_dir: str | Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Compose the run file `config_name`.yaml with `overrides` and check it against the schema.

    Run files and groups are looked up in `config_dir` first, then in the configs of the project.

    Raises:
        ConfigError: a file, key or value that cannot be used; one line.
    """
    for override in overrides:  # first, because other messages show the override
        check_override(override)
    search = SearchPath(config_dir)
    run_file = search.run_file(config_name)
    arguments = [parse_override(override) for override in overrides]
    choices = {each.key: _option(each, search) for each in arguments if _is_choice(each, search)}
    tree = DefaultsTree(run_file, choices, search)
    config = OmegaConf.merge(*tree.parts)
    for each in arguments:
        if not _is_choice(each, search) or (each.removes and each.key not in tree.options):
            _apply(each, config, run_file)
    values = _resolve(config, run_file)
    return parse_config(values, given={each.key for each in arguments})


def _is_choice(override: Override, search: SearchPath) -> bool:
    """Whether an override chooses an option of a group rather than setting a whole section."""
    return search.is_group(override.key) and not isinstance(override.value, dict | list)


def _option(override: Override, search: SearchPath) -> str | None:
    """The option that an override chooses; None if it removes the group."""
    if override.removes:
        return None
    search.option(override.key, override.text)
    return override.text


def _apply(override: Override, config: DictConfig, run_file: Path) -> None:
    try:
        if not override.removes:
            OmegaConf.update(config, override.key, override.value, merge=True, force_add=True)
            return
        parent, _, name = override.key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if isinstance(section, DictConfig) and name in list(section):
            del section[name]
            return
    except (OmegaConfBaseException, ValueError) as error:
        raise _error(error, f"override of {override.key}") from error
    raise ConfigError(
        f"override ~{override.key}: {override.key} does not exist in {run_file}; drop the override"
    )


def _resolve(config: DictConfig, run_file: Path) -> dict[str, Any]:
    """The configuration as plain values."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise _error(error, str(run_file)) from error
    return {str(key): value for key, value in values.items()}


def _error(error: Exception, where: str) -> ConfigError:
    """Convert OmegaConf's error, whose first line is the reason."""
    key = getattr(error, "full_key", None)
    reason = str(error).partition("\n")[0]
    return ConfigError(f"{where}: {f'{key}: ' if key else ''}{reason}; correct it")
