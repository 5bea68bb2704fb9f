"""Published training options as a run of `pretrain.train`.

The options become a run file, text becomes a corpus, and the process becomes the training run;
under torchrun every rank does so, and the first one writes the files that the others wait for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download

from data_tools.text_corpus import corpus_files, corpus_prefix, tokenize_text
from data_tools.tokenization.tokenizers import load_tokenizer
from parallel.checkpoint.errors import brief
from parallel.checkpoint.weights_reader import find_weights

# The files of a tokenizer on the hub, and the other files that may name the end token.
_TOKENIZER_PATTERNS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
]
_SEQUENCE_LENGTH = 1024  # or the model's maximum, if that is less
_WAIT_SECONDS = 24 * 3600


def run_training(options: argparse.Namespace, config: Any, *, project: str) -> None:
    """Replace this process with the run of a configuration and the options of `add_train_options`.

    Raises:
        ValueError: a file cannot be used, or an option is wrong or has no effect.
    """
    folder = Path(options.save_dir).absolute()
    if options.resume is not None:
        _check_resume(options.resume, folder)
    if options.wandb_project is not None and not options.wandb:
        raise ValueError(f"--wandb_project {options.wandb_project} has no effect without --wandb")
    values = run_values(options, config, folder, project=project)
    # The name depends on the content, so that no rank takes the file of an earlier start for this.
    texts = [values["data"].get(split) for split in ("train", "validation")]
    identity = json.dumps([vars(options), values["model"], texts], sort_keys=True)
    name = f"{config.family}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.yaml"
    run_file = folder / "run_file" / name
    if _is_first_rank():
        run_file.parent.mkdir(parents=True, exist_ok=True)
        partial = run_file.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(values), encoding="utf-8")
        partial.replace(run_file)
    else:
        _wait_for(run_file)
    command = [sys.executable, _training_program(), "--config-name", run_file.stem]
    os.execv(sys.executable, [*command, "--config-dir", str(run_file.parent)])


def run_values(
    options: argparse.Namespace, config: Any, folder: Path, *, project: str
) -> dict[str, Any]:
    """The content of the run file; text is tokenized first, once.

    Raises:
        ValueError: text or tokenizer cannot be used, or an option is out of range.
    """
    model = config.model_dump(mode="json")
    data, vocab_size = _data_values(options, folder)
    model["vocab_size"] = max(vocab_size, model["vocab_size"])
    values: dict[str, Any] = {
        "run_dir": str(folder),
        "resume": "auto" if options.resume is None else "must",
        "model": model,
        "data": {"sequence_length": _sequence_length(options.seq_len, config), **data},
        "training": {
            "max_steps": options.max_steps,
            "warmup_steps": options.warmup_steps,
            "batch_size": options.batch_size,
            "gradient_accumulation_steps": options.grad_accum,
            "lr": options.lr,
            "weight_decay": options.weight_decay,
            "grad_clip": options.max_grad_norm,
            "log_interval": options.log_every,
            "precision": "bf16" if options.use_amp else "fp32",
        },
        "checkpoint": {"interval": options.save_every},
    }
    if "validation" in data:
        values["evaluation"] = {"interval": options.eval_every}
    if options.wandb:
        wandb = {"mode": "online", "project": options.wandb_project or project}
        values["logging"] = {"wandb": wandb}
    return values


def checkpoint_path(given: str) -> Path:
    """Resolve the published name `RUN/checkpoint-N` to a Trainer's checkpoint, or a run's."""
    path = Path(given)
    step = re.fullmatch(r"checkpoint-([0-9]+)", path.name)
    if path.exists() or step is None:
        return path
    of_run = path.parent / "checkpoints" / f"step_{step[1]}"
    return of_run if of_run.exists() else path


def local_tokenizer(given: str) -> str:
    """A path, or the cached file of transformers for a tokenizer of this name.

    Raises:
        ValueError: there is no such file, and it cannot be downloaded.
    """
    if Path(given).exists():
        return str(Path(given).absolute())
    try:
        return snapshot_download(given, allow_patterns=_TOKENIZER_PATTERNS)
    except Exception as error:  # of many types: no network, no such name, not allowed
        reason = brief(error)
        raise ValueError(
            f"--tokenizer {given} is no path and cannot be had by its name ({reason}); give a "
            "tokenizer.json, a SentencePiece .model, or bytes"
        ) from None


def _data_values(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], int]:
    """The run's `data`, and the size of its vocabulary."""
    texts = {"train": options.train_data, "validation": options.eval_data}
    texts = {name: path for name, path in texts.items() if path is not None}
    workers = {} if options.num_workers is None else {"num_workers": options.num_workers}
    if options.tokenizer == "bytes":
        paths = {name: str(Path(path).absolute()) for name, path in texts.items()}
        return {"kind": "bytes", **paths, **workers}, 257
    tokenizer = local_tokenizer(options.tokenizer)
    paths = {k: _tokenized(path, tokenizer, folder / "data", k) for k, path in texts.items()}
    return {**paths, "tokenizer": tokenizer, **workers}, load_tokenizer(tokenizer).vocab_size


def _tokenized(text: str, tokenizer: str, folder: Path, name: str) -> str:
    prefix = corpus_prefix(text, tokenizer, folder, name)
    parts = corpus_files(prefix)
    if not _is_first_rank():
        for part in parts:
            _wait_for(part)
    elif not all(part.is_file() for part in parts):
        tokenize_text(text, tokenizer, prefix)
    return str(prefix)


def _sequence_length(given: int | None, config: Any) -> int:
    most = config.max_position_embeddings
    if given is None:
        return min(_SEQUENCE_LENGTH, most)
    if not 1 <= given <= most:
        name = "max_seq_len" if hasattr(config, "max_seq_len") else "max_position_embeddings"
        raise ValueError(f"--seq_len {given} must be 1 to {name}={most} of --config")
    return given


def _check_resume(given: str, folder: Path) -> None:
    """Check that the named checkpoint is the newest of the run's own directory, where it continues.

    Raises:
        ValueError: the directory has none, or another one is named.
    """
    newest = find_weights(folder).parent
    if checkpoint_path(given).absolute() not in (folder, newest):
        raise ValueError(
            f"--resume {given} is not the newest checkpoint of --save_dir {folder}, which is "
            f"{newest}; name that one, or a new --save_dir"
        )


def _training_program() -> str:
    """The file of `pretrain.train`; by its name a folder `pretrain/` of the user's might be run."""
    spec = find_spec("pretrain.train")
    assert spec is not None, "the packages lie beside each other"
    assert spec.origin is not None
    return spec.origin


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} was not written by the first rank; see its messages")
        time.sleep(0.2)
