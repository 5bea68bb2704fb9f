from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from data_tools import demo_corpus
from data_tools.corpus.indexed import IndexedDataset
from data_tools.demo_corpus import build_demo_corpus, standard_library_modules
from data_tools.errors import DataError
from data_tools.tokenization.tokenizers import load_tokenizer
from data_tools.verify import verify
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


@pytest.fixture
def few_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fortieth of the library: the whole takes seconds."""
    modules = standard_library_modules()[::8]
    monkeypatch.setattr(demo_corpus, "standard_library_modules", lambda: modules)


def test_standard_library_is_found_without_its_tests() -> None:
    modules = standard_library_modules()
    names = {module.name for module in modules}
    assert {"argparse", "json.decoder", "asyncio.events"} <= names
    assert not any(name.startswith(("test.", "site-packages", "idlelib")) for name in names)
    assert 4e6 < sum(len(module.text) for module in modules) < 3e7
    assert [module.name for module in modules] == [m.name for m in standard_library_modules()]


@pytest.mark.usefixtures("few_modules")
def test_demo_corpus_is_complete_and_the_splits_share_no_module(tmp_path: Path) -> None:
    build_demo_corpus(tmp_path / "demo", vocab_size=512)
    tokenizer = load_tokenizer(str(tmp_path / "demo" / "tokenizer.model"))
    assert tokenizer.vocab_size == 512
    texts: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        dataset = IndexedDataset(tmp_path / "demo" / split)
        verify(str(dataset.prefix))
        files = sorted((tmp_path / "demo" / "text" / split).iterdir())
        texts[split] = {path.read_bytes().decode() for path in files}
        assert dataset.num_documents == len(files)
        assert tokenizer.decode(dataset.document(0).tolist()) == files[0].read_bytes().decode()
        assert dataset.document(0)[-1] == tokenizer.eod_id
        assert dataset.info is not None
        assert dataset.info.num_bytes == sum(path.stat().st_size for path in files)
    assert not texts["train"] & texts["validation"]
    assert len(texts["train"]) > len(texts["validation"]) > 0


@pytest.mark.usefixtures("few_modules")
def test_complete_corpus_is_kept_and_a_damaged_one_is_rebuilt(tmp_path: Path) -> None:
    build_demo_corpus(tmp_path, vocab_size=512)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    said: list[str] = []
    build_demo_corpus(tmp_path, vocab_size=512, log=said.append)
    assert said == [f"{tmp_path}: complete, nothing to do"]
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    (tmp_path / "train.bin").write_bytes(b"damaged")
    build_demo_corpus(tmp_path, vocab_size=512)
    assert {path: path.read_bytes() for path in files} == {
        path: content for path, (_, content) in before.items()
    }
    build_demo_corpus(tmp_path, vocab_size=500)
    assert load_tokenizer(str(tmp_path / "tokenizer.model")).vocab_size == 500


def test_folder_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine.txt").write_text("precious")
    with _refused("--output", value=tmp_path, constraint="other files", remedy="new folder"):
        build_demo_corpus(tmp_path)
    assert (tmp_path / "text" / "mine.txt").read_text() == "precious"


def test_interpreter_without_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with assert_refused(
        str(tmp_path),
        value="source",
        constraint="standard library",
        remedy="interpreter",
        error=DataError,
    ):
        standard_library_modules()
    assert sys.version_info  # the interpreter that runs the test does have it
