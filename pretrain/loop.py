"""The train loop: a step, and after it what is due."""

from __future__ import annotations

import gc
import logging
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from data_tools.loading.evaluation import EvalBatches
from data_tools.loading.loader import TrainLoader
from models.registry import get_family
from parallel.checkpoint.weights import ShardPosition
from parallel.cpu.waiting import Waiting
from pretrain.checkpointing import (
    Checkpoint,
    CheckpointContents,
)
from pretrain.checkpointing.async_save import Saves
from pretrain.checkpointing.optimizer_state import (
    finish_restore,
    optimizer_shard,
    restore_optimizer_state,
)
from pretrain.checkpointing.resumption import go_on_from, last_rate
from pretrain.checkpointing.rng_state import restore_rng_state, rng_states, seed_rng
from pretrain.config import RunConfig, resolved
from pretrain.config.layout import RunLayout
from pretrain.distributed.consensus import Ranks
from pretrain.distributed.launcher_env import ranks_on_this_machine
from pretrain.engine.deepspeed_files import load_engine_state, save_engine_state
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.lr_schedule import learning_rate
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED, TrainingError
from pretrain.metrics.flops import device_name, peak_flops, training_flops_per_token
from pretrain.metrics.records import Throughput, evaluation_record, training_record
from pretrain.metrics.writers import Writers, build_writers
from pretrain.stability.loss_spikes import SpikeWatch
from pretrain.stability.nonfinite_steps import GuardedSteps, check_finite
from pretrain.stability.replica_check import check_replicas
from pretrain.supervision.signals import GracefulStop
from pretrain.supervision.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Values(NamedTuple):
    """A StepResult as numbers: reading them waits for the device."""

    loss: float
    terms: dict[str, float]
    grad_norm: float


class Spike(NamedTuple):
    """A loss that stands out, and the limit that it is above."""

    step: int
    loss: float
    limit: float


class TrainLoop:
    """Steps, and after them what is due: a log line, an evaluation, a checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        engine: Engine,
        loader: TrainLoader,
        evaluation: EvalBatches | None,
        saves: Saves,
        ranks: Ranks,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.layout = layout
        self.engine = engine
        self.ctx = engine.ctx
        self.loader = loader
        self.evaluation = evaluation
        self.saves = saves
        self.ranks = ranks
        self.watchdog = watchdog
        self.step = 0
        self.rate = 0.0  # the learning rate of that step
        self.steps = GuardedSteps(
            engine,
            loader,
            ranks,
            max_skipped=config.stability.max_skipped_steps,
        )
        spike = config.stability.spike
        self.spikes = None if spike is None else SpikeWatch(spike)
        self.unread: list[tuple[int, torch.Tensor]] = []  # losses that `spikes` has not seen
        self.left_out: list[tuple[int, int]] = []  # steps around spikes, first and last
        self.family = get_family(config.model.family)
        peak = peak_flops(device_name(), config.training.precision)
        self.throughput = Throughput(peak=None if peak is None else peak * ranks.size)
        self.num_parameters = self.family.num_parameters(config.model)
        self.waiting: Waiting | None = None
        if self.ctx.device.type == "cpu":
            self.waiting = Waiting.of_this_process(
                ranks=ranks_on_this_machine(), threads=torch.get_num_threads()
            )

    @property
    def tokens(self) -> int:
        """Tokens seen by all ranks so far."""
        return self.layout.curriculum.tokens_after(self.step)

    @property
    def _round(self) -> int:
        """Samples of a micro-batch on each data rank."""
        return self.config.training.batch_size * self.layout.data

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken: weights, optimizer, random numbers, step."""
        self.watchdog.moved(f"the restoration of step {checkpoint.step}")
        engine, path, rank = self.engine.deepspeed, checkpoint.path, self.ranks.rank
        if checkpoint.any_layout:
            self.ranks.together(lambda: restore_optimizer_state(engine, path, ctx=self.ctx))
            samples = self.layout.curriculum.start.samples
            finish_restore(engine, step=checkpoint.step, samples=samples)
        else:
            load_engine_state(engine, path)
        if checkpoint.layout.grid == self.layout.grid:
            restore_rng_state(checkpoint.rng_path(rank))
        else:
            seed_rng(seed=self.config.training.seed, step=checkpoint.step, rank=rank)
        self.step, self.rate = checkpoint.step, last_rate(checkpoint)
        stability = checkpoint.trainer.get("stability", {})  # not in older checkpoints
        self.steps.num_skipped = stability.get("num_skipped", 0)
        self.steps.in_a_row = stability.get("in_a_row", 0)
        self.left_out = [(first, last) for first, last in stability.get("left_out", [])]
        if (spike := self.config.stability.spike) is not None:
            self.spikes, self.unread = SpikeWatch(spike, stability.get("losses", [])), []

    def run(self, stop: GracefulStop) -> int:
        """Train to the end, or until a signal asks to stop; both end with a checkpoint."""
        while True:
            writers = self._writers()
            self._announce()
            try:
                end = self._steps(writers, stop)
            finally:
                writers.close()
            if not isinstance(end, Spike):
                return end
            self._roll_back(end)

    def _steps(self, writers: Writers, stop: GracefulStop) -> int | Spike:
        total, training = self.layout.total_steps, self.config.training
        first, stopping = self.step + 1, False
        gc.freeze()  # what start-up has built lives as long as the run
        for step in range(first, total + 1):
            self._prepare(first=step == first)
            rate = learning_rate(step, training, total_steps=total)
            self.watchdog.moved(f"step {step}", is_step=True)
            result = self._train(step, rate)
            self.step, self.rate, last = step, rate, step == total
            stopping = stop.should_stop(self.ranks)
            saving = last or stopping or step % self.config.checkpoint.interval == 0
            if saving or step == first or step % training.log_interval == 0:
                spike = self._find_spike()
                if spike is not None:
                    return spike
                if result is not None:
                    self._log(writers, _read(result, step), rate)
            interval = self.config.watchdog.replica_interval
            if interval is not None and (saving or step % interval == 0):
                check_replicas(self.engine.module, self.ctx, self.ranks, step=step)
            with self.throughput.paused():
                if last or step % self.config.evaluation.interval == 0:
                    self._evaluate(writers)
                if saving:
                    self._save()
                if last or stopping:
                    self.saves.wait()
            if stopping and not last:
                self._say(f"stopped at step {step} as asked; start again to continue")
                return EXIT_STOPPED
        return EXIT_COMPLETED

    def _train(self, step: int, rate: float) -> StepResult | None:
        """Take a step; None when its data are left out, or it was not finite."""
        left_out = [*self.config.stability.skip_steps, *self.left_out]
        position_after = self.layout.curriculum.position_after
        samples = range(position_after(step - 1).samples, position_after(step).samples)
        if any(first <= step <= last for first, last in left_out):
            self._warn(f"step {step}: its data are left out")
            self.loader.skip_to(samples.stop)
            return None
        result, message = self.steps.train(step, samples, learning_rate=rate)
        if message is not None:
            self._warn(message)
        if result.applied and self.spikes is not None:
            self.unread.append((step, result.loss))
        return result if result.applied else None

    def _find_spike(self) -> Spike | None:
        """Collective: the first loss since the last call that stands out, as rank 0 sees it."""
        if (spikes := self.spikes) is None or not self.unread:
            return None
        steps, losses = [step for step, _ in self.unread], [loss for _, loss in self.unread]
        self.unread = []

        def look() -> Spike | None:
            values = torch.stack([loss.detach().float().view(()) for loss in losses]).tolist()
            for step, loss in zip(steps, values, strict=True):
                if spikes.stands_out(loss):
                    return Spike(step, loss, spikes.limit)
            return None

        return self.ranks.on_first(look)

    def _roll_back(self, spike: Spike) -> None:
        """Return to the newest checkpoint, and leave out the data around the spike from there on.

        Raises:
            TrainingError: there is none, or the run has returned as often as it may.
        """
        config = self.config.stability.spike
        assert config is not None
        what = (
            f"step {spike.step}: loss {spike.loss:.4g} is above {spike.limit:.4g}, "
            f"{config.sigma:g} standard deviations over the last {config.window} steps"
        )
        left_out, reached = self.left_out, self.step
        if len(left_out) >= config.max_rollbacks:
            raise TrainingError(
                f"{what}: the run has returned to an earlier step {len(left_out)} times already; "
                "lower training.lr, or raise stability.spike.max_rollbacks"
            )
        checkpoint = self.saves.find("auto")
        if checkpoint is None:
            raise TrainingError(
                f"{what}, and there is no checkpoint yet to return to; lower checkpoint.interval "
                "or training.lr"
            )
        self.layout = self.ranks.together(
            lambda: go_on_from(checkpoint, self.config, self.layout, self.loader)
        )
        self.restore(checkpoint)
        begin = max(spike.step - config.skip_before, self.step + 1)
        self.left_out = [*left_out, (begin, reached)]
        self._warn(
            f"{what}: back to step {self.step}; the data of steps {begin} to {reached} are left out"
        )

    def _prepare(self, *, first: bool) -> None:
        """Ready the engine for the stage of the next step, and where one begins measure anew."""
        if self.waiting is not None and (remark := self.waiting.adapt()) is not None:
            self._warn(remark)
        stage = self.layout.curriculum.stage_after(self.step)
        length = stage.sequence_length
        self.engine.set_sequence_length(length)
        self.engine.set_num_micro_batches(stage.sequences_per_step // self._round)
        if first or stage.first_step == self.step:
            flops = training_flops_per_token(self.family, self.config.model, length)
            self.throughput.start(step=self.step, tokens=self.tokens, flops_per_token=flops)

    def _log(self, writers: Writers, values: Values, rate: float) -> None:
        speed = self.throughput.measure(step=self.step, tokens=self.tokens)
        writers.write(
            training_record(
                step=self.step,
                loss=values.loss,
                terms=values.terms,
                grad_norm=values.grad_norm,
                lr=rate,
                tokens=self.tokens,
                skipped_steps=self.steps.num_skipped,
                rate=speed,
                slowest_rank=self.watchdog.slowest_ratio,
            )
        )

    def _evaluate(self, writers: Writers) -> None:
        if self.evaluation is None:
            return
        self.engine.set_sequence_length(self.config.data.sequence_length)
        self.watchdog.moved(f"the evaluation after step {self.step}")
        nats = self.engine.evaluate(self.evaluation, num_batches=len(self.evaluation))
        writers.write(
            evaluation_record(
                step=self.step,
                tokens=self.tokens,
                total_nats=nats,
                num_tokens=self.evaluation.num_tokens,
                num_bytes=self.evaluation.num_bytes,
            )
        )

    def _save(self) -> None:
        check_finite(self.engine.module, self.ranks, step=self.step)
        self.saves.save(self._contents())

    def _contents(self) -> CheckpointContents:
        engine = self.engine.deepspeed
        is_portable = self.saves.identity.layout_bound_by is None
        return CheckpointContents(
            step=self.step,
            weights=self.engine.weights(),
            rng=rng_states(),
            trainer={
                "step": self.step,
                "tokens": self.tokens,
                "learning_rate": self.rate,
                "total_steps": self.layout.total_steps,
                "sequences_per_step": self.engine.num_micro_batches * self._round,
                "data": self.loader.state_dict(),
                "stability": {
                    "num_skipped": self.steps.num_skipped,
                    "in_a_row": self.steps.in_a_row,
                    "left_out": self.left_out,
                    "losses": [] if self.spikes is None else list(self.spikes.losses),
                },
            },
            optimizer=partial(optimizer_shard, engine, ctx=self.ctx) if is_portable else None,
            write_engine=None if is_portable else partial(save_engine_state, engine),
            position=ShardPosition.of(self.ctx),
            writes_weights=self.ctx.data.rank == 0,
        )

    def _writers(self) -> Writers:
        if not self.ctx.is_main:
            return Writers([])
        return build_writers(
            self.config.logging,
            run_dir=Path(self.config.run_dir),
            run_config=resolved(self.config),
            resumed_step=self.step,
            total_steps=self.layout.total_steps,
        )

    def _announce(self) -> None:
        layout, training = self.layout, self.config.training
        device = device_name() or f"CPU, {torch.get_num_threads()} threads a rank"
        start = f"continuing after step {self.step}" if self.step else "from the beginning"
        self._say(
            f"{self.config.model.family}, {self.num_parameters / 1e6:.1f}M parameters, "
            f"{training.precision}, on {self.ranks.size} x {device}\n"
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
            f"{f' (expert {layout.expert})' * (layout.expert > 1)}, "
            f"{layout.total_steps:,} steps, {start}\n"
            f"{layout.curriculum.describe()}\n"
            f"run directory {Path(self.config.run_dir).absolute()}"
        )

    def _say(self, text: str) -> None:
        if self.ctx.is_main:
            print(text, flush=True)

    def _warn(self, text: str) -> None:
        if self.ctx.is_main:
            logger.warning("%s", text)


def _read(result: StepResult, step: int) -> Values:
    """The numbers of a step, read from the device at once.

    Raises:
        TrainingError: the loss or the norm is not finite; what follows would be worthless.
    """
    tensors = [result.loss, *result.terms.values()]
    numbers = torch.stack([x.detach().float().view(()) for x in tensors]).tolist()
    values = Values(
        numbers[0],
        dict(zip(result.terms, numbers[1:], strict=True)),
        float(result.grad_norm),
    )
    if not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
        raise TrainingError(
            f"step {step}: loss {values.loss}, gradient norm {values.grad_norm}; nothing was saved "
            "since the last checkpoint; lower training.lr or look at the data of this step"
        )
    return values
