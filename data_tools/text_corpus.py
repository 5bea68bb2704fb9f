"""Tokenized corpora of plain text, for commands that take text instead of a corpus."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path

from data_tools.cli import usable_cpus
from data_tools.preprocess import preprocess, summary
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.inputs import find_inputs
from data_tools.preprocessing.join_shards import PreprocessJob
from data_tools.tokenization.tokenizers import tokenizer_fingerprint


def corpus_prefix(text: str, tokenizer: str, folder: Path, name: str) -> Path:
    """Return the prefix in `folder` for the corpus of a text and a tokenizer.

    The name changes with the path, size or time of a file, and with the tokenizer.

    Raises:
        DataError: there is no such text or tokenizer.
    """
    files = [file.absolute() for source in find_inputs([text]) for file in source.files]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = json.dumps([tokenizer_fingerprint(tokenizer), stamps])
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def corpus_files(prefix: Path) -> list[Path]:
    return [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json")]


def tokenize_text(text: str, tokenizer: str, prefix: Path) -> None:
    """Tokenize a text on a single rank, under any launcher.

    Raises:
        DataError: the text cannot be tokenized.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "data_tools.preprocess", "--input", text]
    command += ["--output", str(prefix), "--tokenizer", tokenizer]
    settings = EncodingSettings(
        tokenizer=tokenizer, eod=None, append_eod=True, json_key="text", skip_bad_lines=False
    )
    job = PreprocessJob([text], str(prefix), settings, overwrite=True, command=shlex.join(command))
    # Parallelism comes from the workers; tokenizer threads would compete for the same CPUs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(summary(str(prefix), preprocess(job, num_workers=usable_cpus()).info), flush=True)
