"""A small real corpus without a download: `python -m data_tools.demo_corpus --output data/demo`.

The text is the Python standard library's own source, as installed with the running interpreter:
about 9 MB in 450 modules, without its tests and tables.
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

from data_tools.cli import run_command, usable_cpus
from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.preprocess import preprocess
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.join_shards import Job, summary
from data_tools.tokenization.tokenizers import load_tokenizer
from data_tools.train_tokenizer import train_tokenizer

_VERSION = 1  # raise it when the files change for the same interpreter
_MARKER = "demo_corpus.json"  # a folder with it is ours to write over
_SPLITS = ("train", "validation")
_VALIDATION_SHARE = 20  # one module in so many
# Tests, other people's packages, and modules that are tables of data rather than text.
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
  python -m data_tools.demo_corpus --output data/demo
"""


class _Module(NamedTuple):
    name: str  # dotted
    text: str


# Bytes per token hardly fall (3.0 with twice as many pieces, 2.7 with these), and the head of a
# model so small is a fifth of its work.
VOCAB_SIZE = 2048


def build_demo_corpus(
    output: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    num_workers: int = 1,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Write text, tokenizer and the two splits under `output`.

    `say` gets one line about each as soon as it is there. A complete corpus of the same version,
    interpreter and vocabulary is left as it is.

    Raises:
        DataError: the standard library's source is not installed, or `output` cannot be written.
    """
    recipe = {"version": _VERSION, "python": platform.python_version(), "vocab_size": vocab_size}
    if _claim_folder(output, recipe):
        say(f"{output}: complete, nothing to do")
        return
    say(_write_text(output / "text"))
    tokenizer = train_tokenizer(
        [str(output / "text" / "train")],
        str(output / "tokenizer.model"),
        vocab_size=vocab_size,
        overwrite=True,
    )
    say(f"{output}/tokenizer.model: {tokenizer.vocab_size} pieces, trained on it")
    settings = EncodingSettings(
        tokenizer=str(output / "tokenizer.model"),
        eod=None,
        append_eod=True,
        json_key="text",
        skip_bad_lines=False,
    )
    for split in _SPLITS:
        job = Job(
            inputs=[str(output / "text" / split)],
            output=str(output / split),
            settings=settings,
            overwrite=True,
            licence="PSF-2.0",
            command=f"python -m data_tools.demo_corpus --output {output}",
        )
        workers = num_workers if split == "train" else 1
        info = preprocess(job, num_workers=workers).info
        say(summary(str(output / split), info))
    _write_marker(output, {**recipe, "complete": True})


def _claim_folder(output: Path, recipe: Mapping[str, object]) -> bool:
    """Whether `output` holds this corpus already; if not, mark the folder as ours to write.

    Raises:
        DataError: it holds something else.
    """
    marker = output / _MARKER
    if marker.is_file():
        complete = json.dumps({**recipe, "complete": True})
        if marker.read_text() == complete and _is_sound(output):
            return True
    elif output.exists() and any(output.iterdir()):
        raise DataError(
            f"--output {output} holds other files; choose a new folder, it is written over later"
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
    """Source of the running interpreter's standard library, sorted by name.

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
            f"{root}: no source of the standard library there; run with an interpreter that has it"
        )
    return modules


def _write_text(folder: Path) -> str:
    """One .txt a module, in `train` or `validation` by a hash of its text."""
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
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.demo_corpus",
        description="Make a small corpus from the Python standard library's source (9 MB).",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N")
    options = parser.parse_args(arguments)
    build_demo_corpus(
        Path(options.output),
        vocab_size=options.vocab_size,
        num_workers=min(2, usable_cpus()),
        say=partial(print, flush=True),
    )


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
