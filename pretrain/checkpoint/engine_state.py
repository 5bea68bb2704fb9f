"""The DeepSpeed part of a checkpoint: optimizer shards and engine state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.experts import files_without_experts, restore_experts

ENGINE_TAG = "engine"
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


@dataclass
class EngineWrites:
    """What this rank's engine wrote, and the first error it met doing so."""

    paths: list[Path] = field(default_factory=list)
    error: OSError | RuntimeError | None = None


def save_engine_state(
    engine: Any, directory: Path, *, client_state: Mapping[str, Any] | None = None
) -> list[Path]:
    """Collective: let DeepSpeed write `directory/engine`; returns the files that this rank wrote.

    Raises:
        OSError, RuntimeError: this rank's write failed; the other ranks have finished theirs.
    """
    with _observed_writes(engine.checkpoint_engine) as writes, files_without_experts(engine):
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
    """Collective: restore weights, optimizer and step counters; returns the client state.

    DeepSpeed unpickles these files: call it only on what `CheckpointStore.find` has verified.

    Raises:
        CheckpointError: there is nothing to load.
    """
    loaded = None
    if any((directory / ENGINE_TAG).glob("*.pt")):  # DeepSpeed asserts this without a message
        with files_without_experts(engine):
            loaded, client_state = engine.load_checkpoint(str(directory), tag=ENGINE_TAG)
    if loaded is None:  # where it finds nothing it goes on with the initial weights
        raise CheckpointError(f"{str(directory / ENGINE_TAG)!r} holds no DeepSpeed checkpoint")
    restore_experts(engine)
    return client_state


@contextmanager
def _observed_writes(checkpoint_engine: Any) -> Iterator[EngineWrites]:
    """Note every file that DeepSpeed writes on this rank, and hold back a failure until the end.

    DeepSpeed's save contains barriers. A rank that left it at a full disk would leave the others
    waiting in one; this way all arrive, and the failure is told afterwards.
    """
    writes = EngineWrites()
    original = checkpoint_engine.save

    def save(state_dict: Any, path: str) -> Any:
        writes.paths.append(Path(path))
        try:
            return original(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            writes.error = writes.error or error
            return None

    checkpoint_engine.save = save
    try:
        yield writes
    finally:
        checkpoint_engine.save = original
