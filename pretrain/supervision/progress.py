"""Progress of each rank, the position of its main thread, and the rank that blocks the others."""

from __future__ import annotations

import inspect
import linecache
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from pretrain.supervision.flight_recorder import Call, find_holdup

_PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = tuple(
    f"{_PROJECT}/{name}/" for name in ("data_tools", "models", "parallel", "pretrain")
)
_COLLECTIVES = "/torch/distributed/"
_AUTOGRAD = "/torch/autograd/"
_TIMER = str(Path(__file__).resolve().with_name("pass_timer.py"))
# Files in which `.wait()` waits for a collective.
_WAIT_PATHS = (
    "/torch/",
    "/deepspeed/",
    "/megatron/",
    f"{_PROJECT}/models/",
    f"{_PROJECT}/parallel/",
)
_MAX_RANKS = 8  # listed in a message
_MAX_DEPTH = 12  # innermost frames inspected to see whether a thread waits


class Progress(NamedTuple):
    """Progress of a rank: `beats` counts the heartbeats of its watchdog thread, `num_activities`
    the activities that its main thread has begun, the latest of which is `activity`.

    `place`: position in the layout. `function`: innermost function of ours in the main thread.
    `collective`: the one in which it waits for other ranks, "" if none. Both are empty while the
    rank makes progress. `pid_namespace`: in which `pid` is valid. `window`, `busy`: see
    `stragglers.BusyTimer`. `memory_gib`: resident on the host. `part`: of a long activity, the
    latest that has begun; "" if none. `calls`: the latest collectives, empty while the rank makes
    progress. `device`: its seconds per step in the window, 0 if unknown, see `pass_timer`.
    """

    host: str
    pid: int
    beats: int = 0
    num_activities: int = 0
    activity: str = "starting"
    place: str = ""
    stage: int = 0
    function: str = ""
    collective: str = ""
    pid_namespace: str = ""
    window: int = 0
    busy: float = 0.0
    memory_gib: float = 0.0
    part: str = ""
    calls: tuple[Call, ...] = ()
    device: float = 0.0

    @classmethod
    def of_this_process(cls) -> Progress:
        """That of a process that has reported nothing."""
        namespace = Path("/proc/self/ns/pid")
        own = os.readlink(namespace) if namespace.exists() else ""
        return cls(socket.gethostname(), os.getpid(), pid_namespace=own)

    @property
    def where(self) -> str:
        """The activity and its part."""
        return f"{self.activity}, {self.part}" if self.part else self.activity

    @property
    def summary(self) -> str:
        return self._describe(f"in {self.where}")

    @property
    def last_known(self) -> str:
        """Summary of a rank that no longer reports."""
        return self._describe(f"last heard of in {self.where}")

    def _describe(self, where: str) -> str:
        place = f", {self.place}" if self.place else ""
        return f"(process {self.pid} on {self.host}{place}, {where})"


def resident_gib() -> float:
    """Memory of this process on the host; 0 where the system does not tell it."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**30


def is_waiting(frame: FrameType | None) -> bool:
    """Whether the thread whose innermost frame is `frame` waits for other ranks."""
    frame = _timed(frame)
    for depth in range(_MAX_DEPTH):
        if frame is None:
            return False
        if _COLLECTIVES in frame.f_code.co_filename or (depth == 0 and _waits_for_work(frame)):
            return True
        if frame.f_code.co_filename.startswith(_PACKAGES):
            return False
        frame = frame.f_back
    return False


def locate_thread(ident: int) -> tuple[str, str]:
    """(function, collective) of Progress for a thread; call it only for one that seems hung.

    Holding a frame keeps its tensors alive.
    """
    frames = sys._current_frames()
    innermost = _timed(frames.get(ident))
    function, collective = _function_of(innermost), _collective_of(innermost)
    if not collective and innermost is not None and _AUTOGRAD in innermost.f_code.co_filename:
        # Backward on a GPU runs in autograd's threads, for which the main thread waits.
        inside = (
            _collective_of(_timed(f))
            for key, f in frames.items()
            if key != ident and _is_foreign_thread(f)
        )
        collective = next((each for each in inside if each), "")
    return function, collective


def _timed(frame: FrameType | None) -> FrameType | None:
    """The caller of a collective whose innermost frames are those of `pass_timer` around it."""
    while frame is not None and frame.f_code.co_filename == _TIMER:
        frame = frame.f_back
    return frame


def _is_foreign_thread(frame: FrameType) -> bool:
    """Whether the thread was not started by Python."""
    outermost = frame
    while outermost.f_back is not None:
        outermost = outermost.f_back
    return not outermost.f_code.co_filename.endswith("/threading.py")


def _function_of(frame: FrameType | None) -> str:
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGES):
            file = Path(name).relative_to(_PROJECT)
            return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


def _collective_of(frame: FrameType | None) -> str:
    """The torch.distributed call that the innermost frames are in (its outermost function)."""
    found = None
    for depth in range(_MAX_DEPTH):
        if frame is None:
            break
        if _COLLECTIVES in frame.f_code.co_filename:
            found = frame
        elif found is not None:
            return _describe_call(found)
        elif depth == 0 and _waits_for_work(frame):
            return "a collective begun before"
        elif frame.f_code.co_filename.startswith(_PACKAGES):
            return ""
        frame = frame.f_back
    return "" if found is None else _describe_call(found)


def _waits_for_work(frame: FrameType) -> bool:
    """Whether the innermost frame waits for an asynchronous collective (in C, without a frame)."""
    name = frame.f_code.co_filename
    if any(part in name for part in _WAIT_PATHS):
        return ".wait()" in linecache.getline(name, frame.f_lineno)
    return False


def _describe_call(frame: FrameType) -> str:
    arguments, name = frame.f_locals, frame.f_code.co_name
    # torch's logging decorator; its arguments are those of the call.
    if name == "wrapper" and {"func", "args", "kwargs"} <= arguments.keys():
        call = arguments["func"]
        given = inspect.signature(call).bind_partial(*arguments["args"], **arguments["kwargs"])
        name, arguments = call.__name__, given.arguments
    peer = arguments.get("src", arguments.get("dst"))
    if name in ("recv", "send", "irecv", "isend") and isinstance(peer, int):
        return f"{name} {'from' if 'src' in arguments else 'to'} rank {peer}"
    return f"{name} of {_describe_group(arguments.get('group'))}"


def _describe_group(group: object) -> str:
    if not isinstance(group, dist.ProcessGroup):
        return "all ranks"
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) > _MAX_RANKS:
        return f"{len(ranks)} ranks, the first of which is {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks))}"


def blame(before: Mapping[int, Progress], after: Mapping[int, Progress], *, own_rank: int) -> str:
    """Name the ranks that block the others, from two snapshots of all ranks."""
    silent = silent_ranks(before, after, own_rank=own_rank)
    if silent:
        return describe_silent(silent)
    holdup = find_holdup({rank: progress.calls for rank, progress in after.items()})
    if holdup is not None:
        return _list({rank: after[rank] for rank in sorted(holdup.ranks)}, holdup.what)
    waiting = {rank: progress for rank, progress in after.items() if progress.collective}
    absent = {rank: progress for rank, progress in after.items() if rank not in waiting}
    if waiting and absent:
        where = _most_common([progress.collective for progress in waiting.values()])
        return _list(absent, f"has not entered {where}, in which others wait")
    fewest = min(progress.num_activities for progress in after.values())
    behind = {r: progress for r, progress in after.items() if progress.num_activities == fewest}
    if len(behind) < len(after):
        return _list(behind, "is the furthest behind")
    places = {rank: _where(progress) for rank, progress in after.items()}
    usual = _most_common(list(places.values()))
    odd = {rank: after[rank] for rank, place in places.items() if place != usual}
    if odd:
        return _list(odd, f"while others are in {usual}")
    return f"all ranks are equally far and in {usual}; see their stacks"


def silent_ranks(
    before: Mapping[int, Progress], after: Mapping[int, Progress], *, own_rank: int
) -> dict[int, Progress]:
    """The other ranks that have sent no heartbeat between two snapshots of all ranks."""
    return {
        rank: progress
        for rank, progress in after.items()
        if rank != own_rank and progress.beats == before[rank].beats
    }


def describe_silent(ranks: Mapping[int, Progress]) -> str:
    """Describe ranks that no longer send heartbeats."""
    named = [f"rank {rank} {progress.last_known}" for rank, progress in ranks.items()]
    return f"{', '.join(named[:_MAX_RANKS])} does not answer{_and_more(len(named))}"


def _and_more(number: int) -> str:
    return f", and {number - _MAX_RANKS} more ranks" if number > _MAX_RANKS else ""


def _list(ranks: Mapping[int, Progress], what: str) -> str:
    """Describe ranks by where they are and what is wrong with them."""
    named = []
    for rank, progress in list(ranks.items())[:_MAX_RANKS]:
        where = f" is in {_where(progress)} and" if progress.function else ""
        named.append(
            f"rank {rank} {progress.summary}{where} {what}".replace(" and while", " while")
        )
    return ", ".join(named) + _and_more(len(ranks))


def _where(progress: Progress) -> str:
    function = progress.function or "no function of this project"
    return f"{progress.collective}, called by {function}" if progress.collective else function


def _most_common(values: list[str]) -> str:
    return Counter(values).most_common(1)[0][0]
