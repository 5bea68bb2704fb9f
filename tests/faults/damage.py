"""Bit flips and truncations of files, and how many of them are refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Damage(NamedTuple):
    """A damaged file: one bit flipped, or only its first bytes."""

    what: str
    content: bytes


def damages(content: bytes, count: int, draw: random.Random) -> Iterator[Damage]:
    """`count` of them, one in five a truncation, among these the longest and the shortest."""
    sizes = [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count // 5 - 2))]
    for size in sizes:
        yield Damage(f"truncated to {size} bytes", content[:size])
    for _ in range(count - len(sizes)):
        bit = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield Damage(f"bit {bit} flipped", bytes(damaged))


class Tally:
    """Trials and refusals by kind of file. A refusal is a one-line error that names the file."""

    def __init__(self, error: type[Exception]) -> None:
        self._error = error
        self.trials, self.refused = Counter[str](), Counter[str]()
        self._accepted: list[str] = []

    def try_all(
        self, kind: str, path: Path, damaged: Sequence[Damage], read: Callable[[], object]
    ) -> None:
        """Put each damage in the place of `path`, which is as before in the end, and `read`."""
        content = path.read_bytes()
        try:
            for what, damage in damaged:
                path.write_bytes(damage)
                self.trials[kind] += 1
                if self._is_refused(path, read):
                    self.refused[kind] += 1
                else:
                    self._accepted.append(f"{path.name}: {what}")
        finally:
            path.write_bytes(content)

    def _is_refused(self, path: Path, read: Callable[[], object]) -> bool:
        try:
            read()
        except self._error as error:
            named = str(path) in str(error) or (path.suffix != "" and path.name in str(error))
            return named and "\n" not in str(error)
        return False

    def check(self, title: str, *, least: int) -> None:
        total = self.trials.total()
        table = [f"{kind} {self.refused[kind]}/{n}" for kind, n in sorted(self.trials.items())]
        print(f"\n{title}: {self.refused.total()} of {total} refused ({', '.join(table)})")
        assert self._accepted == []
        assert total >= least
