"""`data_tools.convert` between two formats of 1 GB against `cp` of the ids, and its memory.

`cp` copies the file with the ids alone; it leaves it to the system to write them to the disk, which
`sync` waits for. Ours also finds the documents, hashes what is written and waits for the disk.
Before each, what the others wrote is removed and the disk at rest: else what `cp` left to be
written would be written in our time.

Then formats of other projects against their own packages (`make ecosystem`; rows are left out where
they are missing), and training that reads in place against the same corpus as a copy.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.config import DataConfig
from data_tools.corpus.indexed import IndexedDataset
from data_tools.formats.copying import Copy, copy_corpus
from data_tools.formats.manifest import manifest_path
from data_tools.loading.builders import build_train_loader
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.data_tools.formats.conversions import streaming_base

GIGABYTES = float(os.environ.get("CONVERSION_GIGABYTES", "1"))
ROUNDS, DOCUMENT_TOKENS, EOD = 5, 1000, 50_256
# What is converted is the Megatron corpus, or what the row before made of it.
PAIRS = (
    ("nanogpt", "megatron"),
    ("megatron", "nanogpt"),
    ("megatron", "llmc"),
    ("megatron", "olmo"),
    ("olmo", "megatron"),
    ("megatron", "datatrove"),
    ("datatrove", "olmo"),
    ("megatron", "litdata"),
    ("litdata", "megatron"),
    ("megatron", "mds"),
    ("mds", "megatron"),
    ("megatron", "arrow"),
    ("arrow", "megatron"),
    ("megatron", "parquet"),
    ("parquet", "megatron"),
)
PACKAGE_TOKENS, WINDOW, NUM_WINDOWS = 20_000_000, 2048, 4096
_SUFFIXES = {"nanogpt": ".bin", "olmo": ".npy", "datatrove": ".ds", "parquet": ".parquet"}


def tables() -> Iterator[Table]:
    """Ratios of speed, then memory at two sizes."""
    with tempfile.TemporaryDirectory() as folder:
        yield _speed(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield _in_place(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield _packages(Path(folder))
    yield _memory()


def write_stream(path: Path, num_bytes: int) -> None:
    """A nanoGPT file of documents of about DOCUMENT_TOKENS ids."""
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        for begin in range(0, num_bytes, 1 << 24):
            count = (min(1 << 24, num_bytes - begin)) // 2
            ids = generator.integers(0, EOD, count, dtype=np.uint16)
            ids[generator.integers(0, count, count // DOCUMENT_TOKENS)] = EOD
            ids[-1] = EOD
            file.write(ids.tobytes())


def _speed(folder: Path) -> Table:
    stream = folder / "nanogpt.bin"
    write_stream(stream, int(GIGABYTES * 1e9) // 2 * 2)
    rows = []
    for source, target in PAIRS:
        output = folder / f"from_{source}_{target}"
        copied = folder / "copied"
        job = Copy(source, target, [str(_input(folder, source))], str(output))
        if not {"nanogpt", "llmc"}.isdisjoint((source, target)):
            job = job._replace(read=job.read._replace(eod=EOD))

        def settle(output: Path = output, copied: Path = copied) -> None:
            _remove(output)
            copied.unlink(missing_ok=True)
            os.sync()

        contestants: dict[str, Callable[[], object]] = {
            "convert": partial(_convert, job, output),
            "cp": partial(_cp, stream, copied),
            "cp and sync": partial(_cp, stream, copied, sync=True),
        }
        seconds = interleaved(contestants, rounds=ROUNDS, warmup=1, before=settle)
        settle()
        if target != "nanogpt" and not _input(folder, target).exists():
            _convert(job, output)
            _keep(output, folder / target)
        against = [ratio(seconds, "convert", other) for other in ("cp", "cp and sync")]
        rows.append((f"{source} to {target}", *against))
    return Table(
        f"{GIGABYTES:g} GB of uint16, documents of {DOCUMENT_TOKENS} ids, {ROUNDS} rounds in turn",
        ("", "speed over cp", "over cp and sync"),
        rows,
    )


def _input(folder: Path, kind: str) -> Path:
    return folder / f"{kind}{_SUFFIXES.get(kind, '.idx' if kind == 'megatron' else '')}"


def _files(output: Path) -> list[Path]:
    names = (output.name, *(f"{output.name}.{end}" for end in ENDINGS))
    return [path for path in map(output.with_name, names) if path.exists()]


ENDINGS = ("bin", "idx", "json", "npy", "csv.gz", "ds", "ds.index", "parquet", "corpus.json")


def _keep(output: Path, name: Path) -> None:
    for path in _files(output):
        path.rename(name.with_name(path.name.replace(output.name, name.name, 1)))
    manifest_path(name).unlink(missing_ok=True)  # as files of other projects, which have none


def _remove(output: Path) -> None:
    for path in _files(output):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _convert(job: Copy, output: Path) -> None:
    _remove(output)
    source = job.inputs[0].removesuffix(".idx")
    copy_corpus(job._replace(inputs=[source]))


def _cp(source: Path, target: Path, *, sync: bool = False) -> None:
    subprocess.run(["cp", source, target], check=True)
    if sync:
        subprocess.run(["sync", target], check=True)


def _in_place(folder: Path) -> Table:
    """Windows/s of the loader of a run from a corpus in place, against its copy."""
    logging.getLogger("data_tools").setLevel(logging.ERROR)  # they have no sidecar
    stream = folder / "nanogpt.bin"
    write_stream(stream, 2 * PACKAGE_TOKENS)
    _convert(_job("nanogpt", "megatron", stream, folder / "megatron"), folder / "megatron")
    loaders = {"copy": _windows(folder / "megatron")}
    for kind in ("nanogpt", "datatrove", "olmo"):
        if kind != "nanogpt":
            copy_corpus(_job("megatron", kind, folder / "megatron", folder / kind))
        source, linked = folder / (kind + _SUFFIXES[kind]), folder / f"{kind}-linked"
        copy_corpus(_job(kind, "megatron", source, linked)._replace(in_place=True))
        loaders[kind] = _windows(linked)
    seconds = interleaved(loaders, rounds=ROUNDS, warmup=1)
    title = f"Training reads windows of {WINDOW} tokens at random places in the input itself"
    rows = [(kind, ratio(seconds, kind, "copy")) for kind in loaders if kind != "copy"]
    return Table(title, ("", "speed over a Megatron corpus"), rows)


def _job(source: str, target: str, given: Path, output: Path) -> Copy:
    job = Copy(source, target, [str(given)], str(output))
    return job._replace(read=job.read._replace(eod=EOD)) if source == "nanogpt" else job


def _windows(prefix: Path) -> Callable[[], object]:
    """Read NUM_WINDOWS windows as a run does."""
    section = {"train": [str(prefix)], "sequence_length": WINDOW, "num_workers": 0}
    loader = build_train_loader(
        DataConfig.model_validate(section),
        sequence_length=WINDOW,
        micro_batch_size=8,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=EOD + 1,
    )
    return lambda: [next(loader) for _ in range(NUM_WINDOWS // 8)]


class _Package(NamedTuple):
    """Another project's own way to write documents to a folder, and to read them one by one."""

    write: Callable[[Path, list[npt.NDArray[Any]]], object]
    open: Callable[[Path], Any]


def _mds() -> _Package:
    streaming = streaming_base()

    def write(folder: Path, documents: list[npt.NDArray[Any]]) -> None:
        columns = {"tokens": "ndarray:uint16"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for ids in documents:
                writer.write({"tokens": ids})

    return _Package(write, lambda folder: streaming.LocalDataset(str(folder)))


def _litdata() -> _Package:
    from litdata.streaming.cache import Cache
    from litdata.streaming.dataset import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    loader = TokensLoader(block_size=1000)

    def write(folder: Path, documents: list[npt.NDArray[Any]]) -> None:
        writer = Cache(str(folder), item_loader=loader, chunk_bytes="64MB")
        for number, ids in enumerate(documents):
            writer[number] = ids
        writer.done()
        writer.merge()

    return _Package(write, lambda folder: StreamingDataset(str(folder), item_loader=loader))


def _arrow() -> _Package:
    import datasets

    datasets.disable_progress_bars()

    def write(folder: Path, documents: list[npt.NDArray[Any]]) -> None:
        features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
        rows = {"input_ids": documents}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))

    return _Package(write, lambda folder: datasets.load_from_disk(str(folder)).with_format("numpy"))


def _packages(folder: Path) -> Table:
    """Conversions against writing and reading the documents with the package of the format."""
    stream, ours = folder / "nanogpt.bin", folder / "megatron"
    write_stream(stream, 2 * PACKAGE_TOKENS)
    copy_corpus(_job("nanogpt", "megatron", stream, ours))
    dataset = IndexedDataset(ours)
    documents = [np.array(dataset.document(i)) for i in range(dataset.num_documents)]
    output, theirs, back = folder / "out", folder / "theirs", folder / "back"

    def settle() -> None:
        for each in (output, theirs, back):
            _remove(each)

    rows = []
    for kind, package in (("mds", _mds), ("litdata", _litdata), ("arrow", _arrow)):
        try:
            write, read = package()
        except ImportError as error:
            rows.append((kind, f"{error.name} is missing", ""))
            continue
        contestants: dict[str, Callable[[], object]] = {
            "ours": partial(copy_corpus, _job("megatron", kind, ours, output)),
            "theirs": partial(write, theirs, documents),
        }
        writing = interleaved(contestants, rounds=ROUNDS, warmup=1, before=settle)
        write(folder / kind, documents)
        contestants = {
            "ours": partial(copy_corpus, _job(kind, "megatron", folder / kind, back)),
            "theirs": partial(_read_all, read(folder / kind)),
        }
        reading = interleaved(contestants, rounds=ROUNDS, warmup=1, before=settle)
        rows.append((kind, *(ratio(each, "ours", "theirs") for each in (writing, reading))))
    title = f"Conversion of {PACKAGE_TOKENS:,} uint16 ids, over the package of the format"
    return Table(title, ("", "to it, over writing", "from it, over reading"), rows)


def _read_all(opened: Any) -> None:
    for number in range(len(opened)):
        opened[number]


_PROGRAM = """
import re, sys
from data_tools.convert import main
main(sys.argv[1:])
status = open("/proc/self/status").read()
print(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
"""


def _memory() -> Table:
    """Peak memory of the command, its mapped files included."""
    rows = []
    for target in ("megatron", "olmo", "mds", "parquet"):
        row = [f"nanogpt to {target}"]
        for share in (0.1, 1.0):
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "in.bin")
                write_stream(source, int(GIGABYTES * share * 1e9) // 2 * 2)
                options = f"--from nanogpt --to {target} {source} --output {folder}/out --eod {EOD}"
                done = subprocess.run(
                    [sys.executable, "-c", _PROGRAM, *options.split()],
                    check=True,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.getcwd()},
                )
                found = re.findall(r"\d+", done.stdout)[-1]
                row.append(f"{int(found) / 1024:.0f}")
        rows.append(row)
    header = ("", f"{GIGABYTES * 0.1:g} GB, MB", f"{GIGABYTES:g} GB, MB")
    return Table("Peak memory of the command", header, rows)
