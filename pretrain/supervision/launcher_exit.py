"""Exit of a rank together with its launcher, even if the launcher was killed.

`torchrun` and `deepspeed` cannot end their ranks when they are killed themselves, and the
`deepspeed` command leaves them running on SIGTERM (0.19.8, launcher/runner.py): its ranks are
children of its child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from pretrain.errors import EXIT_STOPPED

GRACE_SECONDS = 30.0  # for a save once the launcher is gone; launchers give as many
_PR_SET_PDEATHSIG = 1
_INIT = 1
_NODE_LAUNCHER = "deepspeed.launcher.launch"  # started by the `deepspeed` command
# First words of their command lines. Shells are not listed: a rank may outlive its terminal.
_PYTHON_LAUNCHERS = frozenset(
    {
        "accelerate",
        "accelerate-launch",
        "deepspeed",
        _NODE_LAUNCHER,
        "torch.distributed.run",
        "torchrun",
    }
)
_MPI_LAUNCHERS = frozenset(
    {
        "hydra_pmi_proxy",
        "mpiexec",
        "mpiexec.hydra",
        "mpirun",
        "mpirun.mpich",
        "mpirun.openmpi",
        "orted",
        "orterun",
        "prted",
        "prterun",
    }
)
_NUM_WORDS = 4  # python -u -m deepspeed.launcher.launch
# Variables that only these launchers set.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")


def end_with_launcher() -> None:
    """Tie this process to the launchers above it; call before anything else.

    When its parent `torchrun` or DeepSpeed's `launch.py` dies, the process is killed at once. When
    another launcher dies, it gets SIGTERM, and SIGKILL GRACE_SECONDS later. Does nothing without a
    launcher, and on systems other than Linux.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    launchers = _launchers_above(parent)
    if _launcher_is_gone(launchers, parent):
        sys.exit(EXIT_STOPPED)
    if not launchers:
        return
    if not _PYTHON_LAUNCHERS.isdisjoint(_command_words(parent)):
        # The kernel also sends the signal when only the thread that forked this process ends.
        # Python launchers fork ranks in their main thread; MPI launchers may not.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    handles = []
    for pid in launchers:
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    if len(handles) < len(launchers):
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=_follow_launcher, args=(handles,), name="launcher", daemon=True).start()


def _launcher_is_gone(launchers: list[int], parent: int) -> bool:
    """Whether a launcher exited before this process could watch it (reparented to init)."""
    if not launchers:
        return parent == _INIT and any(name in os.environ for name in _LAUNCHER_VARIABLES)
    outermost = launchers[-1]
    if not any(word == _NODE_LAUNCHER for word in _command_words(outermost)):
        return False
    # The `deepspeed` command above it is in the same process group, often as its leader. A shell
    # started by ssh leads a group of its own and is alive.
    with contextlib.suppress(ProcessLookupError):
        leader = os.getpgid(outermost)
        return _parent_of(outermost) == _INIT or not Path(f"/proc/{leader}").exists()
    return True


def _launchers_above(pid: int) -> list[int]:
    found = []
    while _is_launcher(pid):
        found.append(pid)
        pid = _parent_of(pid)
    return found


def _is_launcher(pid: int) -> bool:
    return not (_PYTHON_LAUNCHERS | _MPI_LAUNCHERS).isdisjoint(_command_words(pid))


def _command_words(pid: int) -> list[str]:
    """First words of a process's command line, as base names."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:_NUM_WORDS]
    except OSError:
        return []
    return [Path(os.fsdecode(word)).name for word in words]


def _parent_of(pid: int) -> int:
    try:
        # The program name is in parentheses and may itself contain spaces and parentheses.
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
    except OSError:
        return 0
    return int(after_name.split()[1])


def _follow_launcher(handles: list[int]) -> None:
    """Wait until one of the launchers exits, then end this process."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
