"""Corpora and tokenizers that a run names and that are not there. No torch: a mistake costs no
start-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.config import DataConfig, SourceConfig
from data_tools.errors import NoSuchFileError
from data_tools.files import expand_paths

_DEMO = Path("data/demo")  # where the run files of the demonstration look


class Missing(NamedTuple):
    """A setting whose files are not there, and how to get them."""

    problem: str
    remedy: str


def missing_data(data: DataConfig) -> Iterator[Missing]:
    """Every local corpus, and the tokenizer, that is not there."""
    for split in ("train", "validation"):
        for source in getattr(data, split):
            if "://" in source.path:
                continue
            if data.kind == "bytes":
                yield from _missing_texts(split, source)
                continue
            prefix = Path(source.path)
            files = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
            absent = [str(file) for file in files if not file.is_file()]
            if absent:
                yield Missing(
                    f"data.{split} source {source.name}: no {' and no '.join(absent)} in "
                    f"{Path.cwd()}",
                    _remedy(prefix),
                )
    if data.tokenizer not in (None, "bytes"):
        yield from _missing_tokenizer(str(data.tokenizer))


def _missing_texts(split: str, source: SourceConfig) -> Iterator[Missing]:
    """A source of files as they are, if no file matches its pattern."""
    try:
        expand_paths(source.path)
    except NoSuchFileError:
        yield Missing(
            f"data.{split} source {source.name}: no file matches {source.path} in {Path.cwd()}",
            _demo_remedy(Path(source.path))
            or "set the path of text files, a folder of them or a pattern",
        )


def _remedy(prefix: Path) -> str:
    if prefix.with_name(prefix.name + ".work").is_dir():
        return "preprocessing was interrupted: run the same command again, and it continues"
    return _demo_remedy(prefix) or (
        f"make it with python -m data_tools.preprocess --output {prefix}, or set the path of "
        "another corpus"
    )


def _demo_remedy(path: Path) -> str:
    """The remedy that makes a file of the demonstration; "" for other files."""
    if not path.is_relative_to(_DEMO):
        return ""
    return f"make it with python -m data_tools.demo_corpus --output {_DEMO}"


def _missing_tokenizer(tokenizer: str) -> Iterator[Missing]:
    if Path(tokenizer).exists() or Path(tokenizer.rpartition(":")[0]).is_file():
        return
    yield Missing(
        f"data.tokenizer={tokenizer}: no such file in {Path.cwd()}",
        _demo_remedy(Path(tokenizer))
        or "set data.tokenizer to the tokenizer that the corpora were made with",
    )
