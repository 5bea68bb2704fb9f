"""Options of the published commands. Functions import what needs torch, so that `--help` does
not."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.agiformer.standalone.settings import (
    CURRICULUM,
    check_counts,
    check_model_file,
    check_output,
    check_row,
    check_stages,
    check_text,
    published_config,
)
from models.common.sampling import check_sampling, check_seed
from models.standalone.command_line import CommandParser, run_command

# What train_scaled leaves in its folder, and the others read if nothing else is named.
DEFAULT_MODEL = "best_model_scaled.pth"
# Of the training commands, beside the sizes: what their numbers mean.
_HELP = {
    "d_model": "channels",
    "n_layers": "blocks",
    "num_heads": "heads of attention and memory",
    "window_size": "patches that attention sees",
    "max_steps": "steps of the run",
    "batch_size": "samples of a micro-batch",
    "accumulation": "micro-batches of a step",
    "warmup": "steps to the largest learning rate",
    "eval_every": "steps between two evaluations",
    "lr": "largest learning rate; a cosine takes it to a tenth",
}


def train_scaled(argv: Sequence[str] | None = None) -> int:
    """`train_scaled`: 50,000 steps of the 129M class."""
    parser = CommandParser(
        "train_scaled",
        "Train on train.txt and val.txt of a folder.",
        example="--data_dir data --output runs/scaled",
    )
    sizes = {"d_model": 768, "n_layers": 12, "num_heads": 12, "window_size": 256}
    times = {"max_steps": 50_000, "batch_size": 2, "accumulation": 4, "warmup": 500}
    _add(parser, **sizes, **times, eval_every=2000, lr=2e-4)
    return _run("train_scaled", lambda: _training(parser, argv, ["train"]))


def train_curriculum(argv: Sequence[str] | None = None) -> int:
    """`train_curriculum`: 20,000 steps in three stages."""
    parser = CommandParser(
        "train_curriculum",
        "Train on dictionary.txt, stories.txt, wiki.txt; val.txt is held out.",
        example="--data_dir data --output runs/curriculum",
    )
    sizes = {"d_model": 512, "n_layers": 6, "num_heads": 8, "window_size": 128}
    times = {"max_steps": 20_000, "batch_size": 4, "accumulation": 1, "warmup": 100}
    _add(parser, **sizes, **times, eval_every=200, lr=3e-4)
    sources = [stage.source for stage in CURRICULUM]

    def options() -> argparse.Namespace:
        given = _training(parser, argv, sources)
        check_stages(given.max_steps * given.accumulation)
        return given

    return _run("train_curriculum", options)


def generate(argv: Sequence[str] | None = None) -> int:
    """`generate CHECKPOINT`."""
    parser = _reader("generate", "Continue a text.")
    parser.add_argument("--prompt", default="The ", help="text to continue (default: 'The ')")
    parser.add_argument("--length", type=int, default=200, help="bytes to add")
    parser.add_argument("--temp", type=float, default=0.7, help="0: most probable bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")

    def options() -> argparse.Namespace:
        given = _with_model(parser, argv)
        _check_options(length=given.length)
        check_sampling(given.temp)
        check_seed(given.seed)
        return given

    return _run("generate_text", options)


def overfit_test(argv: Sequence[str] | None = None) -> int:
    """`overfit_test`: exit status 1 where the pattern is not learned."""
    parser = CommandParser(
        "overfit_test", "Learn a repeated pattern by heart.", example="--steps 200"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")

    def options() -> argparse.Namespace:
        given = parser.parse_args(argv)
        _check_options(steps=given.steps)
        return given

    return _run("overfit", options)


def recall_test(argv: Sequence[str] | None = None) -> int:
    """`test_recall_fixed CHECKPOINT`: needle in a haystack."""
    parser = _reader("test_recall_fixed", "Ask for a needle, with the memory and without.")
    parser.add_argument("--distances", type=int, nargs="+", help="bytes between telling and asking")
    return _run("recall", lambda: _with_model(parser, argv))


def inspect_reasoning(argv: Sequence[str] | None = None) -> int:
    """`inspect_reasoning CHECKPOINT`: thinking steps of a text."""
    parser = _reader("inspect_reasoning", "Count the thinking steps of a text.")
    parser.add_argument(
        "--prompt",
        default="The quick brown fox jumps over the lazy dog. 12 + 30 = 42",
        help="the text",
    )
    return _run("inspect_reasoning", lambda: _with_model(parser, argv))


def memory_integrity(argv: Sequence[str] | None = None) -> int:
    """`test_memory_integrity CHECKPOINT`: exit status 1 where a check does not pass."""
    parser = _reader("test_memory_integrity", "Check what the memories of a model compute.")
    sentence = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42. "
    parser.add_argument("--prompt", default=25 * sentence, help="the text; default: 1,475 bytes")
    return _run("memory_integrity", lambda: _with_model(parser, argv))


def _run(name: str, parse: Callable[[], argparse.Namespace]) -> int:
    """0, or 1 where the command returns False, or 2 for a user's mistake."""
    found: list[bool | None] = []

    def command() -> None:
        options = parse()
        # After parsing, so that --help and a wrong option do not wait for torch.
        from models.agiformer.standalone import commands

        found.append(getattr(commands, name)(options))

    return run_command(command) or (1 if found[0] is False else 0)


def _add(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    add = parser.add_argument
    add("--data_dir", default="data", help="folder of the texts")
    add("--output", default=".", help="folder of the models and metrics")
    for name, value in defaults.items():
        add(f"--{name}", type=type(value), default=value, metavar="N", help=_HELP[name])
    add("--seq_len", type=int, default=1024, metavar="N", help="bytes of a sample")
    add("--thinking_steps", type=int, default=3, metavar="N", help="most steps of a patch")
    add("--dropout", type=float, default=0.1, metavar="N", help="share of features")
    add("--log_every", type=int, default=10, metavar="N", help="steps between two lines")
    add("--use_amp", action="store_true", help="bf16")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--device", default="cpu", help="cpu, cuda")


def _training(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, sources: Sequence[str]
) -> argparse.Namespace:
    """The options of a training run, checked as far as they can be without torch."""
    options = parser.parse_args(argv)
    names = ("batch_size", "max_steps", "accumulation", "eval_every", "log_every")
    _check_options(**{name: getattr(options, name) for name in names})
    sizes = ("d_model", "n_layers", "num_heads", "window_size", "dropout", "thinking_steps")
    config = published_config(**{name: getattr(options, name) for name in sizes})
    check_row(options.seq_len, config)
    check_seed(options.seed)
    check_output(Path(options.output))
    for source in (*sources, "val"):
        check_text(Path(options.data_dir) / f"{source}.txt")
    return options


def _check_options(**counts: int) -> None:
    check_counts(**{f"--{name}": count for name, count in counts.items()})


def _reader(name: str, description: str) -> argparse.ArgumentParser:
    parser = CommandParser(name, description, example=DEFAULT_MODEL)
    file = f"a .pth file of a training command (default: {DEFAULT_MODEL})"
    parser.add_argument("checkpoint", nargs="?", help=file)
    parser.add_argument("--model", help="the same, as an option")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    return parser


def _with_model(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(argv)
    if options.checkpoint is not None and options.model is not None:
        raise ValueError(
            f"checkpoint={options.checkpoint!r} and --model={options.model!r}: give the file once"
        )
    options.model = options.model or options.checkpoint or DEFAULT_MODEL
    check_model_file(Path(options.model))
    if getattr(options, "prompt", None) == "":
        raise ValueError("--prompt is empty; give at least one character")
    return options
