"""From a named YAML file, its groups and the overrides of a command line to a RunConfig."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_tools.errors import cwd_hint
from pretrain.config.compat.aliases import ALIASES
from pretrain.config.errors import nearest, show
from pretrain.config.input_checks import MAX_TEXT, check_override, read_run_file
from pretrain.config.schema import RunConfig, parse_config
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS

_KEY = re.compile(r"\w[\w/-]*(\.[\w-]+)*")


class _Source(NamedTuple):
    """A run file, and the directories in which its groups are looked up."""

    file: Path
    search: tuple[Path, ...]


def compose_config(
    config_name: str, *, config_dir: str | Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Read `config_name`.yaml with Hydra's composition and check it against the schema.

    Run files and groups are looked up in `config_dir` first, then in the configs of the project.
    An override is `section.key=value` for any setting, or `group=option` to choose a file of a
    group; Hydra's prefixes `+`, `++` and `~` work as well.

    Raises:
        ConfigError: a file, key or value that cannot be used; one line.
    """
    for override in overrides:  # first: other messages show what they are about
        check_override(override)
    source = _find(config_name, _search_path(config_dir))
    values = _compose(source, [_translate(each, source.search) for each in overrides])
    _drop_overruled(values, {each.partition("=")[0].lstrip("+~") for each in overrides})
    return parse_config(values)


def _drop_overruled(values: dict[str, Any], given: set[str]) -> None:
    """A setting on the command line wins over the same one in a file, also in another spelling."""
    for owner in {alias.owner for alias in ALIASES.values()}:
        spellings = {owner, *(name for name, alias in ALIASES.items() if alias.owner == owner)}
        for name in spellings - given if spellings & given else ():
            section, _, key = name.partition(".")
            if isinstance(values.get(section), dict):
                values[section].pop(key, None)


def _search_path(config_dir: str | Path | None) -> tuple[Path, ...]:
    if config_dir is None:
        return (CONFIGS,)
    directory = Path(config_dir).resolve()
    if not directory.is_dir():
        where = cwd_hint(config_dir)
        raise ConfigError(f"--config-dir {str(config_dir)!r} is not a directory{where}; correct it")
    # Hydra opens the files of groups itself; those of the project need no check.
    for pattern in ("*/*.yaml", "*/*/*.yaml"):
        for file in sorted(directory.glob(pattern)):
            _read(file)
    return (directory, CONFIGS)


def _find(config_name: str, search: tuple[Path, ...]) -> _Source:
    name = config_name.removesuffix(".yaml")
    for directory in search:
        file = directory / f"{name}.yaml"
        if file.is_file():
            return _Source(file, search)
    known = sorted({file.stem for directory in search for file in directory.glob("*.yaml")})
    guess = nearest(name, known)
    remedy = f"did you mean {guess!r}?" if guess else f"known are {', '.join(known) or 'none'}"
    where = " or ".join(str(directory) for directory in search)
    raise ConfigError(f"--config-name {config_name!r} is not a run file in {where}; {remedy}")


def _read(file: Path) -> str:
    try:
        return read_run_file(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}; correct it") from error


def _translate(override: str, search: tuple[Path, ...]) -> str:
    """Our override as Hydra's, where a key or group that the run file lacks has a prefix."""
    key, equals, value = override.partition("=")
    if len(override) > MAX_TEXT:
        raise ConfigError(f"override {show(override)} is longer than {MAX_TEXT}; use a run file")
    bare = key.lstrip("+~")
    if bare == "hydra" or bare.startswith("hydra."):
        raise ConfigError(
            f"override {show(override)} has no effect: Hydra only composes here; drop it"
        )
    if not _KEY.fullmatch(bare):
        raise ConfigError(
            f"override {show(override)} is not of the form section.key=VALUE; correct it"
        )
    if not equals and not key.startswith("~"):
        raise ConfigError(f"override {show(override)} has no value; write {key}=VALUE")
    if _is_group_choice(bare, value, search):
        options = _options(bare, search)
        if value.removesuffix(".yaml") not in options and not key.startswith("~"):
            raise ConfigError(_no_option(bare, value, options))
    elif bare == key and "/" not in key:
        override = f"++{override}"
    _check_grammar(override, key, value)
    return override


def _check_grammar(override: str, key: str, value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        sweep = OverridesParser.create().parse_override(override).is_sweep_override()
    except (HydraException, RecursionError) as error:
        raise ConfigError(
            f"the value of override {key}={value[:80]} cannot be parsed; "
            f"quote it for the shell and for the parser: '{key}=\"{value[:80]}\"'"
        ) from error
    if sweep:
        raise ConfigError(
            f"override {key}={value} has several values and a run has one; "
            f"write {key}=[{value}] for a list"
        )


def _is_group_choice(key: str, value: str, search: tuple[Path, ...]) -> bool:
    is_group = "." not in key and any((directory / key).is_dir() for directory in search)
    return is_group and not value.startswith(("{", "["))


def _options(group: str, search: tuple[Path, ...]) -> list[str]:
    """The files of a group as they are chosen, such as llama/125m of model."""
    roots = [directory / group for directory in search]
    files = {
        file.relative_to(root).with_suffix("") for root in roots for file in root.rglob("*.yaml")
    }
    return sorted(file.as_posix() for file in files)


def _no_option(group: str, option: str, options: list[str]) -> str:
    guess = nearest(option, options)
    remedy = f"did you mean {group}={guess}?" if guess else f"known are {', '.join(options)}"
    return f"{group}={option} is not a file of the group {group}; {remedy}"


def _compose(source: _Source, overrides: list[str]) -> dict[str, Any]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with tempfile.TemporaryDirectory() as entry:
        # Hydra prefers groups beside the run file to those of the search path. Alone in a
        # directory of its own, the run file leaves the order of ours as it is.
        try:
            text = _read(source.file)
            Path(entry, source.file.name).write_text(_defaults(text) + text, encoding="utf-8")
            return _run_hydra(entry, source, overrides)
        except (
            HydraException,
            OmegaConfBaseException,
            yaml.YAMLError,
            OSError,
            ValueError,
        ) as error:
            message = str(error).replace(entry, str(source.file.parent))
            raise ConfigError(_one_line(message, source)) from error


def _defaults(text: str) -> str:
    """What a run file that names a model type and nothing to go on from goes on from."""
    values = yaml.safe_load(text)
    if not isinstance(values, dict) or "model_type" not in values or "defaults" in values:
        return ""
    chosen = json.dumps({"override model_type": str(values["model_type"])})
    return f"defaults: [base, {chosen}, _self_]\n"


def _run_hydra(entry: str, source: _Source, overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException
    from omegaconf import OmegaConf

    where = ", ".join(_quoted(f"file://{directory}") for directory in source.search)
    with initialize_config_dir(entry, version_base="1.3"):
        for _ in range(len(overrides) + 1):
            try:
                config = compose(source.file.stem, [*overrides, f"hydra.searchpath=[{where}]"])
                break
            except ConfigCompositionException as error:
                # The run file chooses no option of this group: ours is the first.
                group = re.match(r"Could not override '([^']+)'\. No match", str(error))
                if group is None:
                    raise
                overrides = [f"+{o}" if o.startswith(f"{group[1]}=") else o for o in overrides]
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in dict(values).items()}


def _one_line(message: str, source: _Source) -> str:
    """The part of Hydra's, OmegaConf's or PyYAML's message that concerns the user."""
    message = re.split(r"\n\s*\n|\nSee https|\n\s*full_key", message)[0]
    missing = re.search(r"Could not find '([^'/]+)/([^']+)'", message)
    if missing:
        group, option = missing.groups()
        message = _no_option(group, option, _options(group, source.search))
    return f"{source.file}: {' '.join(message.split())}"


def _quoted(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"
