"""Smaller sizes of a model of any family and of its sequences. No torch.

Every whole number of the family's configuration above a limit is halved, all of them together as
long as the configuration accepts it, then one by one, down to its limit. Numbers of heads keep
their ratio, and what the family's validators demand (divisors, orders, evenness) holds throughout.
Switches and small numbers stay: a feature that is on stays on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# By the last word of a setting's name: no smaller than this. Other numbers up to 4 stay.
_LIMITS = (
    ("vocab", 64),
    ("sequence_length|max_position|max_seq", 32),
    ("hidden|intermediate|ffn|d_model", 32),
    ("kv_heads", 1),
    ("per_token|top_k", 2),
    ("experts", 8),
    ("dim|rank|channels|slots", 8),
    ("", 4),
)
_RATIOS = ("heads",)  # sizes of one name are halved together or not at all
_KEPT = 4
_STD = re.compile(r"init.*std|initializer_range")
_VISIBLE_STD = 0.1  # of initial weights, so that every branch of a narrow model matters

Path = tuple[Any, ...]
Accepts = Callable[[Mapping[str, Any]], bool]


class Change(NamedTuple):
    """A setting that is not as in the run file."""

    setting: str
    old: Any
    new: Any
    why: str = ""

    def __str__(self) -> str:
        return f"{self.setting}: {self.old} -> {self.new}" + f" ({self.why})" * bool(self.why)


def halve(values: dict[str, Any], accepts: Accepts, *, limits: Mapping[str, int]) -> dict[str, Any]:
    """`values` with every whole number as small as its limit and `accepts` allow.

    `values`: nested settings, of which only those below `model` and the lengths of `data` are
    sizes. `limits`: dotted name -> limit, where the rule by name does not fit.
    """
    while True:
        groups = _halved(values, limits)
        everything = {path: half for group in groups for path, half in group.items()}
        before = values
        for changes in (everything, *groups):
            smaller = _with(values, changes)
            if changes and accepts(smaller):
                values = smaller
                if changes is everything:
                    break
        if values == before:
            return values


def visible_weights(model: Mapping[str, Any]) -> dict[str, float]:
    """Standard deviations of initial weights that are too small for a narrow model, raised."""
    return {
        name: _VISIBLE_STD
        for name, value in model.items()
        if _STD.search(name) and isinstance(value, float) and value < _VISIBLE_STD
    }


def _halved(values: Mapping[str, Any], limits: Mapping[str, int]) -> list[dict[Path, int]]:
    """The halves of all sizes above their limits, grouped by what keeps its ratio."""
    groups: dict[str, dict[Path, int | None]] = {}
    for path, value in _sizes(values):
        name, half = ".".join(map(str, path)), _half(path, value)
        ratio = next((each for each in _RATIOS if each in str(path[-1])), None)
        limit = limits.get(name, _limit(path))
        is_large = half >= limit and value > (1 if ratio else _KEPT)
        groups.setdefault(ratio or name, {})[path] = half if is_large else None
    return [
        {path: half for path, half in group.items() if half is not None}
        for group in groups.values()
        if None not in group.values()
    ]


def _half(path: Path, value: int) -> int:
    """Rounded up; a depth stays even, since layers may come in pairs."""
    half = math.ceil(value / 2)
    return half + half % 2 if "layers" in str(path[-1]) and value % 2 == 0 else half


def _sizes(values: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    for path, value in _leaves(values):
        is_length = path[0] == "data" and path[-1] == "sequence_length"
        if (path[0] == "model" or is_length) and type(value) is int:
            yield path, value


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, (*path, key))
    elif isinstance(value, list) and path[0] == "data":
        for number, each in enumerate(value):
            yield from _leaves(each, (*path, number))
    else:
        yield path, value


def _limit(path: Path) -> int:
    if path[1] == "stages":
        return 8
    return next(limit for name, limit in _LIMITS if re.search(name, str(path[-1])))


def _with(value: Any, changes: Mapping[Path, Any], path: Path = ()) -> Any:
    """A copy of nested settings with some leaves replaced."""
    if isinstance(value, Mapping):
        return {k: _with(each, changes, (*path, k)) for k, each in value.items()}
    if isinstance(value, list):
        return [_with(each, changes, (*path, n)) for n, each in enumerate(value)]
    return changes.get(path, value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs between two nested mappings, in the order of the first."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        Change(".".join(map(str, path)), before.get(path), after.get(path))
        for path in {**before, **after}
        if before.get(path) != after.get(path)
    ]
