"""What no configuration needs: text and numbers so large that reading them is the harm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.errors import show
from pretrain.config.leaves import leaves
from pretrain.errors import ConfigError

MAX_TEXT = 1 << 20  # bytes of a file or an override
MAX_DEPTH = 50
MAX_VALUES = 10_000  # with every YAML reference written out
_LARGEST = 2**63 - 1


def read_run_file(file: Path) -> str:
    """The text of a YAML file that is safe to build: few values, not deep, however it refers to
    itself.

    Raises:
        ConfigError: it is not; the message names file and line.
        OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read.
    """
    with file.open("rb") as opened:
        data = opened.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ConfigError(
            f"{file}: more than {MAX_TEXT} bytes, which no run file needs; shorten it"
        )
    text = data.decode("utf-8")
    _check_events(text, file)
    return text


def _check_events(text: str, file: Path) -> None:
    """Walk through the parser's events, of which none builds a value: a few references to
    references would stand for more values than memory holds."""
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values before it
    anchored: dict[str | None, int] = {}
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            values += anchored.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            anchored[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
        if values > MAX_VALUES or len(open_nodes) > MAX_DEPTH:
            line = 0 if event.start_mark is None else event.start_mark.line + 1
            raise ConfigError(
                f"{file}:{line}: more than {MAX_VALUES} values or "
                f"{MAX_DEPTH} levels, which no run file needs; take out references and nesting"
            )


def check_numbers(values: Mapping[str, Any]) -> None:
    """Refuse whole numbers that do not fit in 64 bits, as tensors, files and seeds count in.

    Raises:
        ConfigError: names the first.
    """
    for key, value in leaves(values):
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConfigError(
                f"{key}={show(value)} does not fit in 64 bits; write a number up to {_LARGEST}"
            )
