"""Turns of ranks to judge whether a run hangs: one at a time, while the others wait for it.

All ranks of a run that hangs run out of patience within a second. If each compared all of them,
thousands of ranks would ask the store for millions of values at once, and blame its owner for not
answering.
"""

from __future__ import annotations

import time

from pretrain.supervision.heartbeats import RunRecord

_JUDGING_SECONDS = 10.0  # until another rank judges in the place of one that does not answer
_TURN, _JUDGE = "turn", "judge"


class Turns:
    """The turns as one rank sees them; every method may raise what `RunRecord` raises."""

    def __init__(self, record: RunRecord, *, rank: int) -> None:
        self._record, self._rank = record, rank
        # The current turn, as "NUMBER SECONDS-BEFORE-IT"; None: this rank has not asked for one.
        self._seen: str | None = None
        self._begins = 0.0

    def forget(self) -> None:
        """This rank makes progress: turns that pass meanwhile do not concern it."""
        self._seen = None

    def take(self) -> bool:
        """Whether this rank is to judge now. If not, ask again: the judge may not answer."""
        turn, now = self._record.get_flag(_TURN) or "0 0", time.monotonic()
        if turn != self._seen:
            is_next = self._seen is not None  # else the pause before it may long be over
            self._begins = now + (float(turn.split()[1]) if is_next else 0.0)
            self._seen = turn
        if now < self._begins:
            return False
        if self._record.set_flag_once(f"{_JUDGE}_{_number(turn)}", str(self._rank)):
            return True
        if now > self._begins + _JUDGING_SECONDS:
            self.pass_on(after=0.0)
        return False

    def pass_on(self, *, after: float) -> None:
        """End this turn without a verdict; the next begins `after` seconds later."""
        turn = self._seen or "0 0"
        before = "" if _number(turn) == 0 else turn  # the first is in no record
        self._record.change_flag(_TURN, before, f"{_number(turn) + 1} {after:.3f}")


def _number(turn: str) -> int:
    return int(turn.split()[0])
