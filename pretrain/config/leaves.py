"""Every value of nested settings, under its dotted key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that is no mapping and no list; places in a list are keys."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{key}.")
        elif isinstance(value, list | tuple):
            yield from leaves({str(place): each for place, each in enumerate(value)}, f"{key}.")
        else:
            yield key, value
