"""The DeepSpeed part of a checkpoint: optimizer shards and engine state."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint.errors import CheckpointError, one_line
from pretrain.engine.deepspeed_moe import restore_experts, without_moe_checkpoint_files

ENGINE_TAG = "engine"
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


@dataclass
class EngineWrites:
    """Files written by this rank's engine, and its first write error."""

    paths: list[Path] = field(default_factory=list)
    error: CheckpointError | None = None


def save_engine_state(
    engine: Any, directory: Path, *, client_state: Mapping[str, Any] | None = None
) -> list[Path]:
    """Let DeepSpeed write `directory/engine` (collective); returns the files of this rank.

    Raises:
        CheckpointError: this rank's write failed; the other ranks have finished theirs.
    """
    with _observed_writes(engine.checkpoint_engine) as writes, without_moe_checkpoint_files(engine):
        engine.save_checkpoint(
            str(directory), tag=ENGINE_TAG, client_state=dict(client_state or {}), save_latest=False
        )
    # DeepSpeed leaves executable scripts beside its files; `models.convert` replaces them.
    for name in _SCRIPTS if engine.global_rank == 0 else ():
        (directory / name).unlink(missing_ok=True)
    if writes.error is not None:
        raise writes.error
    return writes.paths


def load_engine_state(engine: Any, directory: Path) -> dict[str, Any]:
    """Restore weights, optimizer and step counters (collective); returns the client state.

    Call it only on what `CheckpointStore.find` has verified: the files are torch pickles.

    Raises:
        CheckpointError: there is nothing to load, or a file holds more than DeepSpeed writes.
    """
    loaded = None
    if any((directory / ENGINE_TAG).glob("*.pt")):  # DeepSpeed asserts this without a message
        with without_moe_checkpoint_files(engine), _harmless_reads(engine.checkpoint_engine):
            loaded, client_state = engine.load_checkpoint(str(directory), tag=ENGINE_TAG)
    if loaded is None:  # it would silently keep the initial weights
        raise CheckpointError(f"{str(directory / ENGINE_TAG)!r} holds no DeepSpeed checkpoint")
    restore_experts(engine)
    return client_state


@contextmanager
def _harmless_reads(checkpoint_engine: Any) -> Iterator[None]:
    """Restrict DeepSpeed's unpickling to tensors, plain values and the classes of `_classes`.

    It loads with weights_only=False (torch_checkpoint_engine.py of 0.19.8), so whoever can write
    the file could run code as the user.
    """
    original = checkpoint_engine.load

    def load(path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals(_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # torch raises errors of many types for such files
            found = re.search(r"GLOBAL \S+", str(error))
            what = found[0] if found else one_line(error)[:150]
            raise CheckpointError(
                f"{path!r} is not what DeepSpeed writes ({what}), and "
                "nothing else is unpickled; resume from another checkpoint"
            ) from error

    checkpoint_engine.load = load
    try:
        yield
    finally:
        checkpoint_engine.load = original


def _classes() -> list[Any]:
    """Classes in files of DeepSpeed 0.19.8, besides tensors; unpickling them has no effects."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def _observed_writes(checkpoint_engine: Any) -> Iterator[EngineWrites]:
    """Record every file that DeepSpeed writes on this rank, and defer write errors to the end.

    DeepSpeed's save contains barriers: a rank that raised on a full disk would leave the others
    waiting in one. This way all of them finish, and the error is raised afterwards.
    """
    writes = EngineWrites()
    original = checkpoint_engine.save

    def save(state_dict: Any, path: str) -> Any:
        writes.paths.append(Path(path))
        try:
            return original(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            where = CheckpointError(f"{path!r} cannot be written: {one_line(error)}")
            writes.error = writes.error or where
            return None

    checkpoint_engine.save = save
    try:
        yield writes
    finally:
        checkpoint_engine.save = original
