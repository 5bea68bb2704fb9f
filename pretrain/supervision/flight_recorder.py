"""Collectives that a rank has begun and finished, from the flight recorder of torch.

A collective of NCCL returns at once: the stack of a rank that hangs in one shows no more than the
line that reads its result. The recorder knows how many collectives of each group were begun, and
whether the last one has ended. It records gloo's collectives too, but not its sends and receives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

_KEPT = "2000"  # records
# The recorders of a build: that of NCCL, and that of gloo.
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_MAX_RANKS = 8  # of a group that are listed


class Call(NamedTuple):
    """The latest collective of a group that a rank has called.

    `group`: its name, the same on all ranks, because all make all groups in one order. `name`: the
    operation and its ranks. `number`: among the collectives of the group, from 1. `is_done`: it has
    ended. `has_begun`: its device has begun it; gloo does not tell. `ranks`: of the group; empty if
    they are many.
    """

    group: str
    name: str
    number: int
    is_done: bool
    has_begun: bool
    ranks: tuple[int, ...]


class Holdup(NamedTuple):
    """Ranks that a collective waits for, and what they have not done."""

    ranks: set[int]
    what: str


def keep_records() -> None:
    """Have torch record collectives; call it before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _KEPT)


def latest_calls() -> tuple[Call, ...]:
    """The latest collective of each group of this process."""
    world = distributed_c10d._world
    # Copies: this is the watchdog's thread, and the main thread may be making or ending groups.
    names, members_of = dict(world.pg_names), dict(world.pg_group_ranks)
    ranks = {name: tuple(members_of.get(group, ())) for group, name in names.items()}
    size = 0 if (every := world.default_pg) is None else len(members_of.get(every, ()))
    found: dict[str, Call] = {}
    for entry in _entries():
        group, number = entry["process_group"][0], entry["collective_seq_id"]
        if entry["is_p2p"] or (group in found and found[group].number > number):
            continue
        members = ranks.get(group, ())
        found[group] = Call(
            group=group,
            name=f"{entry['profiling_name'].partition(':')[2]} of {_describe(members, size)}",
            number=number,
            is_done=entry["retired"] or entry["state"] == "completed",
            has_begun=entry["state"] != "scheduled",
            ranks=members if len(members) <= _MAX_RANKS else (),
        )
    return tuple(found.values())


def find_holdup(calls: Mapping[int, Sequence[Call]]) -> Holdup | None:
    """The ranks that a collective waits for and that themselves wait in none; None if there are
    none. `calls`: of each rank, `latest_calls`."""
    busy = {rank for rank, own in calls.items() if any(not call.is_done for call in own)}
    pending = [call for own in calls.values() for call in own if not call.is_done]
    for call in sorted(pending, key=lambda call: (call.group, call.number)):
        others = {rank: _of_group(own, call.group) for rank, own in calls.items()}
        members = set(call.ranks) or {rank for rank, own in others.items() if own is not None}
        absent = {rank for rank in members if _number(others.get(rank)) < call.number}
        if absent - busy:
            return Holdup(absent - busy, f"has not entered {call.name}, in which others wait")
        begun = {rank for rank in members if (own := others.get(rank)) and own.has_begun}
        if not absent and begun and members - begun:
            return Holdup(
                members - begun, f"has called {call.name}, which its device has not begun"
            )
    return None


def _of_group(calls: Sequence[Call], group: str) -> Call | None:
    return next((call for call in calls if call.group == group), None)


def _number(call: Call | None) -> int:
    return 0 if call is None else call.number


def _describe(ranks: tuple[int, ...], size: int) -> str:
    if not ranks:
        return "a group that is being made or ended"
    if len(ranks) == size:
        return "all ranks"
    if len(ranks) > _MAX_RANKS:
        return f"{len(ranks)} ranks, the first of which is {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _entries() -> Iterator[Mapping[str, Any]]:
    for records in _records().values():
        yield from records.get("entries", [])


def _records() -> dict[str, dict[str, Any]]:
    """By recorder, what it has kept; a recorder without a collective keeps nothing."""
    dumps = {name: getattr(_distributed_c10d, name, None) for name in _RECORDERS}
    return {name: json.loads(dump()) for name, dump in dumps.items() if dump is not None}


def write_records(path: Path) -> None:
    """Write everything that was recorded.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(_records()) + "\n")
