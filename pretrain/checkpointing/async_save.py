"""Saves within the step that asks for them, or in the background while the next steps train.

Both write through the same `CheckpointStore`. In the background a copy of this rank's state on the
host is taken first, and a thread writes, flushes, agrees with the other ranks and publishes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import NoReturn

import torch
from torch import Tensor

from parallel.checkpoint.errors import AgreedError, one_line
from parallel.checkpoint.weights import Weight
from pretrain.checkpointing.optimizer_shards import OptimizerShard
from pretrain.checkpointing.selection import Checkpoint, Resume, RunIdentity
from pretrain.checkpointing.store import CheckpointContents, CheckpointStore

_DRAIN_SECONDS = 5.0  # seconds in which a save may still end when this rank fails by itself
_NICENESS = 10
logger = logging.getLogger(__name__)


class Checkpointer:
    """The saves of a run, on all of its ranks; a context manager that the last one cannot outlive.

    In the background one save is under way at a time. What it raises, `CheckpointError` on every
    rank, comes out of the next `save` or `wait`; nothing was published then.

    Args:
        store: for saves in the background one whose ranks have a group of their own, because its
            collectives run beside those of the main thread.
        moved: told what this rank is about to do (`Watchdog.moved`).
    """

    def __init__(
        self, store: CheckpointStore, *, asynchronous: bool, progress: Callable[[str], object]
    ) -> None:
        self._store, self._asynchronous, self._progress = store, asynchronous, progress
        self._buffers = HostBuffers()
        self._running: _BackgroundSave | None = None

    @property
    def identity(self) -> RunIdentity:
        return self._store.identity

    def find(self, resume: Resume) -> Checkpoint | None:
        """See `CheckpointStore.find`; a save under way is published first."""
        self.wait()
        return self._store.find(resume)

    def save(self, contents: CheckpointContents) -> None:
        """Write and publish; or wait for the save before, copy, and do so in the background.

        Raises:
            CheckpointError: this save, or the one before it in the background, was not published.
        """
        if not self._asynchronous:
            self._progress(f"the save of step {contents.step}")
            published = f"the publication of step {contents.step}"
            self._store.save(contents, written=partial(self._progress, published))
            return
        self.wait()
        self._progress(f"the copy of step {contents.step} to host memory")
        self._running = _BackgroundSave(self._store, snapshot(contents, self._buffers))
        self._running.start()

    def wait(self) -> None:
        """Return once no save is under way, all of them published.

        Raises:
            CheckpointError: the one in the background failed, on every rank alike.
        """
        running = self._running
        if running is None:
            return
        self._progress(f"the wait for the save of step {running.step}")
        running.written.wait()
        # Ranks that have come to here are not the one that holds the others up.
        self._progress(f"the wait for the publication of step {running.step}")
        running.join()
        self._running = None
        if running.error is not None:
            raise running.error

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """After an error a save under way may end; what it raises does not hide the error."""
        running = self._running
        if error is None or running is None:
            self.wait()
            return
        self._progress(f"the wait for the save of step {running.step}")
        # An error that all ranks raise leaves them all here. After one that is this rank's alone
        # others may be dead, and this rank must end so that its launcher sees it.
        running.join(None if isinstance(error, AgreedError) else _DRAIN_SECONDS)
        if running.is_alive():
            logger.warning("the save of step %d is given up", running.step)
        elif running.error is not None:
            logger.warning("a save failed, too: %s", one_line(running.error))


class _BackgroundSave(threading.Thread):
    """One save. `written`: this rank has done its part, or failed; `error` is what it raised."""

    def __init__(self, store: CheckpointStore, contents: CheckpointContents) -> None:
        # A daemon: at the end of a process that has given it up, nothing waits for it.
        super().__init__(name=f"save of step {contents.step}", daemon=True)
        self.step = contents.step
        self.written = threading.Event()
        self.error: BaseException | None = None
        self._save = partial(store.save, contents, written=self.written.set)

    def run(self) -> None:
        _lower_priority()
        try:
            self._save()
        except BaseException as error:  # the main thread raises it
            self.error = error
        finally:
            self.written.set()


def _lower_priority() -> None:
    """This thread hashes while others train: where cores are few it must not be in their way."""
    if sys.platform == "linux":  # elsewhere threads have no priorities of their own
        thread = threading.get_native_id()
        lower = min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, 19)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, lower)


class HostBuffers:
    """Host memory for a copy of what a rank writes: allocated by the first save, used by all.

    From an accelerator copies go to pinned memory (of which torch takes the next power of two for
    each tensor) without waiting for each; `synchronize` does for all of them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._is_copying = False

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` under `name`, complete after `synchronize`, until the next one."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        self._is_copying |= tensor.is_cuda
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def synchronize(self) -> None:
        if self._is_copying:
            torch.cuda.current_stream().synchronize()
            self._is_copying = False


def snapshot(contents: CheckpointContents, buffers: HostBuffers) -> CheckpointContents:
    """`contents` as they are now, whatever later steps change; collective, as loading weights is.

    A rank copies what it will write, and the weights to compare it with. What fails here is raised
    again where it would be written, so that all ranks get there and agree on the failure.
    """
    optimizer = contents.optimizer
    if optimizer is not None:
        optimizer = _hold_optimizer(optimizer, buffers)
    weights = _hold(contents.weights, "weights", buffers, keep=contents.writes_weights)
    buffers.synchronize()
    return contents._replace(
        weights=weights, optimizer=optimizer, trainer=copy.deepcopy(contents.trainer)
    )


def _hold_optimizer(
    optimizer: Callable[[], OptimizerShard], buffers: HostBuffers
) -> Callable[[], OptimizerShard]:
    try:
        shard = optimizer()
    except (OSError, RuntimeError, ValueError) as error:
        return partial(_raise, error)
    held = shard._replace(
        elements=_hold(shard.elements, "elements", buffers, keep=True),
        weights=_hold(shard.weights, "compared", buffers, keep=True),
    )
    return lambda: held


def _hold(
    weights: Sequence[Weight], folder: str, buffers: HostBuffers, *, keep: bool
) -> list[Weight]:
    """The same weights with copies to load; none without `keep`, when loading was all there is."""
    held = []
    for weight in weights:
        tensor = weight.load()
        if not keep:
            continue
        load: Callable[[], Tensor]
        try:
            load = partial(_same, buffers.copy(f"{folder}/{weight.name}", tensor))
        except RuntimeError as error:  # no memory; the other ranks go on loading
            load = partial(_raise, error)
        held.append(weight._replace(load=load))
    return held


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _raise(error: Exception) -> NoReturn:
    raise error
