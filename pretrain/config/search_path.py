"""Search path for run files and groups: the user's folder, then the project's."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from data_tools.errors import cwd_hint
from pretrain.config.errors import nearest
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS


class SearchPath:
    """Look up run files, `NAME.yaml`, and options of groups, `GROUP/OPTION.yaml`.

    `config_dir`: a folder whose files take precedence over the project's; None: the project's only.

    Raises:
        ConfigError: `config_dir` is not a directory.
    """

    def __init__(self, config_dir: str | Path | None) -> None:
        self._folders = [CONFIGS]
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise ConfigError(
                    f"--config-dir {str(config_dir)!r} is not a directory{cwd_hint(config_dir)}; "
                    "correct it"
                )
            self._folders.insert(0, Path(config_dir).resolve())

    def __str__(self) -> str:
        return " or ".join(str(folder) for folder in self._folders)

    def find(self, name: str) -> Path | None:
        """The first NAME.yaml, or None."""
        files = [folder / f"{name}.yaml" for folder in self._folders]
        return next((file for file in files if file.is_file()), None)

    def run_file(self, name: str) -> Path:
        """The run file of a --config-name, with or without .yaml.

        Raises:
            ConfigError: there is none.
        """
        file = self.find(name.removesuffix(".yaml"))
        if file is None:
            known = {file.stem for folder in self._folders for file in folder.glob("*.yaml")}
            raise ConfigError(
                f"--config-name {name!r} is not a run file in {self}; "
                + _remedy(name.removesuffix(".yaml"), known, "{!r}")
            )
        return file

    def is_group(self, name: str) -> bool:
        return any((folder / name).is_dir() for folder in self._folders)

    def option(self, group: str, option: str, *, named_by: Path | None = None) -> Path:
        """The file of an option, such as `single` of the group `parallel`. `named_by`: the file
        that names it, for the message.

        Raises:
            ConfigError: the group has no such option.
        """
        known: dict[str, Path] = {}
        for root in (folder / group for folder in self._folders):
            for file in root.rglob("*.yaml"):
                known.setdefault(file.relative_to(root).with_suffix("").as_posix(), file)
        name = option.removesuffix(".yaml")
        if name not in known:
            source = "" if named_by is None else f"{named_by}: "
            raise ConfigError(
                f"{source}{group}={option} is not a file of the group {group}; "
                + _remedy(name, known, group + "={}")
            )
        return known[name]


def _remedy(name: str, known: Collection[str], form: str) -> str:
    guess = nearest(name, known)
    if guess is not None:
        return f"did you mean {form.format(guess)}?"
    return f"known are {', '.join(sorted(known)) or 'none'}"
