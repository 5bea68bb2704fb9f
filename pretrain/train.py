"""Entry point of training: command line -> checked configuration -> loop.

All checks of settings run before torch is imported, so that a mistake costs a second and not the
start of a job.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if not __package__:
    # Started as a script: add the repository root, and drop this folder from the search path, or
    # its modules could be imported by their bare names.
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

from data_tools.cli import program
from parallel.checkpoint.errors import AgreedError
from parallel.cpu.collector import imports_uncollected
from parallel.cpu.threads import prepare_threads
from pretrain.distributed.launcher_env import (
    adopt_launcher,
    environment_number,
    ranks_on_this_machine,
)
from pretrain.errors import (
    EXIT_COMPLETED,
    EXIT_LOST_RANK,
    EXIT_NOT_FINITE,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    ConfigError,
    LostRankError,
    TrainingError,
    is_out_of_memory,
)
from pretrain.supervision.launcher_exit import end_with_launcher

if TYPE_CHECKING:
    from pretrain.config.resolve import ResolvedRun

# Read by CUDA and by torch's allocator when they start, so before torch is imported; by no one
# without CUDA. Megatron-Core overlaps its collectives with the products that follow if there is one
# connection; segments that grow waste no memory on sequence lengths that change.
_CUDA_DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
DEBUG_VARIABLE = "MANYFORMER_DEBUG"
MARKERS_VARIABLE = "MANYFORMER_READS_MARKERS"

_EXAMPLE = """\
example:
  deepspeed pretrain/train.py --config-name demo --ds_config configs/ds/zero1.json training.lr=1e-3
  deepspeed --module pretrain.train ...    # an installed package; in one process: manyformer train
The same arguments work under torchrun, accelerate launch, srun, mpirun and plain python.
"""


_MEMORY_ADVICE = (
    "out of memory: lower training.batch_size and raise gradient_accumulation_steps, set "
    "training.activation_recomputation=full, compute the logits of a large vocabulary in parts "
    "(training.logits_parts), or cut the model further"
)


class CommandError(ValueError):
    """An invalid command line or launcher environment."""


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; --help lists the arguments")


def positive_int(text: str) -> int:
    """Parse a positive whole number."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def main(argv: Sequence[str] | None = None, *, last_step: int | None = None) -> int:
    """Run training from the command line; returns the exit code (see `pretrain.errors`).

    `last_step`: a step after which the run stops as if a signal had asked for it.
    """
    try:
        end_with_launcher()
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        adopt_launcher()
        settings = _configure(arguments)
        if settings is None:
            return EXIT_COMPLETED
        if _rank() == 0:
            print(
                f"{settings.config.run_dir}: settings checked; torch and DeepSpeed take seconds",
                flush=True,
            )
        for name, value in _CUDA_DEFAULTS.items():
            os.environ.setdefault(name, value)
        remark = prepare_threads(ranks=ranks_on_this_machine())
        with imports_uncollected():
            from parallel.checkpoint.file_modes import private_files
            from parallel.cpu.compat import device_type
            from pretrain.run import run

        if remark is not None and device_type() == "cpu" and _rank() == 0:
            sys.stderr.write(f"warning: {remark}\n")
        with private_files():
            code = run(settings, last_step=last_step)
        # The job script reads the marker file; torchrun would report 75 as a failed rank.
        if code == EXIT_STOPPED and os.environ.get(MARKERS_VARIABLE) == "1":
            return EXIT_COMPLETED
        return code
    except TrainingError as error:
        _report(error)
        return EXIT_NOT_FINITE
    except (ValueError, OSError) as error:
        _report(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except LostRankError as error:
        if not error.is_reported:
            _report(error)
        return EXIT_LOST_RANK
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _report(error, advice=_MEMORY_ADVICE)
        return EXIT_OUT_OF_MEMORY


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog=program("pretrain/train.py"),
        description="Pretrain the model that a configuration describes.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    # For job scripts: check the settings for WORLD_SIZE processes, print the run directory, exit.
    parser.add_argument("--print-run-dir", action="store_true", help=argparse.SUPPRESS)
    # Added by the deepspeed launcher; LOCAL_RANK is used instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a run: its run file, DeepSpeed's file, and the overrides."""
    parser.add_argument(
        "--config-name",
        default="base",
        metavar="NAME",
        help="run file in configs/ or DIR, without .yaml (default: base)",
    )
    parser.add_argument(
        "--config-dir", metavar="DIR", help="your run files and groups, searched first"
    )
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        metavar="FILE",
        help="DeepSpeed JSON, or its name in configs/ds (default: zero1.json, or zero0.json where "
        "enough)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any setting, such as training.lr=1e-3, or a file of a group, such as data=bytes",
    )


def _configure(arguments: argparse.Namespace) -> ResolvedRun | None:
    """The resolved settings; None if the command line only asks to print something."""
    from models.evaluate import require_lm_eval
    from pretrain.config import to_yaml
    from pretrain.config.compose import compose_config
    from pretrain.config.resolve import resolve_run
    from pretrain.missing_data import missing_data

    config = compose_config(
        arguments.config_name, config_dir=arguments.config_dir, overrides=arguments.overrides
    )
    if arguments.print_config:
        if _rank() == 0:
            sys.stdout.write(to_yaml(config))
        return None
    world_size = environment_number("WORLD_SIZE", 1)
    settings = resolve_run(config, arguments.ds_config, world_size=world_size)
    if arguments.print_run_dir:
        sys.stdout.write(f"{Path(config.run_dir).absolute()}\n")
        return None
    if world_size == 1:  # several ranks agree on it in one line, once they have met
        for missing in missing_data(config.data):
            raise ConfigError(f"{missing.problem}; {missing.remedy}")
        if config.evaluation.tasks:
            require_lm_eval(config.evaluation.tasks, setting="evaluation.tasks")
    return settings


def _report(error: Exception, *, advice: str = "") -> None:
    """Print one line on standard error; rank 0 alone reports errors that all ranks share."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    agreed = isinstance(error, (AgreedError, CommandError, ConfigError))
    if agreed and _rank() != 0:
        return
    message = " ".join(str(error).split()) or type(error).__name__
    message = f"{advice} ({message})" if advice else message
    if type(error).__module__ == "builtins" and os.environ.get(DEBUG_VARIABLE) != "1":
        message += f" ({DEBUG_VARIABLE}=1 shows where)"
    prefix = f"error on rank {_rank()}" if _rank() else "error"
    sys.stderr.write(f"{prefix}: {message}\n")


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


if __name__ == "__main__":
    sys.exit(main())
