"""Checks of a complete proof alone: traces of evaluations, and the exported model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.convert import to_hf
from pretrain.config import RunConfig
from pretrain.prove.bounds import FP32, SAME_FILES, Bound
from pretrain.prove.comparison import Error, Row, row
from pretrain.prove.outputs import read_checkpoint
from pretrain.prove.truth.oracle import OneProcess, planned_steps

_EXPORT = Bound(FP32, "the same weights; norms and angles of transformers are in fp32")
_WRITE_LOGITS = (
    "import sys; from pretrain.prove.exported import write_logits; write_logits(*sys.argv[1:])"
)
_LIMIT = 200.0  # seconds, of a process that imports transformers


def without_trace(evaluated: Path, unevaluated: Path) -> Row:
    """Every tensor of two checkpoints: weights, optimizer states, random generators."""
    names, others = _tensor_files(evaluated), _tensor_files(unevaluated)
    errors = [Error(1.0, f"{name} is in one of them") for name in names ^ others]
    errors.append(Error(0.0 if names else 1.0, "no file"))
    for name in sorted(names & others):
        ours, theirs = load_file(evaluated / name), load_file(unevaluated / name)
        keys = ours.keys() | theirs.keys()
        changed = [key for key in sorted(keys) if not _same(ours.get(key), theirs.get(key))]
        errors += [Error(1.0, f"{key} in {name}") for key in changed]
    return row("evaluation changes nothing", errors, SAME_FILES)


def _tensor_files(checkpoint: Path) -> set[Path]:
    return {path.relative_to(checkpoint) for path in checkpoint.rglob("*.safetensors")}


def _same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def exported_row(checkpoint: Path, config: RunConfig, place: Path, *, batch: int) -> Row:
    """Logits of the exported model in transformers, against those of the whole model here."""
    directory, tokens_file, logits_file = (place / n for n in ("hf", "tokens.pt", "logits.pt"))
    to_hf(checkpoint, directory, dtype=torch.float32, with_tokenizer=False)
    oracle = OneProcess(config)
    oracle.read(planned_steps(config, batches={1: batch}))
    tokens = oracle.batches[-1][0].tokens
    torch.save(tokens, tokens_file)
    subprocess.run(
        [sys.executable, "-c", _WRITE_LOGITS, directory, tokens_file, logits_file],
        env={**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=_LIMIT,
    )
    state = read_checkpoint(checkpoint.parents[1], int(checkpoint.name.removeprefix("step_")))
    expected = oracle.logits(tokens, state.state())
    found = torch.load(logits_file, weights_only=True)
    error = float((found - expected).abs().max() / expected.abs().max())
    return row("logits of the export", [Error(error, "")], _EXPORT)
