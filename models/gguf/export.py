"""A checkpoint as one GGUF file."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.checkpoint import StoredModel, open_checkpoint
from models.gguf.architecture import architecture_of, decoder_names
from models.gguf.byte_level import bpe_vocabulary, byte_vocabulary
from models.gguf.pieces import Declared, piece_vocabulary
from models.gguf.vocabulary import INSTEAD, Vocabulary
from models.gguf.weights import DTYPES, entries
from models.gguf.writing import (
    NO_VOCABULARY,
    Ends,
    require_package,
    vocabulary_settings,
    write_file,
)
from models.hf.tokenizer_files.export import chat_template, declared_tokens
from models.prompting import Prompting, load_prompting


def to_gguf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    with_tokenizer: bool = True,
    eod: str | None = None,
) -> list[str]:
    """Export a checkpoint as a GGUF file; returns remarks for the user.

    `dtype`: of the matrices, one of DTYPES; None keeps that of the weights. `tokenizer` and `eod`
    as in models.convert.to_hf.

    Raises:
        ValueError: the checkpoint, the output or the tokenizer cannot be used, or llama.cpp has no
            model of this function.
    """
    stored = open_checkpoint(checkpoint)
    names = decoder_names(stored.family, stored.config)
    architecture = architecture_of(stored.config)
    spec = (tokenizer or stored.tokenizer) if with_tokenizer else None
    if spec is None and eod is not None:
        raise ValueError(f"--eod {eod} has no effect without a tokenizer; remove it")
    remarks = [f"the file is of llama.cpp's architecture {architecture.name}"]
    if spec is None:
        settings: dict[str, Any] = NO_VOCABULARY
        remarks.append("no tokenizer was written, so llama.cpp runs ids and no text")
    else:
        settings, further = _tokenizer_settings(spec, stored, eod=eod)
        remarks += further
    require_package()
    cast = None if dtype is None else DTYPES[dtype]
    found = entries(stored, names, architecture, cast)
    with _published_file(output) as path:
        write_file(
            path,
            stored,
            architecture,
            found,
            name=_name_of(stored),
            settings=settings,
            cast=cast is not None,
        )
    return remarks


def _tokenizer_settings(
    spec: str, stored: StoredModel, *, eod: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The keys of the tokenizer, and remarks for the user."""
    prompting = load_prompting(spec, stored.text, eod=eod, special_tokens="plain")
    size = stored.config.vocab_size
    vocabulary, folder = _vocabulary(prompting, size)
    settings = vocabulary_settings(
        vocabulary,
        _ends(prompting, size),
        template=None if folder is None else chat_template(folder),
    )
    return settings, list(vocabulary.remarks)


def _vocabulary(prompting: Prompting, size: int) -> tuple[Vocabulary, Path | None]:
    """The vocabulary, and the folder with files beside it."""
    tokenizer = prompting.tokenizer
    if tokenizer.name == "bytes":
        return byte_vocabulary(size), None
    path = Path(tokenizer.name)
    save = getattr(tokenizer, "save", None)
    if save is not None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / "tokenizer.json")
            text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
        return bpe_vocabulary(text, size, source=tokenizer.name), path.parent
    if path.suffix == ".model":
        numbers = {text: tokenizer.token_to_id(text) for text in declared_tokens(path.parent)}
        declared = {
            text: Declared(number, tokenizer.is_special(number))
            for text, number in numbers.items()
            if number is not None
        }
        return piece_vocabulary(path, size, declared=declared), path.parent
    raise ValueError(
        f"tokenizer {tokenizer.name}: ranks of tiktoken have no form in llama.cpp; give an equal "
        f"tokenizer.json with --tokenizer, or {INSTEAD}"
    )


def _ends(prompting: Prompting, size: int) -> Ends:
    """The end and begin tokens of texts.

    Raises:
        ValueError: there is none, several, or one that the model lacks.
    """
    name, end = prompting.tokenizer.name, prompting.eod_id
    if end is None:
        raise ValueError(
            f"tokenizer {name} names no end token, and llama.cpp would take another token for it; "
            f"name it with --eod, or {INSTEAD}"
        )
    begins = prompting.bos_ids
    if len(begins) > 1:
        raise ValueError(
            f"tokenizer {name}: documents began with the ids {list(begins)}, llama.cpp begins a "
            f"text with one at most; {INSTEAD}"
        )
    declared = prompting.tokenizer.boundary_tokens.bos
    # Without one a document follows the end of another.
    first = begins or (() if declared is None else declared.ids[:1]) or (end,)
    for number in (end, *first):
        if number >= size:
            raise ValueError(
                f"tokenizer {name} begins or ends a text with id {number}, the model has "
                f"vocab_size={size}; give the tokenizer of its data with --tokenizer, or the end "
                "token with --eod"
            )
    return Ends(end, first[0], bool(begins))


def _name_of(stored: StoredModel) -> str:
    """The name of the run, or of the checkpoint outside of one."""
    checkpoint = stored.weights.parent.absolute()
    in_run = checkpoint.parent.name == "checkpoints"
    return checkpoint.parent.parent.name if in_run else checkpoint.name


@contextlib.contextmanager
def _published_file(output: Path) -> Iterator[Path]:
    """A temporary path beside `output`, renamed to it if the body succeeds, removed otherwise.

    Raises:
        ValueError: `output` exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f".{output.name}-{secrets.token_hex(8)}"
    try:
        yield path
        path.rename(output)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
