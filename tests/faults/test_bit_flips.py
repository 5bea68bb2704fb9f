"""Random bit flips and truncations of every file that a run or a corpus consists of."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.corpus.byte_dataset import MappedFiles
from data_tools.corpus.indexed import HEADER, IndexedDataset
from data_tools.corpus.jsonl_cache import open_jsonl, verify_caches
from data_tools.errors import DataError
from data_tools.preprocess import main as preprocess
from data_tools.train_tokenizer import train_tokenizer
from data_tools.verify import verify
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import read_manifest
from pretrain.checkpointing import CheckpointStore, RunIdentity
from pretrain.errors import EXIT_COMPLETED
from tests.distributed import run_ranks
from tests.faults.damage import Damage, Tally, damages
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data

KINDS = {
    "optimizer": 0.3,
    "weights": 0.2,
    "rng": 0.1,
    "trainer.json": 0.1,
    "index.json": 0.1,
    "manifest.json": 0.2,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one checkpoint of a run of two ranks."""
    directory = tmp_path_factory.mktemp("run")
    write_data(directory)
    config = tiny_run(
        directory,
        model__num_layers=1,
        training__max_steps=2,
        training__batch_size=2,
        evaluation__interval=5,
    )
    codes = run_ranks(run_training, 2, config, "configs/ds/zero1.json", init=False)
    assert codes == [EXIT_COMPLETED] * 2
    return directory / "run" / "checkpoints" / "step_2"


def try_checkpoint(checkpoint: Path, count: int, seed: int) -> Tally:
    """The only checkpoint is damaged, so that whoever asks for it gets an error."""
    manifest = read_manifest(checkpoint)
    identity = RunIdentity(manifest.layout, manifest.config, manifest.fingerprints)
    run_dir, draw = checkpoint.parents[1], random.Random(seed)
    store = CheckpointStore(run_dir, identity=identity, keep=1)
    tally = Tally(CheckpointError)
    try:
        found = store.find("auto")
        assert found is not None
        assert found.step == 2
        for kind, share in KINDS.items():
            paths = sorted(
                (checkpoint / kind).iterdir() if "." not in kind else [checkpoint / kind]
            )
            for path in paths:
                some = list(damages(path.read_bytes(), int(count * share / len(paths)), draw))
                tally.try_all(kind, path, some, lambda: store.find("auto"))
    finally:
        store.close()
    return tally


@pytest.fixture
def quiet() -> Iterator[None]:
    """Thousands of expected warnings are not worth their time."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_no_damage_to_a_checkpoint_is_accepted(checkpoint: Path) -> None:
    try_checkpoint(checkpoint, 1200, seed=1).check("checkpoint", least=1100)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_no_damage_to_a_checkpoint_is_accepted_in_many_trials(checkpoint: Path) -> None:
    try_checkpoint(checkpoint, 10_000, seed=2).check("checkpoint", least=9_900)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind of file that data_tools writes."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {i} of the corpus " + "word " * (i % 30) for i in range(200)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "bad.jsonl").write_text("\n".join([*lines, "no json", "{}"]) + "\n")
    train_tokenizer([str(folder / "text.jsonl")], str(folder / "t.model"), vocab_size=300)
    arguments = ["--input", str(folder / "bad.jsonl"), "--output", str(folder / "c")]
    tokenizer = ["--tokenizer", str(folder / "t.model")]
    preprocess([*arguments, *tokenizer, "--workers", "1", "--on-bad-line", "skip"])
    cached_text(folder)
    return folder


def cached_text(folder: Path) -> Path:
    """The image of the .jsonl file, made where there is none."""
    files = MappedFiles([folder / "text.jsonl"])
    open_jsonl(files, json_key="text", cache_dir=str(folder / "cache"))
    (image,) = (folder / "cache").glob("*/text")
    return image


def try_corpus(folder: Path, count: int, seed: int) -> Tally:
    draw, tally = random.Random(seed), Tally(DataError)
    verify(str(folder / "c"))
    for name in ("c.bin", "c.idx", "c.json", "c.left_out.jsonl", "t.model"):
        some = list(damages((folder / name).read_bytes(), count, draw))
        kind = name.removeprefix("c.")
        tally.try_all(kind, folder / name, some, lambda: verify(str(folder / "c")))
    image, cache = cached_text(folder), str(folder / "cache")
    some = list(damages(image.read_bytes(), count, draw))
    tally.try_all("cached text", image, some, lambda: list(verify_caches(cache)))
    return tally


def test_no_damage_to_a_corpus_is_verified(corpus: Path) -> None:
    try_corpus(corpus, 180, seed=1).check("corpus, verify", least=1_000)


@pytest.mark.slow
def test_no_damage_to_a_corpus_is_verified_in_many_trials(corpus: Path) -> None:
    try_corpus(corpus, 2_000, seed=2).check("corpus, verify", least=12_000)


def test_structural_damage_is_refused_when_a_corpus_is_opened(corpus: Path) -> None:
    """Truncations of any file, and every bit of the header of the index."""
    tally = Tally(DataError)

    def opened() -> None:
        IndexedDataset(corpus / "c")

    for name in ("c.bin", "c.idx", "c.json"):
        content = (corpus / name).read_bytes()
        sizes = sorted({*range(0, len(content), max(1, len(content) // 150)), len(content) - 1})
        cut = [Damage(f"truncated to {size} bytes", content[:size]) for size in sizes]
        tally.try_all(f"{name[2:]} truncated", corpus / name, cut, opened)
    content = (corpus / "c.idx").read_bytes()
    flipped = []
    for bit in range(8 * HEADER.size):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(Damage(f"bit {bit} flipped", bytes(damaged)))
    tally.try_all("header of .idx", corpus / "c.idx", flipped, opened)
    tally.check("corpus, structure at open", least=600)


def test_a_refusal_that_does_not_name_the_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def anonymous() -> None:
        raise DataError("something is damaged")

    tally = Tally(DataError)
    tally.try_all("kind", tmp_path / "file", [Damage("emptied", b"")], anonymous)
    with pytest.raises(AssertionError):
        tally.check("a test", least=1)
    assert (tmp_path / "file").read_bytes() == b"content"
