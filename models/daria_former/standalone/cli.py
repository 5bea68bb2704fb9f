"""The published command lines: daria-train, daria-generate, daria-export.

`daria-train` translates its options to a run file and becomes `python -m pretrain.train`, the
engine of every run; under torchrun each rank does so (`torchrun -m models.daria_former.cli train`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models.daria_former.config import DariaFormerConfig
from models.daria_former.standalone.config_file import read_config

_SIZES = ("small", "base", "large", "b7", "b13", "b70")
_WAIT_SECONDS = 24 * 3600
# What a tokenizer consists of on the hub, and what beside it may say which token ends a text.
_TOKENIZER_PATTERNS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
]
_SEQUENCE_LENGTH = 1024  # or what the model can see, if that is less


def train(argv: Sequence[str] | None = None) -> int:
    """`daria-train`: does not return when everything is right, but becomes the training run."""
    return _guarded(lambda: _train(_train_parser().parse_args(argv)))


def generate(argv: Sequence[str] | None = None) -> int:
    """`daria-generate`: prints the prompt and its continuation."""
    return _guarded(lambda: _generate(_generate_parser().parse_args(argv)))


def export(argv: Sequence[str] | None = None) -> int:
    """`daria-export`: writes a Hugging Face directory."""
    return _guarded(lambda: _export(_export_parser().parse_args(argv)))


def _train(options: argparse.Namespace) -> None:
    folder = Path(options.save_dir).absolute()
    if options.resume is not None:
        _check_resume(options.resume, folder)
    if options.wandb_project is not None and not options.wandb:
        raise ValueError(f"--wandb_project {options.wandb_project} has no effect without --wandb")
    values = run_values(options, _config(options.config), folder)
    # Its name says what is in it, so no rank can take that of an earlier start for this one.
    texts = [values["data"].get(split) for split in ("train", "validation")]
    name = f"daria-{_digest(vars(options), values['model'], texts)}.yaml"
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


def _training_program() -> str:
    """The file of `pretrain.train`; by its name a folder `pretrain/` of the user's might be run."""
    spec = find_spec("pretrain.train")
    assert spec is not None, "the packages lie beside each other"
    assert spec.origin is not None
    return spec.origin


def _check_resume(given: str, folder: Path) -> None:
    """Training goes on from the newest checkpoint of its own directory, so only that can be asked
    for.

    Raises:
        ValueError: the directory has none, or another one is named.
    """
    from parallel.checkpoint.weights_reader import find_weights

    newest = find_weights(folder).parent
    if _checkpoint(given).absolute() not in (folder, newest):
        raise ValueError(
            f"--resume {given} is not the newest checkpoint of --save_dir {folder}, which is "
            f"{newest}; name that one, or a new --save_dir"
        )


def _checkpoint(given: str) -> Path:
    """The checkpoint that `RUN/checkpoint-N` means: the Trainer's of that name, or a run's."""
    path = Path(given)
    step = re.fullmatch(r"checkpoint-([0-9]+)", path.name)
    if path.exists() or step is None:
        return path
    of_run = path.parent / "checkpoints" / f"step_{step[1]}"
    return of_run if of_run.exists() else path


def run_values(
    options: argparse.Namespace, config: DariaFormerConfig, folder: Path
) -> dict[str, Any]:
    """The run file of these options; text is tokenized first, once.

    Raises:
        ValueError: text or tokenizer cannot be used, or an option of no effect.
    """
    texts = {"train": options.train_data, "validation": options.eval_data}
    texts = {name: path for name, path in texts.items() if path is not None}
    data: dict[str, Any] = {"sequence_length": _sequence_length(options.seq_len, config)}
    model = config.to_dict()
    if options.tokenizer == "bytes":
        data |= {"kind": "bytes", **{k: str(Path(p).absolute()) for k, p in texts.items()}}
        model["vocab_size"] = max(257, model["vocab_size"])
    else:
        tokenizer = _local_tokenizer(options.tokenizer)
        data |= {k: _tokenized(p, folder / "data", k, tokenizer) for k, p in texts.items()}
        data |= {"tokenizer": tokenizer}
        model["vocab_size"] = max(_vocab_size(tokenizer), model["vocab_size"])
    if options.num_workers is not None:
        data["num_workers"] = options.num_workers
    values: dict[str, Any] = {
        "run_dir": str(folder),
        "resume": "auto" if options.resume is None else "must",
        "model": model,
        "data": data,
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
    if "validation" in texts:
        values["evaluation"] = {"interval": options.eval_every}
    if options.wandb:
        wandb = {"mode": "online", "project": options.wandb_project or "daria-former"}
        values["logging"] = {"wandb": wandb}
    return values


def _sequence_length(given: int | None, config: DariaFormerConfig) -> int:
    if given is None:
        return min(_SEQUENCE_LENGTH, config.max_seq_len)
    if not 1 <= given <= config.max_seq_len:
        raise ValueError(
            f"--seq_len {given} must be 1 to max_seq_len={config.max_seq_len} of --config"
        )
    return given


def _config(given: str) -> DariaFormerConfig:
    path = Path(given)
    # The published files of the sizes held nothing else than these.
    size = path.stem.removeprefix("daria_former_")
    if not path.is_file() and size in _SIZES:
        config: DariaFormerConfig = getattr(DariaFormerConfig, size)()
        return config
    if not path.is_file():
        raise ValueError(f"--config {given} is no file and none of {', '.join(_SIZES)}")
    return read_config(path)


def _local_tokenizer(given: str) -> str:
    """A path, or where transformers keeps the tokenizer of this name.

    Raises:
        ValueError: it is neither here nor to be had.
    """
    if Path(given).exists():
        return str(Path(given).absolute())
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(given, allow_patterns=_TOKENIZER_PATTERNS)
    except Exception as error:  # of many types: no network, no such name, not allowed
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--tokenizer {given} is no path and cannot be had by its name ({reason}); give a "
            "tokenizer.json, a SentencePiece .model, or bytes"
        ) from None


def _tokenized(text: str, folder: Path, split: str, tokenizer: str) -> str:
    """The corpus of these very files and tokenizer; the first rank makes it if it is not there.

    Raises:
        ValueError: there is no such text, or it cannot be tokenized.
    """
    from data_tools.preprocessing.inputs import find_inputs
    from data_tools.tokenization.tokenizers import tokenizer_fingerprint

    files = [file.absolute() for source in find_inputs([text]) for file in source.files]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    prefix = folder / f"{split}-{_digest(tokenizer_fingerprint(tokenizer), stamps)}"
    parts = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json")]
    if not _is_first_rank():
        for part in parts:
            _wait_for(part)
    elif not all(part.is_file() for part in parts):
        folder.mkdir(parents=True, exist_ok=True)
        _tokenize(text, prefix, tokenizer)
    return str(prefix)


def _tokenize(text: str, prefix: Path, tokenizer: str) -> None:
    """Alone, whatever launcher started this process: the other ranks take no part in it."""
    from data_tools.cli import usable_cpus
    from data_tools.preprocess import preprocess, summary
    from data_tools.preprocessing.encoding import EncodingSettings
    from data_tools.preprocessing.join_shards import PreprocessJob

    command = ["python", "-m", "data_tools.preprocess", "--input", text]
    command += ["--output", str(prefix), "--tokenizer", tokenizer]
    settings = EncodingSettings(
        tokenizer=tokenizer, eod=None, append_eod=True, json_key="text", skip_bad_lines=False
    )
    job = PreprocessJob([text], str(prefix), settings, overwrite=True, command=shlex.join(command))
    # Workers are the parallelism: a tokenizer's threads would fight them for the same CPUs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(summary(str(prefix), preprocess(job, num_workers=usable_cpus()).info), flush=True)


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} was not written by the first rank; see its messages")
        time.sleep(0.2)


def _vocab_size(tokenizer: str) -> int:
    from data_tools.tokenization.tokenizers import load_tokenizer

    return load_tokenizer(tokenizer).vocab_size


def _generate(options: argparse.Namespace) -> None:
    import torch

    from models.daria_former.standalone.checkpoint_io import load_checkpoint
    from models.daria_former.standalone.generation import DariaGenerator
    from models.prompting import load_prompting

    if options.temperature == 0 and not options.greedy:
        raise ValueError("--temperature 0 draws nothing; for the most probable token use --greedy")
    _check_device(options.device)
    model, spec, text = load_checkpoint(_checkpoint(options.checkpoint), device=options.device)
    spec = options.tokenizer or spec
    if spec is None:
        raise ValueError(f"{options.checkpoint} names no tokenizer; give one with --tokenizer")
    prompting = load_prompting(spec if spec == "bytes" else _local_tokenizer(spec), text)
    ids = prompting.encode(options.prompt, vocab_size=model.config.vocab_size)
    rows = DariaGenerator(model).generate(
        torch.tensor([ids], device=options.device),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        do_sample=not options.greedy,
        eos_token_id=prompting.eod_id,
        use_variability=not options.no_variability,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    print(prompting.decode(rows[0].tolist()))


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"--device {name} cannot be used ({reason}); try cpu") from error


def _export(options: argparse.Namespace) -> None:
    import torch

    from models.convert import to_hf
    from models.daria_former.standalone.checkpoint_io import (
        is_run,
        load_checkpoint,
        write_checkpoint,
    )

    source, dtype = _checkpoint(options.checkpoint), torch.float16 if options.half else None
    with tempfile.TemporaryDirectory() as folder:
        if options.merge_lora or not is_run(source):
            model, tokenizer, text = load_checkpoint(source, device="cpu")
            source = Path(folder) / "step_0"
            write_checkpoint(
                model, source, tokenizer=tokenizer, text=text, merge=options.merge_lora
            )
        for line in to_hf(source, Path(options.output), dtype=dtype):
            print(line)
    print(f"wrote {options.output}")


def _train_parser() -> argparse.ArgumentParser:
    parser = _parser("daria-train", "Pretrain a Daria-Former on text.")
    add = parser.add_argument
    add("--config", default="small", help=f"YAML of settings, or one of {', '.join(_SIZES)}")
    add("--train_data", required=True, help="text file, directory or glob")
    add("--eval_data", help="held-out text")
    add("--tokenizer", default="bytes", help="bytes, a path, or a name of the Hugging Face hub")
    add("--seq_len", type=int, help="tokens of a training sample; default: 1024 or max_seq_len")
    add("--lr", type=float, default=1e-4)
    add("--weight_decay", type=float, default=0.01)
    add("--batch_size", type=int, default=4, help="samples per micro-batch and rank")
    add("--max_steps", type=int, default=100_000)
    add("--warmup_steps", type=int, default=1000)
    add("--grad_accum", type=int, default=1, help="micro-batches per step")
    add("--max_grad_norm", type=float, default=1.0)
    add("--save_dir", default="checkpoints", help="directory of the run")
    add("--save_every", type=int, default=1000)
    add("--eval_every", type=int, default=1000)
    add("--log_every", type=int, default=10)
    add("--use_amp", action=argparse.BooleanOptionalAction, default=False, help="bf16")
    add("--no_amp", dest="use_amp", action="store_false", help="fp32")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb_project", help="default: daria-former")
    add("--resume", help="--save_dir or its newest checkpoint: continue it, or fail")
    add("--num_workers", type=int, help="threads that prepare samples")
    return parser


def _generate_parser() -> argparse.ArgumentParser:
    parser = _parser("daria-generate", "Sample text from a Daria-Former.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, a step_N of it, or checkpoint-N")
    add("--tokenizer", help="instead of the one that the checkpoint names")
    add("--prompt", required=True)
    add("--max_new_tokens", type=int, default=256)
    add("--temperature", type=float, default=1.0)
    add("--top_k", type=int, default=50, help="0: all")
    add("--top_p", type=float, default=0.9)
    add("--greedy", action="store_true", help="the most probable token every time")
    add("--no_variability", action="store_true", help="no penalties for repetition")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _parser("daria-export", "Write a Hugging Face directory.")
    parser.add_argument("--checkpoint", required=True, help="as for daria-generate")
    parser.add_argument("--output", required=True, help="a new directory")
    parser.add_argument("--merge_lora", action="store_true", help="adapters into the weights")
    parser.add_argument("--half", action="store_true", help="fp16")
    parser.add_argument("--hf", action="store_true", help="the only format, so already chosen")
    return parser


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=name, description=description, allow_abbrev=False)


def _guarded(command: Callable[[], None]) -> int:
    """Run a command; what a user can mend is one line on standard error and exit status 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        first = " ".join(str(error).split())
        print(f"error: {first}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    commands = {"train": train, "generate": generate, "export": export}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m models.daria_former.cli {{{','.join(commands)}}} ...")
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
