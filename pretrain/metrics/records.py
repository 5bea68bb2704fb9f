"""Measurements of a run: throughput, memory, and the records for the writers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

Record = dict[str, float]


class Rate(NamedTuple):
    """Training throughput of all ranks together.

    `mfu`: model FLOP/s over the peak of all devices, None where the peak is unknown.
    """

    tokens_per_second: float
    seconds_per_step: float
    mfu: float | None


class Throughput:
    """Measures training throughput between two log lines.

    The first step compiles, allocates and warms caches: after it the loop calls `measure` once, so
    that no later figure includes it. `paused` excludes evaluation and saving.

    Args:
        peak: FLOP/s of all devices together; None: unknown.
        clock: seconds; read after the device has been synchronised.
    """

    def __init__(
        self,
        *,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token = 0.0
        self._peak = peak
        self._clock = clock
        self._start = clock()
        self._step = self._tokens = 0
        self._last = Rate(0.0, 0.0, None)

    def start(self, *, step: int, tokens: int, flops_per_token: float) -> None:
        """Begin a window: `step` steps and `tokens` tokens are done.

        `flops_per_token`: of training, from `flops.training_flops_per_token`.
        """
        self._start, self._step, self._tokens = self._clock(), step, tokens
        self._flops_per_token = flops_per_token

    def measure(self, *, step: int, tokens: int) -> Rate:
        """Return the throughput since the last call and begin the next window.

        Without a new step in between, the previous result is returned again.
        """
        if step == self._step:
            return self._last
        seconds = max(self._clock() - self._start, 1e-9)
        tokens_per_second = (tokens - self._tokens) / seconds
        mfu = None
        if self._peak is not None:
            mfu = tokens_per_second * self._flops_per_token / self._peak
        self._last = Rate(tokens_per_second, seconds / (step - self._step), mfu)
        self.start(step=step, tokens=tokens, flops_per_token=self._flops_per_token)
        return self._last

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block."""
        before = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - before


def training_record(
    *,
    step: int,
    loss: float,
    terms: Mapping[str, float],
    grad_norm: float,
    lr: float,
    tokens: int,
    skipped_steps: int,
    rate: Rate,
    slowest_rank: float | None = None,
) -> Record:
    """Build the metrics.jsonl record of a training step.

    `tokens` counts those seen so far, `skipped_steps` the steps that were not finite.
    `slowest_rank`: ratio of the slowest rank (`Watchdog.slowest_ratio`), where known.
    """
    record: Record = {"step": step, "loss": loss, "lm_loss": terms.get("lm_loss", loss), **terms}
    record |= {
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": tokens,
        "skipped_steps": skipped_steps,
        "tokens_per_second": rate.tokens_per_second,
        "seconds_per_step": rate.seconds_per_step,
    }
    if rate.mfu is not None:
        record["mfu"] = rate.mfu
    if slowest_rank is not None:
        record["slowest_rank_ratio"] = slowest_rank
    memory = peak_memory_gib()
    if memory is not None:
        record["peak_memory_gib"] = memory
    return record


def evaluation_record(
    *,
    step: int,
    tokens: int,
    total_nats: float,
    num_tokens: int,
    num_bytes: int | None,
    num_characters: int | None = None,
    group_bits: Mapping[str, float] | None = None,
) -> Record:
    """Build the metrics.jsonl record of an evaluation.

    eval_loss = nats / tokens, perplexity = exp(eval_loss), bits_per_byte = nats / (ln 2 bytes):
    the last compares models of different tokenizers, and is omitted if the number of bytes of the
    corpus's text is unknown (`num_bytes` is None). So is bits_per_character, which is larger by the
    bytes of a character. `group_bits`: entries of the family's own.
    """
    loss = total_nats / num_tokens
    record: Record = {
        "step": step,
        "eval_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "tokens": tokens,
    }
    if num_bytes is not None:
        record["bits_per_byte"] = total_nats / (math.log(2) * num_bytes)
    if num_characters:
        record["bits_per_character"] = total_nats / (math.log(2) * num_characters)
    return record | dict(group_bits or {})


def task_record(*, step: int, tokens: int, results: Mapping[str, Any]) -> Record:
    """Build the metrics.jsonl record of an evaluation on tasks, from lm_eval's results.

    `TASK/METRIC` for every number of a task or group, with `,FILTER` where the task filters what
    was answered.
    """
    record: Record = {"step": step, "tokens": tokens}
    for name, metrics in (*results["results"].items(), *results.get("groups", {}).items()):
        for key, value in metrics.items():
            if isinstance(value, int | float) and "," in key:  # not what describes the task
                record[f"{name}/{key.removesuffix(',none')}"] = float(value)
    return record


def is_training(record: Mapping[str, float]) -> bool:
    """Whether a record is of a training step, not of an evaluation."""
    return "loss" in record


def peak_memory_gib() -> float | None:
    """Peak CUDA memory in tensors of this process, in GiB; None without CUDA."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
