from __future__ import annotations

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_tools.config import DataConfig
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.remote import default_cache_dir, local_prefix
from data_tools.errors import DataError
from data_tools.loading.builders import build_eval_batches, build_train_loader
from tests.data_tools.corpora import write_counting_corpus
from tests.distributed import run_ranks
from tests.refusals import assert_refused


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_counting_corpus(tmp_path / "here" / "c", 500)


def _upload(corpus: Path, url: str) -> None:
    for suffix in (".bin", ".idx", ".json"):
        with fsspec.open(url + suffix, "wb") as file:
            file.write(corpus.with_suffix(suffix).read_bytes())


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_remote_corpus_gives_the_batches_of_the_local_one(
    tmp_path: Path, corpus: Path, scheme: str
) -> None:
    url = "memory://bucket/c" if scheme == "memory" else f"file://{tmp_path}/there/c"
    (tmp_path / "there").mkdir()
    _upload(corpus, url)
    rows = []
    for path, changes in ((str(corpus), {}), (url, {"cache_dir": str(tmp_path / "cache")})):
        config = DataConfig.model_validate(
            {"train": path, "validation": path, "sequence_length": 8, **changes}
        )
        assert config.train[0].name == "c"
        layout = {"micro_batch_size": 5, "data_rank": 0, "data_size": 1, "vocab_size": 1 << 20}
        with build_train_loader(
            config, sequence_length=8, micro_batches_per_step=1, seed=0, **layout
        ) as loader:
            rows.append([next(loader).tokens.tolist() for _ in range(5)])
        held_out = build_eval_batches(config, sequence_length=8, **layout)
        rows[-1].append(held_out.num_tokens)
    assert rows[0] == rows[1]


def test_a_copy_is_made_once_and_again_when_the_remote_files_change(
    tmp_path: Path, corpus: Path
) -> None:
    url, cache = f"file://{tmp_path}/there/c", tmp_path / "cache"
    (tmp_path / "there").mkdir()
    _upload(corpus, url)
    first = local_prefix(url, cache_dir=str(cache))
    written = first.with_name("c.bin").stat().st_mtime_ns
    assert local_prefix(url, cache_dir=str(cache)) == first
    assert first.with_name("c.bin").stat().st_mtime_ns == written
    _upload(write_counting_corpus(tmp_path / "other" / "c", 700), url)
    os.utime(tmp_path / "there" / "c.bin", (1, 1))
    second = local_prefix(url, cache_dir=str(cache))
    assert IndexedDataset(first).num_tokens == 500
    assert IndexedDataset(second).num_tokens == 700


def test_an_interrupted_copy_is_repeated(tmp_path: Path, corpus: Path) -> None:
    _upload(corpus, "memory://bucket/c")
    prefix = local_prefix("memory://bucket/c", cache_dir=str(tmp_path / "cache"))
    content = prefix.with_name("c.bin").read_bytes()
    prefix.with_name("c.bin").unlink()
    prefix.with_name("c.bin.partial").write_bytes(content[:100])
    again = local_prefix("memory://bucket/c", cache_dir=str(tmp_path / "cache"))
    assert again == prefix
    assert np.array_equal(IndexedDataset(again).tokens, np.arange(500))


def test_the_ranks_of_a_machine_share_one_copy(tmp_path: Path, corpus: Path) -> None:
    url = f"file://{corpus}"
    prefixes = run_ranks(local_prefix, 4, url, cache_dir=str(tmp_path / "cache"), init=False)
    assert len(set(prefixes)) == 1
    names = sorted(path.name for path in prefixes[0].parent.iterdir())
    assert names == ["c.bin", "c.idx", "c.json", "lock"]


def test_a_corpus_without_sidecar_is_copied_too(tmp_path: Path, corpus: Path) -> None:
    corpus.with_suffix(".json").unlink()
    prefix = local_prefix(f"file://{corpus}", cache_dir=str(tmp_path / "cache"))
    assert IndexedDataset(prefix).info is None


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        (
            "memory://nothing/c",
            ("memory://nothing/c", "memory://nothing/c.bin", "memory://nothing/c.idx", "URL"),
        ),
        (
            "nosuch://bucket/c",
            ("nosuch://bucket/c", "Protocol not known", ": nosuch", ("install", "URL")),
        ),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(tmp_path: Path, url: str, parts: tuple) -> None:
    with assert_refused(*parts, error=DataError):
        local_prefix(url, cache_dir=str(tmp_path))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with assert_refused(
        str(corpus),
        value=tmp_path / "taken",
        constraint="copied",
        remedy=("free space", "data.cache_dir"),
        error=DataError,
    ):
        local_prefix(f"file://{corpus}", cache_dir=str(tmp_path / "taken"))


def test_the_cache_is_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "manyformer"
    assert local_prefix("data/c", cache_dir=None) == Path("data/c")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"kind": "bytes", "train": "s3://b/text"},
            ("data.kind", "bytes", ("s3://b/text", "URL"), "data.kind=tokens"),
        ),
        ({"cache_dir": "cache"}, ("data.cache_dir", "cache", ("URL", ".jsonl"), "remove")),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, str], parts: tuple) -> None:
    with assert_refused(*parts):
        DataConfig.model_validate({"train": "a", "sequence_length": 8, **changes})
