"""The `defaults` list of a run file: the files that it builds on.

    defaults:
      - base                    # a file of the same folder; /NAME: a file of the configs folder
      - model: SIZE             # an option of a group: model/SIZE.yaml; null: none
      - override data: CORPUS   # the option of a group that an earlier entry leads to
      - _self_                  # this file's own settings; at the end if it is not in the list

Of two files that set the same setting the later one wins. A group that has the name of a section
holds settings of that section; any other group, such as `experiment`, holds whole sections and may
choose options itself.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.checkpoint.errors import one_line
from pretrain.config.compat.model_presets import implied_defaults
from pretrain.config.errors import show
from pretrain.config.input_checks import read_run_file
from pretrain.config.schema import RunConfig
from pretrain.config.search_path import SearchPath
from pretrain.errors import ConfigError

_SELF = "_self_"

Choices = Mapping[str, str | None]


class _Choice(NamedTuple):
    """An entry `group: option`. `replaces`: it is `override group: option`."""

    group: str
    option: str | None
    replaces: bool


class DefaultsTree:
    """All files reached from a run file and the options of a command line.

    `parts`: the settings of each file, the last one wins. `options`: group -> the option taken.

    Raises:
        ConfigError: a file cannot be read or found, or a group is chosen twice or never.
    """

    def __init__(self, run_file: Path, choices: Choices, search: SearchPath) -> None:
        replaced = dict(choices)
        while True:
            walk = _Walk(search, replaced)
            walk.add_file(run_file)
            for group, option in choices.items():
                if option is not None and group not in walk.options:
                    walk.add_option(group, option)
            if walk.replaced.keys() <= replaced.keys():
                break
            replaced = walk.replaced | replaced  # an `override` may be behind what it overrides
        for group in walk.replaced.keys() - walk.options.keys():
            raise ConfigError(
                f"{run_file}: `override {group}` has no option of {group} to replace; "
                f"write `{group}: {walk.replaced[group]}`"
            )
        self.parts = walk.parts
        self.options = walk.options


class _Walk:
    """One pass over the files, with `choices` replacing the options that they name.

    `replaced`: options of `override` entries; of several for one group the outermost wins.
    """

    def __init__(self, search: SearchPath, choices: Choices) -> None:
        self.parts: list[Any] = []
        self.options: dict[str, str | None] = {}
        self.replaced: dict[str, str | None] = {}
        self._search = search
        self._choices = choices
        self._open: list[Path] = []

    def add_file(self, file: Path, *, section: str | None = None, folder: str = "") -> None:
        """Add a file and the files its `defaults` name; `section`: the section it belongs to."""
        if file in self._open:
            raise ConfigError(f"{file}: `defaults` leads back to this file; remove an entry")
        settings = _read(file)
        entries = _entries(settings, file, is_section=section is not None)
        for entry in entries:  # before those of nested files: the outermost wins
            if isinstance(entry, _Choice) and entry.replaces:
                self.replaced.setdefault(entry.group, entry.option)
        self._open.append(file)
        for entry in entries:
            if isinstance(entry, _Choice):
                self._add_choice(entry, file)
            elif entry == _SELF:
                self.parts.append(settings if section is None else {section: settings})
            else:
                self._add_name(entry, file, section, folder)
        self._open.pop()

    def add_option(self, group: str, option: str | None, *, named_by: Path | None = None) -> None:
        """Add the file of an option, or of the choice that replaces it."""
        self.options[group] = option = self._choices.get(group, option)
        if option is not None:
            section = group if group in RunConfig.model_fields else None
            folder = PurePosixPath(group, option).parent
            file = self._search.option(group, option, named_by=named_by)
            self.add_file(file, section=section, folder=str(folder))

    def _add_name(self, name: str, file: Path, section: str | None, folder: str) -> None:
        path = PurePosixPath(folder, name)
        found = self._search.find(str(path).lstrip("/"))
        if found is None:
            raise ConfigError(
                f"{file}: `defaults` names {name!r}, and {path}.yaml is not in {self._search}; "
                "correct the entry"
            )
        self.add_file(found, section=section, folder=str(path.parent).lstrip("/"))

    def _add_choice(self, entry: _Choice, file: Path) -> None:
        if entry.replaces:
            return
        if entry.group in self.options:
            raise ConfigError(
                f"{file}: `defaults` chooses an option of {entry.group} that is chosen before; "
                f"write `override {entry.group}: {entry.option}`"
            )
        self.add_option(entry.group, entry.option, named_by=file)


def _read(file: Path) -> DictConfig:
    """Read the settings of a file, with interpolations unresolved."""
    try:
        settings = OmegaConf.load(io.StringIO(read_run_file(file)))
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ConfigError(f"{file}: {error.problem}{line}; correct it") from error
    except (yaml.YAMLError, OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: {one_line(error)}; correct it") from error
    if not isinstance(settings, DictConfig):
        raise ConfigError(f"{file} is a list; write sections of settings, such as `training:`")
    return settings


def _entries(settings: DictConfig, file: Path, *, is_section: bool) -> list[str | _Choice]:
    """Pop the `defaults` list of a file; a file of a section may not choose options."""
    listed = settings.pop("defaults", None)
    if listed is None:
        listed = [] if is_section else implied_defaults(settings)
    entries = OmegaConf.to_container(listed) if OmegaConf.is_config(listed) else listed
    if not isinstance(entries, list):
        raise ConfigError(f"{file}: defaults={show(entries)} must be a list; correct it")
    parsed = [_parse_entry(entry) for entry in entries]
    for entry, read in zip(entries, parsed, strict=True):
        if read is None or (is_section and isinstance(read, _Choice)):
            raise ConfigError(
                f"{file}: `defaults` has the entry {show(entry)}; write a file of the same folder "
                "or, in a run file, `group: option` or `override group: option`"
            )
    if _SELF not in parsed:
        parsed.append(_SELF)
    return [read for read in parsed if read is not None]


def _parse_entry(entry: Any) -> str | _Choice | None:
    """Parse a file name or a `group: option` entry; None for any other form."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict) or len(entry) != 1:
        return None
    [(key, option)] = entry.items()
    *words, group = str(key).split() or [""]
    if words not in ([], ["override"]) or not isinstance(option, str | int | None):
        return None
    option = None if option is None else str(option)
    return _Choice(group.lstrip("/"), option, replaces=bool(words))
