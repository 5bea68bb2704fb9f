"""A GGUF file, written by the package `gguf`, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.checkpoint import StoredModel
from models.gguf.architecture import Architecture
from models.gguf.vocabulary import Vocabulary
from models.gguf.weights import Entry, tensors

# GGUF's numbers: of a tensor's type, and of a file whose matrices are of that type.
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


class Ends(NamedTuple):
    """The tokens that end and begin a text. `begins`: training documents began with `begin`."""

    end: int
    begin: int
    begins: bool


def require_package() -> Any:
    """The package `gguf`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"to-gguf needs the package gguf, which cannot be imported ({error}); install it with "
            "pip install gguf"
        ) from error
    return gguf


def write_file(
    path: Path,
    stored: StoredModel,
    architecture: Architecture,
    found: list[Entry],
    *,
    name: str,
    settings: dict[str, Any],
    cast: bool,
) -> None:
    """Write the file of a model. `settings`: of its vocabulary. `cast`: a dtype was asked for.

    Raises:
        ValueError: the weights do not fit.
    """
    gguf = require_package()
    matrices = next(entry.dtype for entry in found if len(entry.shape) > 1)
    writer = gguf.GGUFWriter(path, architecture.name)
    general = {"type": "model", "name": name, "file_type": _FILE_TYPES[matrices]}
    contents = {f"general.{key}": value for key, value in general.items()}
    for key, value in (contents | architecture.settings | settings).items():
        _add(writer, key, value)
    for entry in found:
        shape, size = list(entry.shape), entry.shape.numel() * entry.dtype.itemsize
        kind = gguf.GGMLQuantizationType(_TYPES[entry.dtype])
        writer.add_tensor_info(entry.name, shape, None, size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors(stored, found, architecture, cast=cast):
            writer.write_tensor_data(_bits(tensor).numpy())
    finally:
        writer.close()


def vocabulary_settings(vocabulary: Vocabulary, ends: Ends, *, template: str | None) -> Any:
    """Keys of a vocabulary. `template`: of chats."""
    tokens = vocabulary.tokens
    settings: dict[str, Any] = {
        "model": vocabulary.kind,
        "pre": vocabulary.pre,
        "tokens": [token.text for token in tokens],
        "token_type": [int(token.type) for token in tokens],
        "bos_token_id": ends.begin,
        "eos_token_id": ends.end,
        "add_bos_token": ends.begins,
        "add_eos_token": False,
    }
    if vocabulary.kind == "llama":
        settings["scores"] = [token.score for token in tokens]
        settings["add_space_prefix"] = vocabulary.prefix
    else:
        settings["merges"] = list(vocabulary.merges)
    if vocabulary.unknown is not None:
        settings["unknown_token_id"] = vocabulary.unknown
    keyed = {f"tokenizer.ggml.{key}": value for key, value in settings.items()}
    return keyed if template is None else keyed | {"tokenizer.chat_template": template}


NO_VOCABULARY = {"tokenizer.ggml.model": "none"}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):  # before int, of which it is one
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as NumPy can hold it, which has no bf16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
