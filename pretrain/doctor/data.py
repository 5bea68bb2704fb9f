"""The corpora of a run: complete, of its vocabulary and tokenizer, and long enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.config import DataConfig, SourceConfig
from data_tools.errors import NoSuchFileError
from data_tools.files import expand_paths
from data_tools.loading.builders import data_warnings, epochs_per_source
from data_tools.sampling.curriculum import Curriculum
from parallel.context import Axis
from pretrain.config import RunConfig
from pretrain.config.layout import RunLayout
from pretrain.doctor.findings import Finding, of_message
from pretrain.run_data import open_held_out_data, open_training_data

SECTION = "data"
_DEMO = Path("data/demo")  # where the run files of the demonstration look


def check_data(config: RunConfig, layout: RunLayout) -> Iterator[Finding]:
    """Open the data as a run does, and plan its steps; yields one finding for each problem.

    Raises:
        ConfigError, DataError: the steps cannot be planned.
    """
    missing = list(_missing_files(config.data))
    if missing:  # everything else would fail for the same reason
        yield from missing
        return
    axis = Axis(layout.data)
    with open_training_data(config, axis) as loader:
        curriculum, sources = loader.curriculum, loader.sources
        epochs = epochs_per_source(curriculum, loader)
        held_out = open_held_out_data(config, axis)
        for line in data_warnings(config.data, curriculum, loader, held_out):
            yield of_message(SECTION, "warning", line)
    for name, stream in sources:
        yield Finding(
            SECTION,
            "ok",
            f"data.train source {name}: {stream.num_tokens:,} tokens, read "
            f"{epochs.get(name, 0.0):.3g} times by the end of the run",
        )
    yield _length(curriculum)
    if held_out is None:
        yield Finding(
            SECTION,
            "warning",
            "data.validation is empty: the run reports no held-out loss",
            "set data.validation, for example to a part made by python -m data_tools.split",
        )
    else:
        yield Finding(
            SECTION, "ok", f"data.validation: {held_out.num_tokens:,} tokens are scored each time"
        )


def _length(curriculum: Curriculum) -> Finding:
    tokens = curriculum.tokens_after(curriculum.total_steps)
    return Finding(
        SECTION, "ok", f"the run takes {curriculum.total_steps:,} steps, {tokens:,} tokens"
    )


def _missing_files(data: DataConfig) -> Iterator[Finding]:
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
                yield Finding(
                    SECTION,
                    "error",
                    f"data.{split} source {source.name}: no {' and no '.join(absent)} in "
                    f"{Path.cwd()}",
                    _remedy(prefix),
                )
    if data.tokenizer not in (None, "bytes"):
        yield from _missing_tokenizer(str(data.tokenizer))


def _missing_texts(split: str, source: SourceConfig) -> Iterator[Finding]:
    """A source of files as they are, if no file matches its pattern."""
    try:
        expand_paths(source.path)
    except NoSuchFileError:
        yield Finding(
            SECTION,
            "error",
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
    """How to make a file of the demonstration; "" for other files."""
    if not path.is_relative_to(_DEMO):
        return ""
    return f"make it with python -m data_tools.demo_corpus --output {_DEMO}"


def _missing_tokenizer(tokenizer: str) -> Iterator[Finding]:
    if Path(tokenizer).exists() or Path(tokenizer.rpartition(":")[0]).is_file():
        return
    yield Finding(
        SECTION,
        "error",
        f"data.tokenizer={tokenizer}: no such file in {Path.cwd()}",
        _demo_remedy(Path(tokenizer))
        or "set data.tokenizer to the tokenizer that the corpora were made with",
    )
