"""Writing and atomic publishing of checkpoints.

A save writes under a temporary name, flushes every file, and publishes by one rename after every
rank has reported success.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from parallel.checkpoint.errors import CheckpointError, one_line
from parallel.checkpoint.file_modes import refuse_if_others_can_write
from parallel.checkpoint.lock import RunLock
from parallel.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
)
from parallel.checkpoint.rollback_record import Rollbacks, SkippedData
from parallel.checkpoint.storage import Storage, fault_hook
from parallel.checkpoint.weight_slices import WeightPlace, WeightsTable
from pretrain.checkpointing.directory import delete, point_latest_to, steps_in
from pretrain.checkpointing.index import (
    FOLDER,
    INDEX_NAME,
    CheckpointIndex,
    join_headers,
    parse_header,
)
from pretrain.checkpointing.optimizer_shards import StoredOptimizer
from pretrain.checkpointing.rank_files import CheckpointContents, RankFiles, Written
from pretrain.checkpointing.retention import surplus
from pretrain.checkpointing.rollbacks import complete_interrupted, forget, roll_back
from pretrain.checkpointing.selection import (
    Checkpoint,
    Resume,
    RunIdentity,
    find_checkpoint,
)
from pretrain.distributed.consensus import RankGroup

_TEMPORARY = re.compile(
    r"\.(tmp|delete)-step_[0-9]+-[0-9a-f]+|\.(latest|rollbacks\.json)-[0-9a-f]+"
)
_PACKAGES = ("torch", "deepspeed", "megatron-core", "safetensors", "numpy")
logger = logging.getLogger(__name__)


def _ignore(part: str) -> None:
    """Progress that nobody watches."""


class CheckpointStore:
    """The checkpoints of one run, on all of its ranks: every method is collective.

    Args:
        keep: number of newest checkpoints to keep, at least 1.
        keep_every: also keep those of steps that are multiples of it.
        skip_before: also keep what a rollback needs that skips so many steps before a loss spike
            (`retention.surplus`); None: there are no rollbacks.

    Raises:
        CheckpointError: another job uses the run directory, or it cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        identity: RunIdentity,
        keep: int,
        keep_every: int | None = None,
        skip_before: int | None = None,
        ranks: RankGroup = RankGroup(),  # noqa: B008 - immutable
        storage: Storage | None = None,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep={keep} would keep nothing: set it to 1 or more")
        self.run_dir = run_dir
        self.directory = run_dir / "checkpoints"
        self.identity = identity
        self._keep, self._keep_every, self._skip_before = keep, keep_every, skip_before
        self._ranks = ranks
        self._storage = storage or Storage(hook=fault_hook(os.environ, ranks.rank))
        self._files = RankFiles(ranks.rank, self._storage)
        self._trusted: set[int] = set()  # verified by `find` or written by `save`
        self._lock: RunLock | None = None
        self._rollbacks: Rollbacks | None = None  # on rank 0
        self._ranks.run_on_rank0(self._open)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def find(
        self,
        resume: Resume,
        *,
        progress: Callable[[str], object] = _ignore,
        order: Callable[[list[int]], list[int]] = list,
    ) -> Checkpoint | None:
        """See `selection.find_checkpoint`."""
        found = find_checkpoint(
            self.run_dir,
            resume,
            identity=self.identity,
            ranks=self._ranks,
            progress=progress,
            order=order,
        )
        skipped = self._ranks.run_on_rank0(self._skipped)
        if found is None:
            return None
        self._trusted.add(found.step)
        return found._replace(skipped=skipped)

    def return_to(self, checkpoint: Checkpoint, skipped: Sequence[SkippedData]) -> Checkpoint:
        """Make a checkpoint that `find` has returned the newest again, by deleting newer ones.

        `skipped`: data that the run skips from there on, those of earlier rollbacks included; they
        outlive the process. See `checkpointing.rollbacks` for what an interruption leaves.

        Raises:
            CheckpointError: on every rank; this process must not go on.
        """
        step, skipped = checkpoint.step, tuple(skipped)
        self._ranks.run_on_rank0(lambda: self._return_to(step, skipped))
        # The steps after it will be saved anew.
        self._trusted = {each for each in self._trusted if each <= step}
        return checkpoint._replace(skipped=skipped)

    def save(
        self,
        contents: CheckpointContents,
        *,
        written: Callable[[], object] = lambda: None,
        progress: Callable[[str], object] = _ignore,
    ) -> Path:
        """Write and publish a checkpoint, then delete those beyond retention.

        Args:
            written: called once this rank has written its part and waits for the others.
            progress: called with each file that it begins to read back, and before that with each
                group of files that it begins to write.

        Raises:
            CheckpointError: a rank failed; nothing was published and nothing deleted.
        """
        path = self._path(contents.step)
        if contents.step in self._trusted:
            return path
        temporary = self._ranks.run_on_rank0(lambda: self._begin(contents))
        report, failure = self._files.write(temporary, contents, progress)
        written()
        reports = self._ranks.gather(report)
        failure = self._ranks.first_error(failure)
        self._ranks.run_on_rank0(lambda: self._publish(contents, temporary, reports, failure))
        self._trusted.add(contents.step)
        self._ranks.run_on_rank0(lambda: self._retain(contents.step))
        return path

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step}"

    def _skipped(self) -> tuple[SkippedData, ...]:
        """Rank 0: the data that rollbacks skip; none in a run that starts from the beginning."""
        if self._rollbacks is not None and not steps_in(self.directory):
            forget(self.directory, self._storage)
            self._rollbacks = None
        return () if self._rollbacks is None else self._rollbacks.skipped

    def _return_to(self, step: int, skipped: tuple[SkippedData, ...]) -> None:
        self._check_lock(f"the run has not returned to step_{step}")
        self._rollbacks = roll_back(self.directory, step, skipped, self._storage)

    def _check_lock(self, consequence: str) -> None:
        if self._lock is None or not self._lock.is_held():
            raise CheckpointError(
                f"{consequence}: the lock of {str(self.run_dir)!r} was taken away; "
                "let only one job use a run_dir"
            )

    def _open(self) -> None:
        """Rank 0: take the lock, probe that saves can be written, complete an interrupted rollback,
        remove interrupted saves."""
        self._lock = RunLock(self.run_dir)
        try:
            self.directory.mkdir(exist_ok=True)
            refuse_if_others_can_write(self.directory)
            probe = self.directory / f".latest-{os.urandom(4).hex()}"
            Storage().write(probe, b"can this be written?")  # not an operation of a save
            probe.unlink()
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"{str(self.directory)!r} cannot be written ({error.strerror}): choose another "
                "run_dir or free space"
            ) from error
        try:
            self._rollbacks = complete_interrupted(self.directory, self._storage)
        except (CheckpointError, OSError):
            self.close()
            raise
        for entry in sorted(self.directory.iterdir()):
            if _TEMPORARY.fullmatch(entry.name):
                logger.warning("removing %s, left by an interrupted save", entry)
                self._storage.remove_tree(entry)

    def _begin(self, contents: CheckpointContents) -> Path:
        """Rank 0: create the temporary directory; move aside an existing `step_N`."""
        step, token = contents.step, os.urandom(4).hex()
        target = self._path(step)
        if os.path.lexists(target):
            # `find` has skipped it as damaged, or the run would have resumed from it. Kept for
            # inspection.
            aside = self.directory / f"damaged-step_{step}-{token}"
            logger.warning("moving the unusable %s to %s", target.name, aside.name)
            self._storage.rename(target, aside)
        temporary = self.directory / f".tmp-step_{step}-{token}"
        folders = ["weights", "rng"] if contents.optimizer is None else ["weights", "rng", FOLDER]
        for directory in (temporary, *(temporary / folder for folder in folders)):
            self._storage.make_directory(directory)
        return temporary

    def _publish(
        self,
        contents: CheckpointContents,
        temporary: Path,
        reports: list[Written | None] | None,
        failure: str | None,
    ) -> None:
        """Rank 0: rename the directory to its final name, or remove it if any rank failed."""
        step = contents.step
        try:
            if failure is not None:
                raise CheckpointError(failure)
            written = [report for report in reports or [] if report is not None]
            index = self._write_index(contents, temporary, written)
            manifest = self._manifest(step, temporary, [*written, index])
            self._storage.write(temporary / MANIFEST_NAME, manifest.to_bytes())
            for directory in sorted({(temporary / name).parent for name in manifest.files}):
                self._storage.sync(directory)
            self._check_lock(f"step_{step} was not saved")
            self._storage.rename(temporary, self._path(step))
        except (OSError, ValueError) as error:
            self._remove_quietly(temporary)
            raise CheckpointError(one_line(error)) from error
        self._storage.sync(self.directory)
        self._point_latest_to(step)

    def _write_index(
        self, contents: CheckpointContents, temporary: Path, reports: Sequence[Written]
    ) -> Written:
        """Rank 0: write which file holds what, once no element is found missing or twice."""
        headers = ((rank, parse_header(report.header)) for rank, report in enumerate(reports))
        try:
            optimizer = join_headers(headers, directory=temporary / FOLDER)
            StoredOptimizer(temporary / FOLDER, optimizer).check()
        except CheckpointError as error:
            raise CheckpointError(f"step_{contents.step} was not saved: {error}") from error
        places: dict[str, WeightPlace] = {}
        for report in reports:
            for name, place in report.places.items():
                if places.setdefault(name, place) != place:
                    raise CheckpointError(
                        f"step_{contents.step} was not saved: weight {name!r} was written as "
                        f"{place} and {places[name]}, expected one; report this"
                    )
        _, pipeline_size, _, tensor_size = contents.position
        index = CheckpointIndex(optimizer, WeightsTable(pipeline_size, tensor_size, places))
        path = temporary / INDEX_NAME
        self._storage.write(path, index.to_bytes())
        return Written({INDEX_NAME: self._files.entry(path)}, "{}", {})

    def _manifest(self, step: int, temporary: Path, reports: Sequence[Written]) -> Manifest:
        files: dict[str, FileEntry] = {}
        sharding: dict[str, tuple[int | None, int | None]] = {}
        for report in reports:
            files |= report.files
            sharding |= {name: (dim, size) for name, (_, dim, size) in report.places.items()}
        for path in sorted(temporary.rglob("*")):  # files that DeepSpeed copies past its writer
            if path.is_file() and (name := path.relative_to(temporary).as_posix()) not in files:
                self._storage.sync(path)
                files[name] = self._files.entry(path)
        identity = self.identity
        return Manifest(
            format_version=FORMAT_VERSION,
            step=step,
            layout=identity.layout,
            config=identity.config,
            text=identity.text,
            fingerprints=identity.fingerprints,
            versions=_package_versions(),
            sharding=sharding,
            files=dict(sorted(files.items())),
        )

    def _point_latest_to(self, step: int) -> None:
        try:
            point_latest_to(self.directory, step, self._storage)
        except OSError as error:  # only a hint: the checkpoint itself is published
            logger.warning("step_%d is saved, but latest could not be written: %s", step, error)

    def _retain(self, newest: int) -> None:
        """Rank 0: apply retention, counting back from the checkpoint just written."""
        steps = [step for step in steps_in(self.directory) if step <= newest]
        doomed = surplus(
            steps, keep=self._keep, keep_every=self._keep_every, skip_before=self._skip_before
        )
        for step in doomed:
            try:
                delete(self.directory, step, self._storage)
            except OSError as error:
                logger.warning("old checkpoint step_%d could not be deleted: %s", step, error)

    def _remove_quietly(self, directory: Path) -> None:
        try:
            self._storage.remove_tree(directory)
        except OSError as error:
            logger.warning("%s could not be removed: %s", directory, error)


@cache  # each lookup parses a metadata file
def _package_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
