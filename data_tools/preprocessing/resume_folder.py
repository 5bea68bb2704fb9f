"""OUTPUT.work: what an unfinished run of `preprocess` has done, for the next run to go on from.

lock.partial   held by rank 0 while it runs
settings.json  what shards depend on beside their input
NAME.*         finished shards (shards.py)
publishing     shards are being joined: a half OUTPUT is this run's own
published      OUTPUT is complete; only this folder is left to remove
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

Settings = Mapping[str, Any]


class WorkFolder:
    """The work folder of an output; created by `claim` or by ranks that meet in it."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".work")
        self._output = output
        self._lock: BinaryIO | None = None
        self._settings: Settings = {}
        self._shards: Sequence[Shard] = ()

    def plan(self, settings: Settings, shards: Sequence[Shard]) -> None:
        """Say what is to be done."""
        self._settings, self._shards = settings, shards

    def claim(self, *, overwrite: bool) -> None:
        """Take the output for this process alone, and check that finished shards are this run's.

        Raises:
            DataError: another process has it, the output exists, or the folder holds shards of
                other settings.
        """
        if not self.path.exists() and not overwrite:
            check_absent(self._output)
        self._lock = open_partial(self.path / "lock")
        if self.is_published():
            return
        if self._has("published"):  # by a run of another plan, whose output is another's to us
            self._remove_contents()
            (self.path / "published").unlink()
        if not self._has("publishing") and not overwrite:
            check_absent(self._output)
        self._check_settings()

    def num_finished(self) -> int:
        """How many of the shards are finished."""
        return sum(report_path(self.path, shard).exists() for shard in self._shards)

    def mark_publishing(self) -> None:
        """From here on, files of the output that exist are this run's."""
        self._write("publishing", b"")

    def mark_published(self) -> None:
        """The output is complete."""
        self._write("published", self._fingerprint())

    def is_published(self) -> bool:
        """Whether an earlier run of the same plan completed the output."""
        published = self.path / "published"
        return self._has("published") and published.read_bytes() == self._fingerprint()

    def remove(self) -> None:
        """Remove it; `published` last, so that a kill in between leaves the truth."""
        self._remove_contents()
        shutil.rmtree(self.path)

    def _remove_contents(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("published", "lock.partial"):
                path.unlink()

    def release(self) -> None:
        """Leave finished shards, of whatever run, to the next one; and nothing without any."""
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
                    f"one has {value}; give the command that began it, or remove the folder"
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
