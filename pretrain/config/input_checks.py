"""Checks before the schema: limits on size and nesting, and credentials.

Text, nesting and numbers can be so large that parsing them is harmful. Keys and passwords do not
belong in a configuration: it is written to the run directory, to every checkpoint and to W&B, and
job scripts print it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.errors import show
from pretrain.errors import ConfigError

MAX_TEXT = 1 << 20  # bytes of a file or an override
MAX_DEPTH = 50
MAX_VALUES = 10_000  # with every YAML reference written out
_LARGEST = 2**63 - 1

# Not `tokens`, `tokenizer` and `experts_per_token`.
_KEY = re.compile(r"(?i)api_?key|access_?key|(?<!per_)token(?!s|iz)|secret|passw|credential")
_IN_URL = re.compile(
    r"(?i)://[^/\s@]*:[^/\s@]+@|[?&](sig|signature|token|x-amz-\w+|access_?key|password)="
)


def leaves(
    values: Mapping[str, Any], prefix: str = "", *, into_lists: bool = True
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all leaves of nested settings.

    Indices of lists are keys, too; without `into_lists` a list is a leaf.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        if into_lists and isinstance(value, list | tuple):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, Mapping):
            yield from leaves(value, f"{key}.", into_lists=into_lists)
        else:
            yield key, value


def read_run_file(file: Path) -> str:
    """Read a YAML file and check that it is safe to parse: few values and levels, with aliases
    expanded.

    Raises:
        ConfigError: it is not safe; the message names file and line.
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
    """Count values over the parser's events, without building any: a few nested aliases can
    expand to more values than memory holds."""
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
    """Refuse whole numbers that do not fit in 64 bits, the width of tensors, files and seeds.

    Raises:
        ConfigError: names the first.
    """
    for key, value in leaves(values):
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConfigError(
                f"{key}={show(value)} does not fit in 64 bits; write a number up to {_LARGEST}"
            )


def check_credentials(values: Mapping[str, Any]) -> None:
    """Refuse text under names of credentials, and URLs that contain some; never show the value.

    Raises:
        ConfigError: names the setting and where credentials belong.
    """
    for key, value in leaves(values):
        if isinstance(value, str) and _KEY.search(key):
            raise _refusal(key, "is a name of credentials")
        if isinstance(value, str) and _IN_URL.search(value):
            raise _refusal(key, "holds a URL with credentials in it")


def check_override(override: str) -> None:
    """`check_credentials` of a `key=value` of a command line, whatever the type of the value.

    Raises:
        ConfigError: as for `check_credentials`.
    """
    key, _, value = override.partition("=")
    check_credentials({key.lstrip("+~")[:80]: value})


def _refusal(key: str, what: str) -> ConfigError:
    return ConfigError(
        f"{key} {what}, and a configuration is written down in many places; leave it out and set "
        "the variable of the environment that the service reads (WANDB_API_KEY, HF_TOKEN, AWS_*)"
    )
