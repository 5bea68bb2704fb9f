"""Conversions between small corpora, and the documents that come out of them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from data_tools.convert import main
from data_tools.corpus.indexed import IndexedDataset
from data_tools.formats.manifest import manifest_path
from tests.data_tools.corpora import write_corpus

EOD = 9
DOCUMENTS = [[1, 2, 3, EOD], [4, EOD], [EOD], [5, 6, 7, 8, 10, 11, EOD]]


def convert(*arguments: str | Path | int) -> None:
    """`python -m data_tools.convert ARGUMENTS`, in this process."""
    main([str(argument) for argument in arguments])


def corpus(folder: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, **options: object) -> Path:
    """A Megatron corpus with a .json, whose documents end with EOD unless `eod_id` says else."""
    options = {"vocab_size": 50_000, "eod_id": EOD, **options}
    write_corpus(folder / "ours", [np.array(each) for each in documents], **options)  # type: ignore[arg-type]
    return folder / "ours"


def megatron(folder: Path, kind: str, *inputs: str | Path, options: Sequence[object] = ()) -> Path:
    """What `inputs` of a kind are as a Megatron corpus."""
    given = [str(option) for option in options]
    convert("--from", kind, "--to", "megatron", *inputs, "--output", folder / "back", *given)
    return folder / "back"


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def forget(output: Path) -> None:
    """Remove the manifest, so that a corpus is read as one of the other project."""
    manifest_path(output).unlink()


def assert_same_files(found: Path, expected: Path) -> None:
    """Two Megatron corpora are equal byte for byte."""
    for suffix in (".bin", ".idx"):
        assert found.with_suffix(suffix).read_bytes() == expected.with_suffix(suffix).read_bytes()


def package(name: str) -> ModuleType:
    """The real package of a format, in a test marked `formats`."""
    with warnings.catch_warnings(action="ignore"):  # they miss what no test needs
        return importlib.import_module(name)


def streaming_base() -> ModuleType:
    """`streaming.base`: the package itself also imports data sets of images, and torchvision."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'streaming'", name="streaming")
        module = ModuleType("streaming")
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = module
    return package("streaming.base")
