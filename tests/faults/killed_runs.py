"""Runs that are killed at drawn moments, and the samples that each rank trained on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple, NoReturn

import pretrain.checkpointing.store
import pretrain.engine.engine
from data_tools.loading.batch import Batch
from pretrain.errors import EXIT_COMPLETED
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run

PLACES = ("load", "train", "between", "save", "save")  # saves are short: drawn twice as often
_STEP_SECONDS = 0.03  # about one step: "train" means anywhere in it


class Moment(NamedTuple):
    """When whom the signal hits: `victim` None means all ranks at once.

    `load`: before a batch is handed out. `train`: `delay` seconds after a step has begun, wherever
    that is. `between`: after a step. `save`: right before storage operation `point`, counted from
    the save of the step on.
    """

    step: int
    place: str
    victim: int | None
    point: int = 0
    delay: float = 0.0

    @property
    def by(self) -> int:
        """The rank whose progress decides."""
        return self.victim or 0


class TrainedStep(NamedTuple):
    """Measurements of one rank in one step; floats are written in full."""

    step: int
    samples: tuple[str, ...]
    loss: str
    grad_norm: str


def draw_moments(
    seed: int, count: int, *, steps: int, interval: int, points: list[int]
) -> list[Moment]:
    """Moments in the order of their steps, over the whole run; `points` of a save on each rank."""
    draw = random.Random(seed)
    moments = []
    for _ in range(count):
        place, victim = draw.choice(PLACES), draw.choice((0, 1, None))
        step = draw.randrange(1, steps)
        if place == "save":  # not the last one: after it the run may be complete
            step = draw.randrange(interval, steps, interval)
        point, delay = draw.randrange(points[victim or 0]), draw.uniform(0, _STEP_SECONDS)
        moments.append(Moment(step, place, victim, point, delay))
    return sorted(moments, key=lambda moment: (moment.step, moment.place == "save"))


def train(
    config, trace: Path, moment: Moment | None = None, *, size: int = 2, stage: int = 1
) -> list[int]:
    """Run until the end or the moment; `trace` becomes a folder with a file of each rank.

    Returns for each rank the number of storage operations of the save that had most.

    Raises:
        AssertionError: a rank has died or failed.
    """
    trace.mkdir()
    return run_ranks(
        _entry, size, config, f"configs/ds/zero{stage}.json", trace, moment, init=False
    )


class Run(NamedTuple):
    """A run that nothing has disturbed, and how many storage operations each of its saves has."""

    config: object
    trace: Path
    points: list[int]


def small_run(directory: Path, *, steps: int, interval: int, **changes):
    """The configuration of a run of two data ranks in `directory`, with the corpus beside it."""
    values = {
        "run_dir": str(directory),
        "model__num_layers": 2,
        "training__max_steps": steps,
        "training__batch_size": 2,
        "checkpoint__interval": interval,
        "evaluation__interval": steps,
    }
    return tiny_run(directory.parent, **values | changes)


def undisturbed(directory: Path, *, steps: int, interval: int, **changes) -> Run:
    config = small_run(directory / "undisturbed", steps=steps, interval=interval, **changes)
    return Run(config, directory / "trace", train(config, directory / "trace"))


def read_trace(trace: Path, rank: int) -> list[TrainedStep]:
    lines = (trace / f"rank_{rank}").read_text().splitlines()
    return [
        TrainedStep(step, tuple(samples), *rest) for step, samples, *rest in map(json.loads, lines)
    ]


def _entry(config, ds_config: str, trace: Path, moment: Moment | None) -> int:
    rank = int(os.environ["RANK"])
    (trace / f"pid_{rank}").write_text(str(os.getpid()))
    killer = _Killer(trace, moment if moment is not None and moment.by == rank else None)
    points = _observe_storage(killer)
    _observe_steps(killer, trace / f"rank_{rank}")
    assert run_training(config, ds_config) == EXIT_COMPLETED
    return max(points.values(), default=0)


class _Killer:
    """Knows how far this rank is, and ends it and perhaps the others when the moment has come."""

    def __init__(self, trace: Path, moment: Moment | None) -> None:
        self._trace, self._moment = trace, moment
        self.step = self._num_points = 0

    def reached(self, place: str) -> None:
        moment = self._moment
        # Later, when the one before has hit a save that was already published.
        if moment is None or place != moment.place or self.step < moment.step:
            return
        if place == "train":
            timer = threading.Timer(moment.delay, self._kill)
            timer.daemon = True
            timer.start()
        elif place != "save" or self._num_points == moment.point:
            self._kill()
        self._num_points += place == "save"

    def _kill(self) -> NoReturn:
        assert self._moment is not None
        if self._moment.victim is None:
            for path in self._trace.glob("pid_*"):
                if (pid := int(path.read_text())) != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("the signal cannot be caught")


def _observe_storage(killer: _Killer) -> Counter[int]:
    """Tell the killer of every storage operation after the first step; counts them by step."""
    points = Counter[int]()

    def hook(operation: str, path: Path) -> None:
        if killer.step:
            points[killer.step] += 1
            killer.reached("save")

    pretrain.checkpointing.store.fault_hook = lambda environment, rank: hook  # type: ignore[assignment]
    return points


def _observe_steps(killer: _Killer, path: Path) -> None:
    # Unbuffered: what was written is known to the kernel when the process dies.
    file = path.open("ab", buffering=0)
    for engine in (pretrain.engine.engine.PlainEngine, pretrain.engine.engine.StageEngine):
        engine.train_step = _observed(engine.train_step, killer, file)  # type: ignore[method-assign]


def _observed(original, killer: _Killer, file: RawIOBase):
    def train_step(self, batches: Iterator[Batch], *, learning_rate: float):
        killer.step = self._deepspeed.global_steps + 1
        killer.reached("train")
        samples: list[str] = []
        result = original(
            self, _noted(batches, samples, killer.reached), learning_rate=learning_rate
        )
        values = (float(result.loss).hex(), float(result.grad_norm).hex())
        file.write(json.dumps([killer.step, samples, *values]).encode() + b"\n")
        killer.reached("between")
        return result

    return train_step


def _noted(
    batches: Iterator[Batch], samples: list[str], reached: Callable[[str], None]
) -> Iterator[Batch]:
    for batch in batches:
        for row in zip(batch.tokens, batch.labels, strict=True):
            content = b"".join(each.numpy().tobytes() for each in row)
            samples.append(hashlib.sha256(content).hexdigest()[:16])
        reached("load")
        yield batch
