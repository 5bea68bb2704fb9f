"""Writers of the records of a run: metrics.jsonl, progress line, TensorBoard, Weights & Biases.

Only rank 0 has writers. A failing writer is reported once and dropped, and never stops a run.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from models.standalone.wandb_writer import start_wandb
from parallel.checkpoint.storage import Storage
from pretrain.config import LoggingConfig, WandbConfig
from pretrain.metrics.records import is_training

Record = Mapping[str, float]
METRICS_NAME = "metrics.jsonl"
TASKS_FOLDER = "tasks"  # of the run directory: step_N.json, lm_eval's results after step N
_AXIS = "step"  # the run's step, in W&B
logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Writer of records: `step` and plain numbers; those of a training step hold `loss`, those of
    held-out text `eval_loss`, those of tasks `TASK/METRIC`."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Passes every record to all writers, and drops a writer at its first error."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, record: Record) -> None:
        for writer in list(self._writers):
            try:
                writer.write(record)
            except Exception as error:  # an error of a logging service does not stop training
                self._drop(writer, error)

    def close(self) -> None:
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(writer).__name__, error)
        self._writers = []

    def _drop(self, writer: Writer, error: Exception) -> None:
        self._writers.remove(writer)
        logger.warning(
            "%s failed (%s: %s) and is switched off; training continues",
            type(writer).__name__,
            type(error).__name__,
            error,
        )


def build_writers(
    config: LoggingConfig,
    *,
    run_dir: Path,
    run_config: Mapping[str, Any],
    resumed_step: int,
    total_steps: int,
) -> Writers:
    """The writers that the configuration asks for; records and results of tasks after
    `resumed_step` are dropped.

    Raises:
        OSError, ImportError: a writer cannot start.
    """
    _drop_task_results(run_dir / TASKS_FOLDER, resumed_step)
    writers: list[Writer] = [
        JsonlWriter(run_dir / METRICS_NAME, resumed_step=resumed_step),
        ProgressLine(total_steps=total_steps),
    ]
    if config.tensorboard:
        writers.append(TensorBoardWriter(run_dir / "tensorboard", resumed_step=resumed_step))
    if config.wandb.mode != "disabled":
        writers.append(WandbWriter(config.wandb, run_dir=run_dir, run_config=run_config))
    return Writers(writers)


class JsonlWriter:
    """One JSON object per line; NaN and infinity are written as null."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        _drop_after(path, resumed_step)
        self._file = path.open("a", encoding="ascii")

    def write(self, record: Record) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; a last line truncated by a crash is skipped."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    """Keep the records up to `step`; the run will write the later ones again."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    Storage().replace_file(path, lines.encode("ascii"))


def _drop_task_results(folder: Path, step: int) -> None:
    """Those that no line of metrics.jsonl has any more; not all are written again."""
    for path in folder.glob("step_*.json"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            path.unlink()


class ProgressLine:
    """`step 120/2000 | loss 3.412 | lr 3.0e-4 | grad 0.92 | 41.2k tok/s | MFU 38.1% | ETA 0:12:41`

    On a terminal the line is rewritten in place; elsewhere every record is a line of its own.
    """

    def __init__(self, *, total_steps: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._open_line = False

    def write(self, record: Record) -> None:
        of_training = is_training(record)
        text = self._training(record) if of_training else self._evaluation(record)
        start = "\r\x1b[2K" if self._open_line else ""
        self._open_line = self._in_place and of_training
        self._stream.write(start + text + ("" if self._open_line else "\n"))
        self._stream.flush()

    def close(self) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False

    def _training(self, record: Record) -> str:
        parts = [
            f"step {record['step']:.0f}/{self._total_steps}",
            f"loss {record['loss']:.3f}",
            f"lr {_short_exponent(record['lr'])}",
            f"grad {record['grad_norm']:.2f}",
            f"{_thousands(record['tokens_per_second'])} tok/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        remaining = (self._total_steps - record["step"]) * record["seconds_per_step"]
        parts.append(f"ETA {_clock(remaining)}")
        return " | ".join(parts)

    def _evaluation(self, record: Record) -> str:
        parts = [f"step {record['step']:.0f}/{self._total_steps}"]
        parts += [f"{name} {value:.4f}" for name, value in record.items() if "/" in name]
        if "eval_loss" in record:
            parts.append(f"eval loss {record['eval_loss']:.4f}")
            parts.append(f"perplexity {record['perplexity']:.2f}")
        if "bits_per_byte" in record:  # absent if the corpus does not record its bytes
            parts.append(f"{record['bits_per_byte']:.4f} bits/byte")
        return " | ".join(parts)


def _short_exponent(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _thousands(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class TensorBoardWriter:
    """Scalars `train/...` and `eval/...`; steps of an earlier attempt are purged at a resume."""

    def __init__(self, directory: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resumed_step + 1 if directory.exists() else None
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, record: Record) -> None:
        for name, value in _tagged(record).items():
            self._writer.add_scalar(name, value, int(record["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases that a resume continues; its key stays in the environment.

    W&B ignores what is logged at a lower step than before, as all is after a rollback, or up to
    where a killed run had come. So its own step only counts records, and never goes back: it is the
    run's step as long as that is the larger one. Curves are drawn over the metric `step`.
    """

    def __init__(
        self, config: WandbConfig, *, run_dir: Path, run_config: Mapping[str, Any]
    ) -> None:
        import wandb

        self._teardown = wandb.teardown
        self._run = start_wandb(
            project=config.project,
            name=config.name,
            id=_stable_id(run_dir / ".wandb_id"),
            resume="allow" if config.mode == "online" else None,
            mode=config.mode,
            dir=str(run_dir),
            config=dict(run_config),
        )
        self._run.define_metric(_AXIS, hidden=True)
        for kind in ("train", "eval"):
            self._run.define_metric(f"{kind}/*", step_metric=_AXIS)
        self._position_path = run_dir / ".wandb_step"
        self._position = self._last_position()
        self._step: int | None = None

    def write(self, record: Record) -> None:
        step = int(record["step"])
        if step != self._step:  # training and evaluation of a step are one row
            self._step, self._position = step, max(self._position + 1, step)
            self._position_path.write_text(str(self._position))
        self._run.log({**_tagged(record), _AXIS: step}, step=self._position)

    def close(self) -> None:
        self._run.finish()
        self._teardown()  # `finish` may return before an offline run is on disk

    def _last_position(self) -> int:
        """The last step of W&B's, of this process or an earlier one."""
        try:
            return int(self._position_path.read_text())
        except (OSError, ValueError):
            return -1


def _tagged(record: Record) -> dict[str, float]:
    kind = "train" if is_training(record) else "eval"
    return {
        f"{kind}/{name.removeprefix('eval_')}": value
        for name, value in record.items()
        if name != "step"
    }


def _stable_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
