"""OUTPUT.work: finished shards of an unfinished run of `preprocess`, which the next run resumes.

lock.partial   held by rank 0 while it runs
settings.json  settings that shards depend on besides their input
NAME.*         finished shards (shards.py)
publishing     shards are being joined: a partial OUTPUT belongs to this run
published      OUTPUT is complete; only this folder remains to be removed
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.corpus.indexed_writer import check_absent
from data_tools.errors import DataError
from data_tools.files import open_partial, replace_atomically
from data_tools.preprocessing.shards import Shard, report_path

ResumeSettings = Mapping[str, Any]


class ResumeFolder:
    """The work folder of an output; created by `claim` or by ranks that communicate through it."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".work")
        self._output = output
        self._lock: BinaryIO | None = None
        self._settings: ResumeSettings = {}
        self._shards: Sequence[Shard] = ()

    def plan(self, settings: ResumeSettings, shards: Sequence[Shard]) -> None:
        """Set the settings and shards of this run."""
        self._settings, self._shards = settings, shards

    def claim(self, *, overwrite: bool) -> None:
        """Lock the output for this process, and check that finished shards belong to this run.

        Raises:
            DataError: another process holds the lock, the output exists, or the folder holds shards
                of other settings.
        """
        if not self.path.exists() and not overwrite:
            check_absent(self._output)
        self._lock = open_partial(self.path / "lock")
        if self.is_published():
            return
        if self._has("published"):  # by a run of other settings, whose output is not ours
            self._remove_contents()
            (self.path / "published").unlink()
        if not self._has("publishing") and not overwrite:
            check_absent(self._output)
        self._check_settings()

    def num_finished(self) -> int:
        """Return the number of finished shards of this run."""
        return sum(report_path(self.path, shard).exists() for shard in self._shards)

    def mark_publishing(self) -> None:
        """Record that existing output files belong to this run from here on."""
        self._write("publishing", b"")

    def mark_published(self) -> None:
        """Record that the output is complete."""
        self._write("published", self._fingerprint())

    def is_published(self) -> bool:
        """Return whether an earlier run of the same settings and shards completed the output."""
        published = self.path / "published"
        return self._has("published") and published.read_bytes() == self._fingerprint()

    def remove(self) -> None:
        """Remove the folder, `published` last, so that a kill in between leaves a true record."""
        self._remove_contents()
        shutil.rmtree(self.path)

    def _remove_contents(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("published", "lock.partial"):
                path.unlink()

    def release(self) -> None:
        """Release the lock; keep the folder only if it holds finished shards, of any run."""
        if self._lock is None:
            return
        if self.path.exists() and not any(self.path.glob("*.report")):
            self.remove()
        self._lock.close()

    def _check_settings(self) -> None:
        if not self._has("settings.json"):
            self._write("settings.json", json.dumps(self._settings).encode())
            return
        found = json.loads((self.path / "settings.json").read_bytes())
        for name, value in self._settings.items():
            if found.get(name) != value:
                raise DataError(
                    f"{self.path} holds an unfinished run with {name} {found.get(name)}, but this "
                    f"one has {value}; run the original command again, or remove the folder"
                )

    def _has(self, name: str) -> bool:
        return (self.path / name).exists()

    def _write(self, name: str, content: bytes) -> None:
        with replace_atomically(self.path / name) as file:
            file.write(content)

    def _fingerprint(self) -> bytes:
        names = [shard.name for shard in self._shards]
        plan = json.dumps([self._settings, names])
        return hashlib.sha256(plan.encode()).hexdigest().encode()
