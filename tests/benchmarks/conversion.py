"""`data_tools.convert` between two formats of 1 GB against `cp` of the ids, and its memory.

`cp` copies the file with the ids alone, into a new file that is removed before the next round; it
leaves it to the system to write them to the disk, which `sync` waits for. Ours also finds the
documents, hashes what is written and waits for the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_tools.formats.copying import Copy, copy_corpus
from data_tools.formats.manifest import manifest_path
from tests.benchmarks.timing import Table, interleaved, ratio

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
    ("megatron", "parquet"),
)
_SUFFIXES = {"nanogpt": ".bin", "olmo": ".npy", "datatrove": ".ds"}


def tables() -> Iterator[Table]:
    """Ratios of speed, then memory at two sizes."""
    with tempfile.TemporaryDirectory() as folder:
        yield _speed(Path(folder))
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
        contestants: dict[str, Callable[[], object]] = {
            "convert": partial(_convert, job, output),
            "cp": partial(_cp, stream, copied),
            "cp and sync": partial(_cp, stream, copied, sync=True),
        }
        seconds = interleaved(contestants, rounds=ROUNDS, warmup=1)
        copied.unlink()
        kept = folder / target
        if target not in ("nanogpt",) and not _input(folder, target).exists():
            _keep(output, kept)
        _remove(output)
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
    target.unlink(missing_ok=True)
    subprocess.run(["cp", source, target], check=True)
    if sync:
        subprocess.run(["sync", target], check=True)


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
