"""`data_tools.preprocess` against other ways to tokenize with the same tokenizer on two cores.

All begin with a .jsonl file and a tokenizer.json on disk, and their times include loading both:

* bare loop: the lines in batches of 1000 through `encode_batch` on two threads; ids are dropped.
* bare gigatoken: the same with that library, and its own threads.
* datasets: `Dataset.map(batched=True, num_proc=2)`, from an Arrow file that was made before.
* Megatron style: two processes of a pool encode line by line, the parent writes through
  megatron.core's IndexedDatasetBuilder, as Megatron-LM's tools/preprocess_data.py does.

Ours is measured with each library that encodes for it (`--encoder`), gigatoken first.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from data_tools.corpus.indexed import IndexedDataset
from data_tools.preprocess import preprocess
from data_tools.preprocessing import encoding
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.join_shards import PreprocessJob
from tests.benchmarks.data import gpt_dataset
from tests.benchmarks.data.fetch import TEXT, TOKENIZERS
from tests.benchmarks.timing import Table, interleaved, ratio

ROUNDS, CORES, BATCH = 3, 2, 1000
MEMORY_COPIES = (2, 40)


def tables() -> Iterator[Table]:
    """Documents/s and MB/s for each tokenizer, then peak memory at two sizes of input."""
    if not TEXT.exists():
        yield Table(
            f"Not run: no {TEXT}; get it with python -m tests.benchmarks.data.fetch", (), ()
        )
        return
    gpt_dataset.import_megatron()
    for name, path in TOKENIZERS.items():
        with tempfile.TemporaryDirectory() as folder:
            yield _speed(name, path, Path(folder))
    yield _memory(TOKENIZERS["GPT-2"])


def _speed(name: str, tokenizer: Path, folder: Path) -> Table:
    dataset = _arrow_dataset(folder)
    contestants: dict[str, Callable[[], object]] = {
        "preprocess": lambda: _ours(tokenizer, folder / "ours"),
        "preprocess, tiktoken": lambda: _ours(tokenizer, folder / "tiktoken", "tiktoken"),
        "preprocess, library alone": lambda: _ours(tokenizer, folder / "plain", "tokenizers"),
        "bare gigatoken": lambda: _bare_gigatoken(tokenizer),
        "bare loop": lambda: _bare_loop(tokenizer),
        "datasets": lambda: _datasets(dataset, tokenizer),
        "Megatron style": lambda: _megatron_style(tokenizer, folder / "theirs"),
    }
    seconds = interleaved(contestants, rounds=ROUNDS, warmup=0)
    ours, plainly, theirs = (IndexedDataset(folder / n) for n in ("ours", "plain", "theirs"))
    assert np.array_equal(ours.tokens, theirs.tokens), "the same ids in the same order"
    assert np.array_equal(ours.tokens, plainly.tokens)
    rows = []
    for contestant, times in seconds.items():
        assert ours.info is not None
        documents, megabytes = ours.num_documents, ours.info.num_bytes / 1e6
        ratios = [
            ratio(seconds, mine, contestant) if mine != contestant else ""
            for mine in ("preprocess", "preprocess, library alone")
        ]
        rate = 1 / median(times)
        rows.append((contestant, f"{documents * rate:,.0f}", f"{megabytes * rate:.1f}", *ratios))
    size = f"{ours.num_documents:,} documents, {ours.info.num_bytes / 1e6:.0f} MB"
    return Table(
        f"{name}'s tokenizer, {size} of text, {CORES} cores, {ROUNDS} rounds in turn",
        ("", "docs/s", "MB/s", "preprocess is faster by", "library alone is faster by"),
        rows,
    )


def _ours(tokenizer: Path, output: Path, encoder: str | None = None) -> None:
    settings = EncodingSettings(
        tokenizer=str(tokenizer),
        eod=None,
        append_eod=True,
        json_key="text",
        skip_bad_lines=False,
        encoder=encoder,
        special_tokens="plain",  # as the others do: source code spells <|endoftext|>
    )
    job = PreprocessJob(inputs=[str(TEXT)], output=str(output), settings=settings, overwrite=True)
    encoding._tokenizer.cache_clear()  # of the call before, which may have been the same
    preprocess(job, num_workers=CORES)


def _load(tokenizer: Path) -> Tokenizer:
    backend = Tokenizer.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    return backend


def _bare_loop(tokenizer: Path) -> None:
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(CORES))
    backend = _load(tokenizer)
    with open(TEXT, "rb") as file:
        while texts := [json.loads(line)["text"] for line in islice(file, BATCH)]:
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
                ids = encoding.ids
    assert ids


def _bare_gigatoken(tokenizer: Path) -> None:
    import gigatoken

    fast = gigatoken.Tokenizer(str(tokenizer))
    with open(TEXT, "rb") as file:
        while texts := [json.loads(line)["text"] for line in islice(file, BATCH)]:
            ids = fast.encode_batch(texts, parallel=True)
    assert len(ids)


def _arrow_dataset(folder: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    with open(TEXT, "rb") as file:
        texts = [json.loads(line)["text"] for line in file]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "arrow"))
    return datasets.load_from_disk(str(folder / "arrow"))


def _datasets(dataset: Any, tokenizer: Path) -> None:
    backend = _load(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encodings = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids for encoding in encodings]}

    dataset.map(
        encode,
        batched=True,
        batch_size=BATCH,
        num_proc=CORES,
        remove_columns=["text"],
        load_from_cache_file=False,
    )


_backend: Tokenizer  # in a process of the pool
_eod: int


def _begin(tokenizer: Path) -> None:
    global _backend, _eod
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _backend = _load(tokenizer)
    _eod = _backend.token_to_id("<|endoftext|>")


def _encode_line(line: bytes) -> list[int]:
    ids = _backend.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, _eod]


def _megatron_style(tokenizer: Path, prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(_load(tokenizer).get_vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES, _begin, (tokenizer,)) as pool, open(TEXT, "rb") as file:
        for ids in pool.imap(_encode_line, file, 32):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


_PROGRAM = """
import re, resource, sys
from data_tools.preprocess import main
if __name__ == "__main__":
    main(sys.argv[1:])
    own = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _memory(tokenizer: Path) -> Table:
    """Peak memory of the parent and of the largest worker, in a program of its own."""
    text = TEXT.read_bytes()
    rows = []
    for copies in MEMORY_COPIES:
        with tempfile.TemporaryDirectory() as folder:
            source, program = Path(folder, "text.jsonl"), Path(folder, "program.py")
            program.write_text(_PROGRAM)
            with open(source, "wb") as file:
                for _ in range(copies):
                    file.write(text)
            options = f"--input {source} --output {folder}/out --tokenizer {tokenizer}"
            command = [sys.executable, str(program), *options.split(), "--workers", str(CORES)]
            done = subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            )
        parent, worker = (int(kilobytes) / 1024 for kilobytes in done.stdout.split()[-2:])
        size = f"{copies * len(text) / 1e6:,.0f} MB"
        rows.append((size, f"{parent:.0f}", f"{worker:.0f}", f"{parent + CORES * worker:.0f}"))
    header = ("input", "parent MB", "a worker MB", f"parent and {CORES} workers MB")
    return Table("Peak memory, GPT-2's tokenizer", header, rows)
