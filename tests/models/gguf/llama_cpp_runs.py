"""Files run by llama.cpp itself, on a CPU and in fp32 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.missing import cannot_run

_F32 = 0  # ggml's number of a type


@contextlib.contextmanager
def opened(path: Path, *, positions: int = 256, vocabulary_only: bool = False) -> Iterator[Any]:
    """The file as `llama_cpp.Llama`; its cache is of fp16 unless it is told otherwise."""
    try:
        import llama_cpp
    except ImportError:
        cannot_run("no llama_cpp here", needs="llama-cpp-python")
    model = llama_cpp.Llama(
        str(path),
        n_ctx=positions,
        n_batch=positions,
        n_ubatch=positions,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=_F32,
        type_v=_F32,
        flash_attn=False,
        vocab_only=vocabulary_only,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """fp32 [s, V] of every position of a text, which is run in one piece."""
    model.reset()
    model.eval(list(ids))
    return torch.from_numpy(model.scores[: len(ids)].copy())


def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """The ids of a continuation, by llama.cpp's cache, one position at a time."""
    model.reset()
    model.eval(list(ids))
    new: list[int] = []
    for _ in range(count):
        new.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval([new[-1]])
    return new


def tokenized(model: Any, text: str) -> list[int]:
    """The ids of plain text."""
    return list(model.tokenize(text.encode(), add_bos=False, special=False))
