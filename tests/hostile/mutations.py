"""Changes of valid inputs, each with what is known about it: must it be refused?"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

Path = tuple[Any, ...]
_LARGE = 10**30
_NOT_A_NUMBER = ("many", [1], {"a": 1}, True, float("nan"), float("inf"), "1e999")
_NOT_A_FLAG = ("maybe", 5, 0.5, [True], {"a": True})
_NOT_A_TEXT = (5, 0.5, True, {"a": 1})
_PERHAPS = (-1, 0, 0.5, _LARGE, None, "", -0.0, 1e-320)


class Change(NamedTuple):
    """A change of a value. `refuse`: whether nobody may accept it."""

    path: Path
    value: Any
    refuse: bool

    @property
    def key(self) -> str:
        return ".".join(str(part) for part in self.path)


def leaves(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar below sections; lists count as one value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def change_of(value: Any, path: Path, draw: random.Random) -> Change:
    """Another value for a setting: of a wrong type, or of the right one and out of the ordinary."""
    if draw.random() < 0.4:
        odd = draw.choice(_PERHAPS)
        return Change(path, odd, refuse=_is_no(odd, value))
    if isinstance(value, bool):
        return Change(path, draw.choice(_NOT_A_FLAG), refuse=True)
    if isinstance(value, int | float):
        return Change(path, draw.choice(_NOT_A_NUMBER), refuse=True)
    if isinstance(value, str):
        return Change(path, draw.choice(_NOT_A_TEXT), refuse=True)
    return Change(path, {"unheard": {"of": 1}}, refuse=value is None)


def _is_no(odd: Any, value: Any) -> bool:
    """Whether a value of `_PERHAPS` is one that a setting like `value` can never have."""
    if isinstance(value, bool | str):
        return odd is not None and type(odd) is not type(value)
    if isinstance(value, int):
        return odd == "" or odd == _LARGE or (isinstance(odd, float) and not odd.is_integer())
    return isinstance(value, float) and odd == ""


def replaced(values: Any, path: Path, value: Any) -> Any:
    """A copy in which `path` has another value."""
    result = copy.deepcopy(values)
    place = result
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return result


def with_unknown_key(values: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy with a key that nobody knows beside a random one, and that key."""
    path, value = draw.choice(list(leaves(values)))
    name = str(path[-1])
    place = draw.randrange(len(name) + 1)
    key = name[:place] + draw.choice("qxz_") + name[place:]
    return replaced(values, (*path[:-1], key), value), key


def damaged_bytes(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bits flipped, bytes replaced, removed, doubled or inserted, or the end cut off."""
    kind = draw.choice(("flip", "replace", "remove", "double", "insert", "cut"))
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.choice((1, 2, 8, 64)))
    if kind == "flip":
        flipped = bytes([data[begin] ^ 1 << draw.randrange(8)])
        return data[:begin] + flipped + data[begin + 1 :], f"{kind} {begin}"
    if kind == "cut":
        return data[:begin], f"{kind} {begin}"
    inside = {
        "replace": draw.randbytes(end - begin),
        "remove": b"",
        "double": data[begin:end] * 2,
        "insert": draw.randbytes(4) + data[begin:end],
    }[kind]
    return data[:begin] + inside + data[end:], f"{kind} {begin}:{end}"
