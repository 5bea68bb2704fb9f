"""Build a small real corpus without a download: `python -m data_tools.demo_corpus --output DIR`.

The text is the source of the Python standard library of the running interpreter: about 9 MB in 450
modules, without its tests and tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_tools.cli import program, refuse_below, run_command, usable_cpus
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.preprocess import preprocess
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.join_shards import PreprocessJob, summary
from data_tools.tokenization.tokenizers import load_tokenizer
from data_tools.train_tokenizer import train_tokenizer

_VERSION = 1  # raise it if the files change for the same interpreter
_MARKER = "demo_corpus.json"  # a folder with this file may be overwritten
_SPLITS = ("train", "validation")
_VALIDATION_SHARE = 20  # one module in 20
# Tests, third-party packages, and modules that are data tables rather than text.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_EXAMPLE = """example:
  %(prog)s --output data/demo
"""


class _Module(NamedTuple):
    name: str  # dotted
    text: str


# Twice as many pieces would raise bytes per token only from 2.7 to 3.0, and the output layer is
# already a fifth of the compute of such a small model.
VOCAB_SIZE = 2048


def build_demo_corpus(
    output: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    num_workers: int = 1,
    log: Callable[[str], object] = lambda line: None,
) -> None:
    """Write text, tokenizer and the two splits under `output`.

    `log` is called with one line for each when it is written. A complete corpus of the same
    version, interpreter and vocabulary is kept.

    Raises:
        DataError: the source of the standard library is not installed, or `output` holds other
            files or is not writable.
    """
    recipe = {"version": _VERSION, "python": platform.python_version(), "vocab_size": vocab_size}
    if _claim_folder(output, recipe):
        log(f"{output}: complete, nothing to do")
        return
    log(_write_text(output / "text"))
    tokenizer = train_tokenizer(
        [str(output / "text" / "train")],
        str(output / "tokenizer.model"),
        vocab_size=vocab_size,
        overwrite=True,
    )
    log(f"{output}/tokenizer.model: {tokenizer.vocab_size} pieces, trained on it")
    for split in _SPLITS:
        info = _preprocess_split(output, split, num_workers if split == "train" else 1)
        log(summary(str(output / split), info))
    _write_marker(output, {**recipe, "complete": True})


def _preprocess_split(output: Path, split: str, num_workers: int) -> CorpusInfo:
    settings = EncodingSettings(
        tokenizer=str(output / "tokenizer.model"),
        eod=None,
        append_eod=True,
        json_key="text",
        skip_bad_lines=False,
    )
    job = PreprocessJob(
        inputs=[str(output / "text" / split)],
        output=str(output / split),
        settings=settings,
        overwrite=True,
        license="PSF-2.0",
        command=f"python -m data_tools.demo_corpus --output {output}",
    )
    return preprocess(job, num_workers=num_workers).info


def _claim_folder(output: Path, recipe: Mapping[str, object]) -> bool:
    """Return whether `output` already holds this corpus; if not, mark it as ours to overwrite.

    Raises:
        DataError: it holds other files.
    """
    marker = output / _MARKER
    if marker.is_file():
        complete = json.dumps({**recipe, "complete": True})
        if marker.read_text() == complete and _is_sound(output):
            return True
    elif output.exists() and any(output.iterdir()):
        raise DataError(
            f"--output {output} holds other files; choose a new folder, as later runs overwrite it"
        )
    _write_marker(output, {**recipe, "complete": False})
    return False


def _is_sound(output: Path) -> bool:
    try:
        for split in _SPLITS:
            IndexedDataset(output / split)
        load_tokenizer(str(output / "tokenizer.model"))
    except DataError:
        return False
    return True


def _write_marker(output: Path, content: Mapping[str, object]) -> None:
    with replace_atomically(output / _MARKER) as file:
        file.write(json.dumps(content).encode())


def standard_library_modules() -> list[_Module]:
    """Return the source of the running interpreter's standard library, sorted by module name.

    Raises:
        DataError: it is not installed as source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts[:-1]):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            modules.append(_Module(".".join(parts), text))
    if not modules:
        raise DataError(
            f"{root}: no source of the standard library there; use an interpreter that has it"
        )
    return modules


def _write_text(folder: Path) -> str:
    """Write one .txt per module to `train` or `validation`, by a hash of its text."""
    if folder.exists():
        shutil.rmtree(folder)
    counts = dict.fromkeys(_SPLITS, 0)
    num_bytes = 0
    for split in _SPLITS:
        (folder / split).mkdir(parents=True)
    for module in standard_library_modules():
        data = module.text.encode("utf-8")
        held_out = hashlib.blake2b(data, digest_size=8).digest()[0] % _VALIDATION_SHARE == 0
        split = _SPLITS[held_out]
        (folder / split / f"{module.name}.txt").write_bytes(data)
        counts[split] += 1
        num_bytes += len(data)
    return (
        f"{folder}: {num_bytes / 1e6:.1f} MB, {counts['train']} modules of the Python standard "
        f"library to train on and {counts['validation']} held out"
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.demo_corpus"),
        description="Build a small corpus from the Python standard library's source (9 MB).",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a folder for corpora and tokenizer"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        metavar="N",
        help="pieces of its tokenizer (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    refuse_below(1, options, "vocab_size")
    build_demo_corpus(
        Path(options.output),
        vocab_size=options.vocab_size,
        num_workers=min(2, usable_cpus()),
        log=partial(print, flush=True),
    )


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
