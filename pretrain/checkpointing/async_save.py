"""Synchronous and asynchronous checkpoint saves.

Both write through the same `CheckpointStore`. An asynchronous save first copies this rank's state
to host memory; a thread then writes, flushes, agrees with the other ranks and publishes while the
next steps train.
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
from parallel.checkpoint.rollback_record import SkippedData
from parallel.checkpoint.weights import Weight
from pretrain.checkpointing.optimizer_shards import OptimizerShard
from pretrain.checkpointing.rank_files import CheckpointContents
from pretrain.checkpointing.selection import Checkpoint, Resume, RunIdentity
from pretrain.checkpointing.store import CheckpointStore

_DRAIN_SECONDS = 5.0  # for a running save to finish when this rank alone fails
_NICENESS = 10
logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves the checkpoints of a run, on all ranks; leaving the context waits for the last save.

    At most one asynchronous save is in flight. Its `CheckpointError`, the same on every rank, is
    raised by the next `save` or `wait`; nothing was published then.

    Args:
        store: asynchronous saves need one whose ranks have a process group of their own, because
            its collectives run concurrently with those of the main thread.
        progress: called with each activity that this rank begins (`Watchdog.progress`).
        advance: called with the parts of these activities (`Watchdog.advance`).
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        asynchronous: bool,
        progress: Callable[[str], object],
        advance: Callable[[str], object] = lambda part: None,
    ) -> None:
        self._store, self._asynchronous = store, asynchronous
        self._progress, self._advance = progress, advance
        self._buffers = HostBuffers()
        self._running: _BackgroundSave | None = None

    @property
    def identity(self) -> RunIdentity:
        return self._store.identity

    def find(
        self, resume: Resume, *, order: Callable[[list[int]], list[int]] = list
    ) -> Checkpoint | None:
        """See `CheckpointStore.find`; a save in flight is published first."""
        self.wait()
        self._progress("searching for a checkpoint")
        return self._store.find(resume, progress=self._advance, order=order)

    def return_to(self, checkpoint: Checkpoint, skipped: Sequence[SkippedData]) -> Checkpoint:
        """See `CheckpointStore.return_to`; a save in flight is published first."""
        self.wait()
        self._progress(f"deleting checkpoints after step {checkpoint.step}")
        return self._store.return_to(checkpoint, skipped)

    def save(self, contents: CheckpointContents) -> None:
        """Write and publish now, or wait for the previous save, copy, and do so in the background.

        Raises:
            CheckpointError: this save, or the previous asynchronous one, was not published.
        """
        if not self._asynchronous:
            self._progress(f"saving step {contents.step}")
            published = f"publishing step {contents.step}"
            written = partial(self._progress, published)
            self._store.save(contents, written=written, progress=self._advance)
            return
        self.wait()
        self._progress(f"copying step {contents.step} to host memory")
        self._running = _BackgroundSave(self._store, snapshot(contents, self._buffers))
        self._running.start()

    def wait(self) -> None:
        """Wait until every save is published.

        Raises:
            CheckpointError: the save in flight failed, on every rank alike.
        """
        running = self._running
        if running is None:
            return
        self._progress(f"waiting for the save of step {running.step}")
        running.written.wait()
        # A rank that gets here is not the one that blocks the others.
        self._progress(f"waiting for step {running.step} to be published")
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
        """After an error let the save in flight finish; its own error does not hide the first."""
        running = self._running
        if error is None or running is None:
            self.wait()
            return
        self._progress(f"waiting for the save of step {running.step}")
        # An error agreed on by all ranks brings all of them here. After an error of this rank alone
        # others may be dead, and this rank must exit so that its launcher notices.
        running.join(None if isinstance(error, AgreedError) else _DRAIN_SECONDS)
        if running.is_alive():
            logger.warning("the save of step %d is given up", running.step)
        elif running.error is not None:
            logger.warning("a save failed, too: %s", one_line(running.error))


class _BackgroundSave(threading.Thread):
    """One save. `written`: this rank has written its part or failed; `error`: what it raised."""

    def __init__(self, store: CheckpointStore, contents: CheckpointContents) -> None:
        # A daemon: the process does not wait for a save that was given up.
        super().__init__(name=f"save of step {contents.step}", daemon=True)
        self.step = contents.step
        self.written = threading.Event()
        self.error: BaseException | None = None
        self._save = partial(store.save, contents, written=self.written.set)

    def run(self) -> None:
        _lower_priority()
        try:
            self._save()
        except BaseException as error:  # raised again by the main thread
            self.error = error
        finally:
            self.written.set()


def _lower_priority() -> None:
    """Lower the priority of this thread, so that hashing does not slow down training."""
    if sys.platform == "linux":  # elsewhere threads have no own priority
        thread = threading.get_native_id()
        lower = min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, 19)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, lower)


class HostBuffers:
    """Host buffers for a copy of what a rank writes; allocated by the first save, then reused.

    Copies from an accelerator are asynchronous and go to pinned memory (torch allocates the next
    power of two per tensor); `synchronize` waits for all of them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._is_copying = False

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy `tensor` to buffer `name`; complete after `synchronize`, valid until reused."""
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
    """Copy `contents`, unaffected by later steps; collective, as loading weights is.

    A rank copies what it will write, and the weights to compare it with. An error is raised again
    where the copy would be written, so that all ranks get there and agree on the failure.
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
    """The same weights, loading from copies; without `keep` only take part in the loading."""
    held = []
    for weight in weights:
        tensor = weight.load()
        if not keep:
            continue
        load: Callable[[], Tensor]
        try:
            load = partial(_same, buffers.copy(f"{folder}/{weight.name}", tensor))
        except RuntimeError as error:  # out of memory; the other ranks keep loading
            load = partial(_raise, error)
        held.append(weight._replace(load=load))
    return held


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _raise(error: Exception) -> NoReturn:
    raise error
