"""Files and bytes that four ranks read when a run goes on, or begins with the weights of another.

Counted where safetensors opens a file and returns a slice. "Needed" are the masters and moments
that a rank updates, or its slices of the weights, so 1.00 is the least that can be read.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.checkpoint.file_hashes import hash_files
from pretrain import run
from pretrain.config import RunConfig
from pretrain.engine.build import build_engine
from pretrain.engine.deepspeed_optimizer import OptimizerView
from pretrain.engine.initial_weights import InitialWeights
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ, VOCAB, tiny_run, write_data

RANKS, ROUNDS = 4, 3
FILES, FILE_BYTES = 4, 100_000_000
# A third of a block's weights is cut along dimension 1, as in the sizes of llama.
MODEL = {
    "family": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_layers": 6,
    "num_heads": 8,
    "num_kv_heads": 8,
    "max_position_embeddings": SEQ,
}
LAYOUTS = {
    "tensor 4": {"parallel__tensor": 4, "training__batch_size": 4},
    "tensor 2 x data 2": {"parallel__tensor": 2, "training__batch_size": 2},
    "pipeline 2 x tensor 2": {
        "parallel__pipeline": 2,
        "parallel__tensor": 2,
        "training__batch_size": 4,
    },
}
RESUMED = [
    ("tensor 4", "tensor 4"),
    ("tensor 2 x data 2", "tensor 2 x data 2"),
    ("pipeline 2 x tensor 2", "pipeline 2 x tensor 2"),
    ("tensor 4", "tensor 2 x data 2"),
    ("tensor 2 x data 2", "tensor 4"),
]
BEGUN = [("tensor 4", "tensor 4"), ("tensor 2 x data 2", "tensor 4")]
# Every module that opens safetensors files in a run.
OPENERS = ("parallel.checkpoint.tensor_file",)


class Reads(NamedTuple):
    """Of one rank: files opened, bytes of headers, bytes of tensors, bytes needed, seconds."""

    opens: int
    headers: int
    tensors: int
    needed: int
    seconds: float


class _Counter:
    """A stand-in for `safe_open` that counts."""

    def __init__(self) -> None:
        self.opens = self.headers = self.tensors = 0

    def install(self) -> None:
        for name in OPENERS:
            module = importlib.import_module(name)
            module.safe_open = self._opener(module.safe_open)  # type: ignore[attr-defined]

    def _opener(self, safe_open: Any) -> Any:
        def opened(path: Path, framework: str) -> _File:
            with open(path, "rb") as file:
                self.headers += 8 + int.from_bytes(file.read(8), "little")
            self.opens += 1
            return _File(safe_open(path, framework=framework), self)

        return opened


class _File:
    def __init__(self, file: Any, counter: _Counter) -> None:
        self._file, self._counter = file, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> Any:
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name), self._counter)


class _Slice:
    def __init__(self, stored: Any, counter: _Counter) -> None:
        self._stored, self._counter = stored, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, index: Any) -> Any:
        found = self._stored[index]
        self._counter.tensors += found.numel() * found.element_size()
        return found


def _restored(config: RunConfig) -> Reads:
    """Resume up to the first step."""
    reads: list[Reads] = []
    restore = TrainLoop.restore

    def counted(self: TrainLoop, checkpoint: Any) -> None:
        counter = _Counter()
        counter.install()
        begin = time.perf_counter()
        restore(self, checkpoint)
        seconds = time.perf_counter() - begin
        view = OptimizerView(self.engine._deepspeed, data_size=self.ctx.data.size)
        needed = 12 * sum(fragment.length for fragment in view.fragments)
        reads.append(Reads(counter.opens, counter.headers, counter.tensors, needed, seconds))

    TrainLoop.restore = counted  # type: ignore[method-assign]
    TrainLoop.run = lambda self, stop: EXIT_COMPLETED  # type: ignore[method-assign]
    run_training(config, "configs/ds/zero1.json")
    return reads[0]


def _begun(config: RunConfig) -> Reads:
    """Build a model with the weights of another run, which rank 0 has checked before."""
    reads: list[Reads] = []
    counter, init = _Counter(), InitialWeights.__init__

    def counted_init(self: InitialWeights, *arguments: Any) -> None:
        counter.install()
        init(self, *arguments)

    def counted(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        engine = build_engine(*arguments, **options)
        seconds = time.perf_counter() - begin
        needed = sum(p.numel() * 4 for p in engine.module.parameters())
        reads.append(Reads(counter.opens, counter.headers, counter.tensors, needed, seconds))
        return engine

    InitialWeights.__init__ = counted_init  # type: ignore[method-assign, assignment]
    run.build_engine = counted  # type: ignore[assignment]
    TrainLoop.run = lambda self, stop: EXIT_COMPLETED  # type: ignore[method-assign]
    run_training(config, "configs/ds/zero1.json")
    return reads[0]


def tables() -> Iterator[Table]:
    """One table: opens and bytes of a rank, the mean and the most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        saved = {place: _saved(folder, place) for place in LAYOUTS}
        rows = []
        for title, entry, pairs in (
            ("resumed", _restored, RESUMED),
            ("begun with its weights", _begun, BEGUN),
        ):
            for old, new in pairs:
                found = [_round(folder, entry, saved[old], new) for _ in range(ROUNDS)]
                rows.append((f"{old}, {title} at {new}", *_row(found)))
    yield Table(
        f"Files and bytes of a rank, of {RANKS}",
        ("", "opens, most", "MB of headers", "MB of tensors", "over those needed", "seconds"),
        rows,
    )
    yield _hashing()


def _hashing() -> Table:
    """A model imported into files of 4 GB, made small: verified file by file, and side by side."""
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, f"{number}.bin") for number in range(FILES)]
        for path in paths:
            path.write_bytes(os.urandom(FILE_BYTES))
        contestants = {
            "one at a time": lambda: list(hash_files(paths, threads=1)),
            "side by side": lambda: list(hash_files(paths)),
        }
        seconds = interleaved(contestants, rounds=ROUNDS, warmup=1)
    size = FILES * FILE_BYTES / 1e6
    return Table(
        f"SHA-256 of {FILES} files, {size:.0f} MB together",
        ("", "MB/s", "ratio"),
        [
            (each, f"{size / median(taken):.0f}", ratio(seconds, each, "one at a time"))
            for each, taken in seconds.items()
        ],
    )


def _config(folder: Path, run_dir: Path, place: str, **changes: Any) -> RunConfig:
    return tiny_run(
        folder, run_dir=str(run_dir), model=MODEL, training__warmup_steps=0,
        evaluation__interval=9, checkpoint__interval=1,
        **LAYOUTS[place], **changes,
    )  # fmt: skip


def _saved(folder: Path, place: str) -> Path:
    run_dir = folder / place.replace(" ", "_")
    config = _config(folder, run_dir, place, training__max_steps=1)
    run_ranks(run_training, RANKS, config, "configs/ds/zero1.json", init=False)
    return run_dir


def _round(folder: Path, entry: Any, run_dir: Path, new: str) -> list[Reads]:
    if entry is _restored:
        config = _config(folder, run_dir, new, training__max_steps=2)
    else:
        begun = {"training__init_from": str(run_dir), "training__max_steps": 2}
        config = _config(folder, folder / "new", new, **begun)
    return run_ranks(entry, RANKS, config, init=False)


def _row(found: list[list[Reads]]) -> tuple[str, ...]:
    ranks = found[0]
    seconds = min(max(rank.seconds for rank in each) for each in found)
    headers, tensors = (mean(r.headers for r in ranks), mean(r.tensors for r in ranks))
    return (
        f"{max(rank.opens for rank in ranks)}",
        f"{headers / 1e6:.2f}",
        f"{tensors / 1e6:.1f}",
        f"{tensors / mean(rank.needed for rank in ranks):.2f}",
        f"{seconds:.2f}",
    )
