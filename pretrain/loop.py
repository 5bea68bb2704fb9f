"""The train loop: optimizer steps, and the logging, evaluation and checkpoints between them."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.loading.evaluation import EvalBatches
from data_tools.sampling.curriculum import Stage
from data_tools.sampling.order_record import add_record
from models.registry import get_family
from parallel.checkpoint.weights import ShardPosition
from parallel.cpu.wait_policy import WaitPolicy
from pretrain.checkpointing import Checkpoint, CheckpointContents
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.checkpointing.rng_state import restore_rng_state, rng_states, seed_rng
from pretrain.checkpointing.train_state import Owner, TrainState, load_states, save_states
from pretrain.config import RunConfig, resolved
from pretrain.config.layout import RunLayout
from pretrain.distributed.consensus import RankGroup
from pretrain.distributed.launcher_env import ranks_on_this_machine
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.lr_schedule import learning_rate
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED
from pretrain.metrics.flops import (
    describe_cost,
    device_name,
    peak_flops,
    training_flops_per_token,
)
from pretrain.metrics.profile import StepProfiler
from pretrain.metrics.records import Throughput, evaluation_record, task_record, training_record
from pretrain.metrics.step_values import Values, read_values
from pretrain.metrics.writers import Writers, build_writers
from pretrain.stability.nonfinite_steps import SkipNonFinite, check_finite
from pretrain.stability.replica_check import check_replicas
from pretrain.stability.rollback import Rollback, Spike
from pretrain.supervision.pass_timer import PassTimer, pass_timer
from pretrain.supervision.signals import GracefulStop
from pretrain.supervision.watchdog import Watchdog
from pretrain.task_evaluation import TaskEvaluation

logger = logging.getLogger(__name__)


def stage_settings(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Values of the model settings that stages change: the stage's, or those of the model."""
    names = {name for each in config.data.stages for name in each.model}
    return {name: stage.model.get(name, getattr(config.model, name)) for name in names}


class TrainLoop:
    """Trains, logs, evaluates and saves on schedule."""

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        engine: Engine,
        state: TrainState,
        evaluation: EvalBatches | None,
        checkpointer: Checkpointer,
        ranks: RankGroup,
        watchdog: Watchdog,
        tasks: TaskEvaluation | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.engine = engine
        self.ctx = engine.ctx
        self.state = state
        self.evaluation = evaluation
        self.checkpointer = checkpointer
        self.ranks = ranks
        self.watchdog = watchdog
        self.tasks = tasks
        self.nonfinite = SkipNonFinite(
            engine,
            state.loader,
            ranks,
            max_skipped=config.stability.max_skipped_steps,
        )
        self.rollback = Rollback(config.stability, state, ranks)
        # Owners of the state in trainer.json, by section.
        self.owners: list[Owner] = [
            (None, self.state),
            ("stability", self.nonfinite),
            ("stability", self.rollback),
        ]
        self._last_save = time.monotonic()  # its end, or the start
        self.family = get_family(config.model.family)
        peak = peak_flops(device_name(), config.training.precision)
        self.peak = None if peak is None else peak * ranks.size
        self.throughput = Throughput(peak=self.peak)
        self.num_parameters = self.family.num_parameters(config.model)
        self.profiler: StepProfiler | None = None
        if config.logging.profile_steps:
            self.profiler = StepProfiler(
                config.logging,
                Path(config.run_dir),
                engine,
                rank=ranks.rank,
            )
        # Of the current stage: its sequence length and its last step.
        self._sequence_length, self._stage_end = config.data.sequence_length, 0
        self.pass_timer: PassTimer | None = None
        if watchdog.compares_ranks and engine.counted_passes:
            self.pass_timer = pass_timer(self.ctx.device, engine.counted_passes)
            engine.time_passes(self.pass_timer)
        self.wait_policy: WaitPolicy | None = None
        if self.ctx.device.type == "cpu":
            self.wait_policy = WaitPolicy.of_this_process(
                ranks=ranks_on_this_machine(), threads=torch.get_num_threads()
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint` (collective).

        Restores weights, optimizer, position in the data, random generators and all counts.

        Raises:
            CheckpointError, AgreedError: on every rank; the run cannot continue from it.
        """
        self.watchdog.progress(f"restoring step {checkpoint.step}")
        self.ranks.run_on_all_ranks(lambda: load_states(self.owners, checkpoint.trainer))
        self.rollback.remember(checkpoint.skipped)
        samples = self.state.curriculum.start.samples
        self.engine.restore(
            checkpoint, samples=samples, ranks=self.ranks, progress=self.watchdog.advance
        )
        if checkpoint.layout.grid == self.layout.grid:
            restore_rng_state(checkpoint.rng_path(self.ranks.rank))
        else:
            seed = self.config.training.seed
            seed_rng(seed=seed, step=checkpoint.step, rank=self.ranks.rank)

    def run(self, stop: GracefulStop) -> int:
        """Train to the end or until a stop signal, saving a checkpoint in both cases."""
        seen = self.state.step
        while True:
            writers = self._writers()
            self._record_order(seen)
            self._announce()
            try:
                end = self._steps(writers, stop)
            finally:
                self._end_profile()
                writers.close()
            if not isinstance(end, Spike):
                return end
            seen = self.state.step
            self._warn(self.rollback.roll_back(end, self.checkpointer, self.restore))

    def _steps(self, writers: Writers, stop: GracefulStop) -> int | Spike:
        state, training = self.state, self.config.training
        total, first, stopping = state.total_steps, state.step + 1, False
        skipped = self.rollback.skipped_steps
        losses: dict[int, Tensor] = {}  # by step, since they were last looked at; on the device
        gc.freeze()  # objects of the start-up live as long as the run
        for step in range(first, total + 1):
            self._prepare(first=step == first)
            rate = learning_rate(step, training, total_steps=total)
            self.watchdog.progress(f"step {step}", is_step=True)
            with contextlib.nullcontext() if self.profiler is None else self.profiler.step(step):
                result = self._train(step, rate, skipped)
            state.step, state.learning_rate, last = step, rate, step == total
            if result is not None:
                losses[step] = result.loss
            # On any rank, so that all stop and save after the same step.
            asked = stop.received is not None or step == stop.last_step
            stopping, due = self.ranks.any(asked, self._is_save_due())
            if self.profiler is not None and self.profiler.ends_at(step):
                self.watchdog.progress("writing the profile")
                self._end_profile()
            saving = last or stopping or due or step % self.config.checkpoint.interval == 0
            if saving or step == first or step % training.log_interval == 0:
                spike = self.rollback.find_spike(losses)
                if spike is not None:
                    return spike
                losses.clear()
                if result is not None:
                    self._log(writers, read_values(result, step), rate)
            interval = self.config.watchdog.replica_interval
            if interval is not None and (saving or step % interval == 0):
                check_replicas(self.engine.module, self.ctx, self.ranks, step=step)
            evaluating = last or step % self.config.evaluation.interval == 0
            asking = self.tasks is not None and (last or self.tasks.is_due(step))
            if evaluating or asking or saving:
                with self.throughput.paused():
                    if evaluating:
                        self._evaluate(writers)
                    if asking:
                        self._evaluate_tasks(writers, stop)
                    if saving:
                        self._save()
                    if last or stopping:
                        self.checkpointer.wait()
            if stopping and not last:
                self._print(f"stopped at step {step} as requested; start again to continue")
                return EXIT_STOPPED
        return EXIT_COMPLETED

    def _train(self, step: int, rate: float, skipped: list[tuple[int, int]]) -> StepResult | None:
        """Take a step; None if its data are skipped or it was not finite."""
        loader = self.state.loader
        if any(first <= step <= last for first, last in skipped):
            self._warn(f"step {step}: its data are skipped")
            loader.skip_to(self.state.samples_of(step).stop)
            return None
        timed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if (timer := self.pass_timer) is not None:
            report = self.watchdog.add_device_seconds
            timed = timer.reported_step(self.engine.num_micro_batches, report)
        with timed:
            result = self.engine.train_step(loader, learning_rate=rate)
        if result.applied:
            self.nonfinite.in_a_row = 0
            return result
        samples = self.state.samples_of(step)
        result, message = self.nonfinite.rerun(step, samples, result, learning_rate=rate)
        self._warn(message)
        return result if result.applied else None

    def _prepare(self, *, first: bool) -> None:
        """Begin what the next step begins: a stage, or a range of steps to be profiled."""
        if self.wait_policy is not None and (remark := self.wait_policy.adapt()) is not None:
            self._warn(remark)
        step = self.state.step
        if first or step == self._stage_end:
            self._begin_stage()
        if self.profiler is not None and self.profiler.starts_at(step + 1):
            self.watchdog.progress("starting the profiler")
            with self.throughput.paused():
                self.profiler.start(step + 1)

    def _begin_stage(self) -> None:
        """Set the engine up for the stage of the next step; restart the throughput window."""
        state, curriculum = self.state, self.state.curriculum
        stage = curriculum.stage_after(state.step)
        self._sequence_length = stage.sequence_length
        self._stage_end = curriculum.end_after(state.step)
        per_round = self.config.training.batch_size * self.layout.data
        self.engine.set_sequence_length(stage.sequence_length)
        self.engine.set_num_micro_batches(stage.sequences_per_step // per_round)
        self.engine.change_settings(stage_settings(self.config, stage))
        flops = training_flops_per_token(self.family, self.config.model, stage.sequence_length)
        self.throughput.start(step=state.step, tokens=state.tokens, flops_per_token=flops)

    def _end_profile(self) -> None:
        """Write the profile of the steps so far, if one is being recorded."""
        if self.profiler is None:
            return
        with self.throughput.paused():
            summary = self.profiler.end()
        if summary is not None:
            self._print(summary)

    def _log(self, writers: Writers, values: Values, rate: float) -> None:
        speed = self.throughput.measure(step=self.state.step, tokens=self.state.tokens)
        writers.write(
            training_record(
                step=self.state.step,
                loss=values.loss,
                terms=values.terms,
                grad_norm=values.grad_norm,
                lr=rate,
                tokens=self.state.tokens,
                skipped_steps=self.nonfinite.num_skipped,
                rate=speed,
                slowest_rank=self.watchdog.slowest_ratio,
            )
        )

    def _evaluate(self, writers: Writers) -> None:
        if self.evaluation is None:
            return
        self.engine.set_sequence_length(self.config.data.sequence_length)
        self.watchdog.progress(f"evaluating after step {self.state.step}")
        scores = self.engine.evaluate(
            self.evaluation, num_batches=len(self.evaluation), progress=self.watchdog.advance
        )
        self.engine.set_sequence_length(self._sequence_length)
        writers.write(
            evaluation_record(
                step=self.state.step,
                tokens=self.state.tokens,
                total_nats=scores.nats,
                num_tokens=self.evaluation.num_tokens,
                num_bytes=self.evaluation.num_bytes,
                num_characters=self.evaluation.num_characters if self.ctx.is_main else None,
                group_bits=scores.group_bits,
            )
        )

    def _evaluate_tasks(self, writers: Writers, stop: GracefulStop) -> None:
        assert self.tasks is not None
        step, tokens = self.state.step, self.state.tokens
        self.watchdog.progress(f"evaluating tasks after step {step}")
        results, failure = self.tasks.evaluate(self.engine, step=step, tokens=tokens, stop=stop)
        self.engine.set_sequence_length(self._sequence_length)
        if failure is not None:
            self._warn(f"step {step}: the tasks are not evaluated: {failure}")
        if results is not None:
            writers.write(task_record(step=step, tokens=tokens, results=results))

    def _is_save_due(self) -> bool:
        """Whether this rank, the one that keeps the time, asks for a save."""
        minutes = self.config.checkpoint.interval_minutes
        if minutes is None or not self.ctx.is_main:
            return False
        return time.monotonic() - self._last_save >= 60 * minutes

    def _save(self) -> None:
        check_finite(self.engine.module, self.ranks, step=self.state.step)
        self.checkpointer.save(self._contents())
        # Afterwards: saves longer than the interval would follow each other at every step.
        self._last_save = time.monotonic()

    def _contents(self) -> CheckpointContents:
        engine = self.engine
        is_portable = self.checkpointer.identity.layout_bound_by is None
        return CheckpointContents(
            step=self.state.step,
            weights=engine.weights(),
            rng=rng_states(),
            trainer=save_states(self.owners),
            optimizer=engine.optimizer_shard if is_portable else None,
            write_engine=None if is_portable else engine.write_files,
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
            resumed_step=self.state.step,
            total_steps=self.state.total_steps,
        )

    def _record_order(self, seen: int) -> None:
        """Record the samples of the steps from here on; `seen`: steps taken before a rollback."""

        def record() -> None:
            order = self.state.loader.order_record(
                self.config.data,
                seen_step=seen,
                skipped_steps=self.rollback.skipped_steps,
            )
            add_record(Path(self.config.run_dir), order)

        self.ranks.run_on_rank0(record)

    def _announce(self) -> None:
        layout, training = self.layout, self.config.training
        device = device_name() or f"CPU, {torch.get_num_threads()} threads a rank"
        start = (
            f"continuing after step {self.state.step}" if self.state.step else "from the beginning"
        )
        expert = f" (expert {layout.expert})" if layout.expert > 1 else ""
        self._print(
            f"{self.config.model.family}, {self.num_parameters / 1e6:.1f}M parameters, "
            f"{training.precision}, on {self.ranks.size} x {device}\n"
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}{expert}, "
            f"{self.state.total_steps:,} steps, {start}\n"
            f"{self.state.curriculum.describe(after=self.state.step)}\n"
            f"{self._describe_cost()}\n"
            f"run directory {Path(self.config.run_dir).absolute()}"
        )

    def _describe_cost(self) -> str:
        """Tokens and FLOPs of the steps that are left, and their time where the peak is known."""
        plan, tokens, flops = self.state.curriculum, 0, 0.0
        ends = [*(stage.first_step for stage in plan.stages[1:]), plan.total_steps]
        for stage, end in zip(plan.stages, ends, strict=True):
            begin, length = max(stage.first_step, self.state.step), stage.sequence_length
            of_stage = max(end - begin, 0) * stage.sequences_per_step * length
            tokens += of_stage
            flops += of_stage * training_flops_per_token(self.family, self.config.model, length)
        return describe_cost(
            tokens=tokens, flops=flops, peak=self.peak, num_devices=self.ranks.size
        )

    def _print(self, text: str) -> None:
        if self.ctx.is_main:
            print(text, flush=True)

    def _warn(self, text: str) -> None:
        if self.ctx.is_main:
            logger.warning("%s", text)
