"""Disks that are full, broken or read-only: the old checkpoint stays, the path is named."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, cast

import pytest
import torch

# A run imports them late, and nobody may not read a Python that is root's.
import torch._dynamo
import torch.fx.experimental.symbolic_shapes

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import MANIFEST_NAME
from parallel.checkpoint.storage import Storage
from parallel.checkpoint.weights import Weight
from parallel.sharding import Sharding
from pretrain.checkpointing import CheckpointContents
from pretrain.checkpointing.index import INDEX_NAME, FlatRange
from pretrain.checkpointing.optimizer_shards import OptimizerShard
from tests.distributed import run_ranks
from tests.faults.deepspeed_alone import small_files
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, open_store
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data

KINDS = ("optimizer", "weights", "rng", "trainer.json", INDEX_NAME, MANIFEST_NAME)
NOBODY = 65534


def whole_contents(step: int) -> CheckpointContents:
    """A file of every kind, the optimizer's of more than a page."""
    elements = torch.full((4096,), float(step))
    element = Weight("w/master", (4096,), torch.float32, Sharding(), lambda: elements)
    span = FlatRange(
        shape=(4096,), dim=None, full_size=None, shard=0, num_shards=1, start=0, length=4096, step=1
    )
    return contents(step)._replace(optimizer=lambda: OptimizerShard([element], [], {"w": span}))


class Fault(NamedTuple):
    """An error of the disk: `operation` on a file of `kind`, after `share` of its bytes."""

    code: int
    kind: str
    operation: str = "write"
    share: float = 0.0


class FailingStorage(Storage):
    """A disk with one fault. `sizes`: of the files of a save without it."""

    def __init__(self, fault: Fault, sizes: dict[str, int]) -> None:
        super().__init__(hook=self._before)
        self._fault, self._sizes = fault, sizes

    def _before(self, operation: str, path: Path) -> None:
        if operation == self._fault.operation != "write" and self._is_meant(path):
            raise self._error(path)

    def _is_meant(self, path: Path) -> bool:
        return self._fault.kind in path.parts[-2:]

    def _error(self, path: Path | None = None) -> OSError:
        code = self._fault.code
        return OSError(code, os.strerror(code), *([] if path is None else [str(path)]))

    @contextmanager
    def create(self, path: Path) -> Iterator[BinaryIO]:
        with super().create(path) as file:
            if self._fault.operation == "write" and self._is_meant(path):
                limit = int(self._fault.share * (self._sizes[path.name] - 1))
                yield cast(BinaryIO, _FullFile(file, limit, self._error()))
            else:
                yield file


class _FullFile:
    def __init__(self, file: BinaryIO, limit: int, error: OSError) -> None:
        self._file, self._left, self._error = file, limit, error

    def write(self, data: bytes) -> int:
        written = self._file.write(data[: self._left])
        self._left -= written
        if written < len(data):
            raise self._error
        return written


def file_sizes(run_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in run_dir.rglob("*") if path.is_file()}


def begun(run_dir: Path) -> Path:
    store = open_store(run_dir)
    store.find("auto")
    store.save(whole_contents(1))
    store.close()
    return run_dir


def refusal(run_dir: Path, storage: Storage | None = None) -> str:
    """The error of a second save that fails; the first checkpoint is found after it."""
    store = open_store(run_dir, storage=storage)
    store.find("auto")
    with pytest.raises(CheckpointError) as failure:
        store.save(whole_contents(2))
    store.close()
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step_1"]
    store = open_store(run_dir)
    assert_holds(store.find("must"), 1)
    store.close()
    return str(failure.value)


WRITES = {
    f"{os.strerror(code)}, {place}": (code, share)
    for code, place, share in (
        (errno.ENOSPC, "first byte", 0.0),
        (errno.ENOSPC, "half", 0.5),
        (errno.ENOSPC, "last byte", 1.0),
        (errno.EDQUOT, "half", 0.5),
        (errno.EIO, "half", 0.5),
    )
}
OTHERS = {
    "Input/output error when a file is flushed": (errno.EIO, "fsync"),
    "Input/output error when a file is read back": (errno.EIO, "hash"),
    "No space left on device for the name of a file": (errno.ENOSPC, "open"),
    "Stale file handle when a file is flushed": (errno.ESTALE, "fsync"),
}


def fails_with(fault: Fault, run_dir: Path) -> None:
    said = refusal(begun(run_dir), FailingStorage(fault, file_sizes(run_dir)))
    assert os.strerror(fault.code) in said, said
    assert str(run_dir / "checkpoints") in said, said
    assert fault.kind in said, said
    assert "\n" not in said


def a_file_may_not_grow(run_dir: Path) -> None:
    begun(run_dir)
    with small_files(4096):
        said = refusal(run_dir)
    assert "File too large" in said, said
    assert str(run_dir / "checkpoints") in said, said


def a_full_file_system(run_dir: Path) -> None:
    """A tmpfs of 128 KiB, filled up beside the run."""
    with small_file_system(run_dir, size=1 << 17):
        begun(run_dir / "run")
        free = os.statvfs(run_dir).f_bavail * os.statvfs(run_dir).f_frsize
        (run_dir / "other").write_bytes(b"x" * (free - 3 * 4096))
        said = refusal(run_dir / "run")
    assert "No space left on device" in said, said
    assert str(run_dir / "run" / "checkpoints") in said, said


@contextmanager
def small_file_system(folder: Path, *, size: int, read_only: bool = False) -> Iterator[None]:
    """A tmpfs at `folder` that only this process sees; needs root."""
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    private, remounted = (
        (1 << 18) | (1 << 14),
        32 | 1,
    )  # MS_PRIVATE | MS_REC, MS_REMOUNT | MS_RDONLY
    target, options = str(folder).encode(), f"size={size}".encode()
    for call in (
        partial(libc.unshare, 0x20000),  # CLONE_NEWNS
        partial(libc.mount, b"none", b"/", None, private, None),
        partial(libc.mount, b"tmpfs", target, b"tmpfs", 0, options),
        *([partial(libc.mount, b"none", target, None, remounted, None)] * read_only),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    yield


def at_start(run_dir: Path) -> str:
    with pytest.raises(CheckpointError) as failure:
        open_store(run_dir)
    said = str(failure.value)
    assert str(run_dir)[:60] in said, said
    assert "\n" not in said
    return said


def a_read_only_file_system(folder: Path) -> None:
    with small_file_system(folder, size=1 << 17, read_only=True):
        assert "Read-only file system" in at_start(folder / "run")


def a_folder_of_somebody_else(folder: Path) -> None:
    folder.mkdir(mode=0o555)
    with as_nobody(folder):
        assert "Permission denied" in at_start(folder / "run")


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Root may write anywhere; pytest's folders are root's alone."""
    if os.getuid() != 0:
        yield
        return
    for parent in folder.parents:
        os.chmod(parent, 0o755)
        if parent.name.startswith("pytest-of-"):  # the outermost of them
            break
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def read_only_checkpoints(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoints").mkdir(mode=0o555)
    if os.getuid() == 0:
        os.chown(run_dir, NOBODY, NOBODY)


def checkpoints_of_somebody_else(folder: Path) -> None:
    """The run directory may be written, the folder in it may not."""
    read_only_checkpoints(folder / "run")
    with as_nobody(folder):
        assert "Permission denied" in at_start(folder / "run")


def a_file_in_the_place_of_the_run(folder: Path) -> None:
    folder.write_text("")
    assert "File exists" in at_start(folder)


def a_file_in_the_place_of_its_parent(folder: Path) -> None:
    folder.write_text("")
    assert "Not a directory" in at_start(folder / "run")


def a_name_that_is_too_long(folder: Path) -> None:
    assert "File name too long" in at_start(folder / ("x" * 300))


def a_file_system_that_is_already_full(folder: Path) -> None:
    with small_file_system(folder, size=1 << 17):
        begun(folder / "run")
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "other").write_bytes(b"x" * free)
        assert "No space left on device" in at_start(folder / "run")
        (folder / "other").unlink()
        store = open_store(folder / "run")
        assert_holds(store.find("must"), 1)


def every_kind(run_dir: Path, *, code: int, operation: str = "write", share: float = 0.0) -> None:
    for kind in KINDS:
        if (operation, kind) != ("hash", MANIFEST_NAME):  # nothing says what is in the manifest
            fails_with(Fault(code, kind, operation, share), run_dir.with_name(f"run_{kind}"))


CASES: dict[str, Callable[[Path], None]] = {
    **{n: partial(every_kind, code=code, share=share) for n, (code, share) in WRITES.items()},
    **{n: partial(every_kind, code=code, operation=each) for n, (code, each) in OTHERS.items()},
    "a limit on the size of files": a_file_may_not_grow,
    "a full file system": a_full_file_system,
    "a read-only file system": a_read_only_file_system,
    "a file system that is full at the start": a_file_system_that_is_already_full,
    "a folder of somebody else": a_folder_of_somebody_else,
    "checkpoints of somebody else": checkpoints_of_somebody_else,
    "a file in the place of the run": a_file_in_the_place_of_the_run,
    "a file in the place of its parent": a_file_in_the_place_of_its_parent,
    "a name that is too long": a_name_that_is_too_long,
}
NEED_ROOT = (
    "a full file system",
    "a read-only file system",
    "a file system that is full at the start",
)


def test_no_fault_of_a_disk_costs_the_old_checkpoint(tmp_path: Path) -> None:
    """Each in a process of its own, which may give up its rights."""
    tried = [name for name in CASES if name not in NEED_ROOT or may_mount()]
    for number, name in enumerate(tried):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_ranks(CASES[name], 1, folder / "run", init=False)
    print(f"\ndisk: {len(tried)} of {len(tried)} cases: {', '.join(tried)}")
    assert len(tried) >= 12


def may_mount() -> bool:
    return os.getuid() == 0 and ctypes.CDLL(None).unshare(0) == 0


def refused_run(config) -> str:
    """`run`, whose folder for checkpoints cannot be written; before its first step."""
    import pretrain.engine.engine

    def train_step(self, *args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a step was taken")

    pretrain.engine.engine.PlainEngine.train_step = train_step  # type: ignore[method-assign]
    with as_nobody(Path(config.run_dir)), pytest.raises(CheckpointError) as failure:
        run_training(config, "configs/ds/zero1.json")
    return str(failure.value)


def test_a_run_that_could_not_save_takes_no_step(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = tiny_run(tmp_path)
    read_only_checkpoints(Path(config.run_dir))
    (said,) = run_ranks(refused_run, 1, config, init=False)
    assert "Permission denied" in said
    assert str(Path(config.run_dir, "checkpoints")) in said
