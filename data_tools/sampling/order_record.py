"""RUN/data_order.jsonl: which samples each step of a run takes, one line for each start.

A step number determines its samples, given the plan of the steps (`Curriculum`), the source mix
(`Mix`) and the settings of the data. Each start of a run, and each rollback, may change them; a
line records them from the step after `after_step` on. It supersedes lines that begin later.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.sampling.curriculum import Curriculum
from data_tools.sampling.mix import Mix

ORDER_NAME = "data_order.jsonl"

logger = logging.getLogger(__name__)

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")
# Settings of the data that decide the content of a sample, besides its sources.
_SETTINGS = ("kind", "eod", "documents", "json_key", "sequence_length", "reset_at_documents", "fim")


class StepRange(BaseModel):
    """Steps of equal size; they end where the next range begins."""

    model_config = _STRICT

    first_step: int
    """Steps before the first of the range."""
    first_sample: int
    sequences_per_step: int


class BlendRange(BaseModel):
    """Samples with one blend (`data_tools.sampling.blend.Blend`) and one sequence length."""

    model_config = _STRICT

    first_sample: int
    sequence_length: int
    weights: dict[str, float]
    base: dict[str, int]
    """Samples of `sequence_length` read from each source before the first one."""


class OrderRecord(BaseModel):
    """The samples of every step after `after_step`, up to `last_step` of the plan."""

    model_config = _STRICT

    version: Literal[1] = 1
    after_step: int
    last_step: int
    seen_step: int
    """Steps that the run had taken when the record was written; more than `after_step` after a
    rollback."""
    seed: int
    vocab_size: int
    data: DataConfig
    """Training sources, with absolute paths, and settings that decide the content of a sample."""
    fingerprints: dict[str, str]
    steps: tuple[StepRange, ...]
    mix: tuple[BlendRange, ...]
    skipped_steps: tuple[tuple[int, int], ...]
    """[first, last] steps whose data are skipped."""

    def samples_of(self, step: int) -> range:
        """Return the run-wide numbers of the samples of a step after `after_step`."""
        index = bisect_right([each.first_step for each in self.steps], step - 1) - 1
        at = self.steps[index]
        first = at.first_sample + (step - 1 - at.first_step) * at.sequences_per_step
        return range(first, first + at.sequences_per_step)

    def skips(self, step: int) -> bool:
        """Return whether the data of a step are skipped."""
        return any(first <= step <= last for first, last in self.skipped_steps)


def order_record(
    config: DataConfig,
    curriculum: Curriculum,
    mix: Mix,
    *,
    fingerprints: Mapping[str, str],
    seed: int,
    vocab_size: int,
    seen_step: int,
    skipped_steps: Sequence[tuple[int, int]],
) -> OrderRecord:
    """Record the plan of a run from the start of its `curriculum` on."""
    first_samples = [setting.first_sample for setting in curriculum.mix_schedule()]
    return OrderRecord(
        after_step=curriculum.start.steps,
        last_step=curriculum.total_steps,
        seen_step=seen_step,
        seed=seed,
        vocab_size=vocab_size,
        data=_portable(config),
        fingerprints=dict(fingerprints),
        steps=tuple(
            StepRange(
                first_step=stage.first_step,
                first_sample=first,
                sequences_per_step=stage.sequences_per_step,
            )
            for stage, first in zip(curriculum.stages, first_samples, strict=True)
        ),
        mix=tuple(
            BlendRange(
                first_sample=segment.blend.start_sample,
                sequence_length=segment.sequence_length,
                weights=segment.blend.weights,
                base=segment.blend.base,
            )
            for segment in mix.segments
        ),
        skipped_steps=tuple(skipped_steps),
    )


def add_record(run_dir: Path, record: OrderRecord) -> None:
    """Append a record, and drop those that it supersedes: none of their steps is current.

    A damaged file is replaced, with a warning.

    Raises:
        DataError, OSError: the file cannot be written.
    """
    try:
        records = read_records(run_dir)
    except DataError as error:  # a damaged record does not stop training
        logger.warning("%s; earlier steps are no longer recorded", error)
        records = []
    kept = [each for each in records if each.after_step < record.after_step]
    with replace_atomically(run_dir / ORDER_NAME) as file:
        for each in [*kept, record]:
            file.write(each.model_dump_json().encode() + b"\n")


def read_records(run_dir: Path) -> list[OrderRecord]:
    """Read the records of a run, by ascending `after_step`; none if the run has no file.

    Raises:
        DataError: the file is damaged.
    """
    path = run_dir / ORDER_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _damaged(path, 1, str(error)) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(OrderRecord.model_validate_json(line))
        except ValidationError as error:
            raise _damaged(path, number, error.errors()[0]["msg"]) from error
    return records


def _damaged(path: Path, line: int, reason: str) -> DataError:
    return DataError(
        f"{path}:{line}: not a record of the order of samples ({reason}); start the run again, "
        "and it is recorded from there on"
    )


def _portable(config: DataConfig) -> DataConfig:
    """Keep what decides the content of a sample; paths become absolute."""
    values: dict[str, Any] = {name: getattr(config, name) for name in _SETTINGS}
    values["train"] = tuple(
        source.model_copy(update={"path": _absolute(source.path), "max_epochs": None})
        for source in config.train
    )
    values["tokenizer"] = None if config.tokenizer is None else _absolute_spec(config.tokenizer)
    if config.documents == "jsonl" or any("://" in source.path for source in config.train):
        values["cache_dir"] = None if config.cache_dir is None else _absolute(config.cache_dir)
    return DataConfig(**values)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _absolute_spec(tokenizer: str) -> str:
    return tokenizer if tokenizer == "bytes" else os.path.abspath(tokenizer)
