"""Evaluate a checkpoint of any family on tasks of lm_eval, EleutherAI's evaluation harness.

    python -m models.evaluate --checkpoint DIR --tasks NAME[,NAME ...] [--include-path DIR]
        [--num-fewshot N] [--limit N] [--batch-size N] [--max-length N] [--device cpu|cuda]
        [--output results.json] [--tokenizer SPEC] [--eod TOKEN] [--[no-]add-bos]
        [--special-tokens parse|plain]

DIR is a checkpoint (`step_N`), or a run directory, whose newest checkpoint is used. Tasks are those
of lm_eval and of --include-path, a folder of task files; local ones need no network. Texts are
tokenized like the training documents. Needs `pip install 'lm_eval>=0.4.13'`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.program import program
from parallel.checkpoint.newest import find_manifest

# torch takes seconds, for which --help and a mistake do not wait: functions import what needs it.
INSTALL = "pip install 'lm_eval>=0.4.13'"

_EXAMPLE = """example:
  %(prog)s --checkpoint runs/demo --tasks hellaswag,arc_easy --output results.json
"""


def evaluate_checkpoint(
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | None = None,
    bootstrap_iters: int = 100_000,
    log_samples: bool = False,
    **text_settings: Any,
) -> dict[str, Any]:
    """The results of lm_eval, and what was evaluated, under `manyformer`.

    `max_length`: tokens that the model sees at most; default: its `max_position_embeddings`.
    `device`: default: cuda where there is one.
    `text_settings`: of `load_texts`.

    Raises:
        ValueError: lm_eval is missing, or the checkpoint, a task or a setting cannot be used.
    """
    if not tasks:
        raise ValueError("--tasks names no task; give names, separated by commas")
    require_lm_eval(tasks)
    _check_numbers(batch_size=batch_size, num_fewshot=num_fewshot, limit=limit)
    find_manifest(checkpoint)
    from models.checkpoint import check_device, load_model, open_checkpoint
    from models.evaluation.texts import load_texts
    from parallel.cpu.compat import device_type

    device = device or device_type()
    check_device(device)
    stored = open_checkpoint(checkpoint)
    longest = _checked_length(max_length, stored.config.max_position_embeddings)
    texts = load_texts(stored, **text_settings)
    harness = load_harness()
    loaded = harness.load_tasks(tasks, include_path=include_path, num_fewshot=num_fewshot)
    model = load_model(stored, device=device)
    results: dict[str, Any] = harness.run_tasks(
        harness.CheckpointLM(model, texts, max_length=longest, batch_size=batch_size),
        loaded,
        limit=limit,
        bootstrap_iters=bootstrap_iters,
        log_samples=log_samples,
    )
    results["manyformer"] = {
        "checkpoint": str(stored.weights.parent),
        "family": stored.family.name,
        "precision": str(model.ctx.precision.dtype).removeprefix("torch."),
        "max_length": longest,
        **texts.described(),
    }
    return results


def require_lm_eval(tasks: Sequence[str], *, setting: str = "--tasks") -> None:
    """Raises ValueError: the package lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"{setting}: {','.join(tasks)} are run by lm_eval, which is not installed; run "
            f"{INSTALL}"
        )


def _check_numbers(*, batch_size: int, num_fewshot: int | None, limit: float | None) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be 1 or more; raise it")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot {num_fewshot} must be 0 or more; raise it")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit % 1 == 0)):
        raise ValueError(
            f"--limit {limit} must be a number of questions, or a share between 0 and 1; leave it "
            "out for all of them"
        )


def load_harness() -> Any:
    """The module `models.evaluation.harness`, which imports lm_eval.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module("models.evaluation.harness")
    except ImportError as error:
        raise ValueError(f"lm_eval cannot be imported: {error}; run {INSTALL}") from error


def _checked_length(given: int | None, longest: int) -> int:
    if given is not None and not 1 < given <= longest:
        raise ValueError(
            f"--max-length {given} must be from 2 to the model's max_position_embeddings={longest}"
            "; leave it out for all of them"
        )
    return longest if given is None else given


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parse(argv)
    try:
        _check_output(arguments.output)
        results = evaluate_checkpoint(
            arguments.checkpoint,
            [name.strip() for name in arguments.tasks.split(",") if name.strip()],
            include_path=arguments.include_path,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            device=arguments.device,
            tokenizer=arguments.tokenizer,
            eod=arguments.eod,
            add_bos=arguments.add_bos,
            special_tokens=arguments.special_tokens,
        )
        # Before they are written, which may fail.
        print("\n".join([table(results), *results["manyformer"]["remarks"]]), flush=True)
        if arguments.output is not None:
            write_results(arguments.output, results)
            print(f"wrote {arguments.output}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table(results: dict[str, Any]) -> str:
    """A line for every metric: task, examples before a question, metric, value, standard error."""
    lines = [("task", "n-shot", "metric", "value", "stderr")]
    for name, metrics in (*results["results"].items(), *results.get("groups", {}).items()):
        shots = str(results["n-shot"].get(name, ""))
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}", "")
                error = f"{error:.4f}" if isinstance(error, float) else ""
                lines.append((name, shots, metric, f"{value:.4f}", error))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _check_output(output: Path | None) -> None:
    """Before an evaluation that may take hours."""
    if output is None:
        return
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: must be a file in a folder that exists; make it")
    part = _part_of(output)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(
            f"--output {output}: {error.strerror}: must be a file in a folder that can be written; "
            "choose another"
        ) from error


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, whole or not at all."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(
        results, indent=2, sort_keys=True, default=handle_non_serializable, ensure_ascii=False
    )
    part = _part_of(path)
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("python -m models.evaluate"),
        description="Evaluate a checkpoint on tasks of lm_eval.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint (step_N) or a run"
    )
    parser.add_argument("--tasks", required=True, help="names or patterns, separated by commas")
    parser.add_argument("--include-path", type=Path, help="a folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples; default: as each task says")
    parser.add_argument("--limit", type=float, help="questions of each task, or below 1 a share")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: 8)")
    parser.add_argument("--max-length", type=int, help="tokens; default: all that the model sees")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--tokenizer", help="instead of the one that the checkpoint names")
    parser.add_argument(
        "--eod", metavar="TOKEN", help="the end token; default: what ended documents of training"
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin texts with the begin token; default: as the documents of training did",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("parse", "plain"),
        help="what becomes of a special token that a text spells; default: as in training",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
