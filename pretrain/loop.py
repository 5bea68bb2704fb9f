"""A run from its configuration to its last checkpoint: the train loop and what is around it."""

from __future__ import annotations

import gc
import math
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data_tools.build import build_eval_batches, build_train_loader
from data_tools.evaluation import EvalBatches
from data_tools.loader import TrainLoader
from models.registry import get_family
from parallel.context import ParallelContext
from parallel.weights_io import ShardPosition
from pretrain.checkpoint import (
    Checkpoint,
    CheckpointContents,
    CheckpointStore,
    Layout,
    RunIdentity,
)
from pretrain.checkpoint.engine_state import load_engine_state, save_engine_state
from pretrain.checkpoint.optimizer_state import (
    finish_restore,
    layout_bound_by,
    restore_optimizer_state,
    save_optimizer_state,
)
from pretrain.checkpoint.rng_state import restore_rng_state, seed_rng
from pretrain.checkpoint.storage import Storage
from pretrain.config import RunConfig, resolved, to_yaml
from pretrain.config.deepspeed import ResolvedDeepSpeed, resolve_ds_config
from pretrain.config.layout import RunLayout, check_layout
from pretrain.distributed import World, process_group
from pretrain.engine import (
    Engine,
    RunPlan,
    StepResult,
    build_context,
    build_engine,
    build_precision,
    check_model,
)
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED, TrainingError
from pretrain.flops import device_name, peak_flops, training_flops_per_token
from pretrain.initial_weights import initial_weights
from pretrain.markers import clear_markers, leave_marker
from pretrain.metrics import Throughput, evaluation_record, training_record
from pretrain.ranks import Ranks
from pretrain.replicas import check_replicas
from pretrain.schedule import learning_rate
from pretrain.signals import GracefulStop
from pretrain.watchdog import Watchdog
from pretrain.writers import Writers, build_writers


class Values(NamedTuple):
    """A StepResult as numbers: reading them waits for the device."""

    loss: float
    terms: dict[str, float]
    grad_norm: float


def run(config: RunConfig, ds_config_path: str | None = None) -> int:
    """Train as `config` says, from the newest checkpoint if there is one; returns an exit code.

    Raises:
        AgreedError: the data, the model or a checkpoint cannot be used; one line says why.
        ConfigError: a setting cannot be used; nothing has been started yet.
        TrainingError: the loss is no longer finite.
    """
    layout = check_layout(config, World.from_environment().size)
    zero = resolve_ds_config(ds_config_path, config, data_size=layout.data)
    precision = build_precision(config)
    with process_group(tensor_size=layout.tensor) as device, ExitStack() as stack:
        ranks = Ranks.of_group(dist.new_group(backend="gloo"))
        ctx = build_context(config, precision=precision, device=device)
        plan = RunPlan.of(config, zero, ctx)
        ranks.together(lambda: check_model(plan))
        loader = stack.enter_context(ranks.together(lambda: _train_loader(config, layout, ctx)))
        evaluation = ranks.together(lambda: _eval_batches(config, ctx))
        store = CheckpointStore(
            Path(config.run_dir),
            identity=_identity(config, layout, zero),
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            ranks=ranks,
        )
        stack.callback(store.close)
        checkpoint = store.find(config.resume)
        if checkpoint is not None:
            ranks.together(lambda: loader.load_state_dict(checkpoint.trainer.get("data", {})))
        ranks.on_first(lambda: _write_config(config))
        ranks.on_first(lambda: clear_markers(Path(config.run_dir)))
        weights = initial_weights(config, ctx, ranks) if checkpoint is None else None
        engine = build_engine(plan, load_layer=None if weights is None else weights.load)
        watchdog = Watchdog(Path(config.run_dir), ranks=ranks, timeout=config.watchdog.timeout)
        loop = TrainLoop(
            config, layout, engine, loader, evaluation, store, ranks, stack.enter_context(watchdog)
        )
        if checkpoint is not None:
            loop.restore(checkpoint)
        code = loop.run(stack.enter_context(GracefulStop()))
        # Every rank has saved: a launcher that reads the marker may end all of them.
        ranks.on_first(lambda: leave_marker(Path(config.run_dir), code))
        return code


class TrainLoop:
    """Steps, and after them what is due: a log line, an evaluation, a checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        engine: Engine,
        loader: TrainLoader,
        evaluation: EvalBatches | None,
        store: CheckpointStore,
        ranks: Ranks,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.layout = layout
        self.engine = engine
        self.ctx = engine.ctx
        self.loader = loader
        self.evaluation = evaluation
        self.store = store
        self.ranks = ranks
        self.watchdog = watchdog
        self.step = 0
        self.family = get_family(config.model.family)
        peak = peak_flops(device_name(), config.training.precision)
        self.throughput = Throughput(peak=None if peak is None else peak * ranks.size)
        self.num_parameters = self.family.num_parameters(config.model)

    @property
    def tokens(self) -> int:
        """Tokens seen by all ranks so far."""
        return self.layout.curriculum.tokens_after(self.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken: weights, optimizer, random numbers, step."""
        self.watchdog.moved(f"the restoration of step {checkpoint.step}")
        engine, path, rank = self.engine.deepspeed, checkpoint.path, self.ranks.rank
        if checkpoint.any_layout:
            self.ranks.together(lambda: restore_optimizer_state(engine, path, ctx=self.ctx))
            finish_restore(engine, step=checkpoint.step)
        else:
            load_engine_state(engine, path)
        if checkpoint.layout.grid == self.layout.grid:
            restore_rng_state(checkpoint.rng_path(rank))
        else:
            seed_rng(seed=self.config.training.seed, step=checkpoint.step, rank=rank)
        self.step = checkpoint.step

    def run(self, stop: GracefulStop) -> int:
        """Train to the end, or until a signal asks to stop; both end with a checkpoint."""
        writers = self._writers()
        self._announce()
        try:
            return self._steps(writers, stop)
        finally:
            writers.close()

    def _steps(self, writers: Writers, stop: GracefulStop) -> int:
        total, training = self.layout.total_steps, self.config.training
        first, stopping = self.step + 1, False
        gc.freeze()  # what start-up has built lives as long as the run
        for step in range(first, total + 1):
            self._prepare(first=step == first)
            rate = learning_rate(step, training, total_steps=total)
            self.watchdog.moved(f"step {step}")
            result = self.engine.train_step(self.loader, learning_rate=rate)
            self.step, last = step, step == total
            stopping = stop.should_stop(self.ranks)
            saving = last or stopping or step % self.config.checkpoint.interval == 0
            if saving or step == first or step % training.log_interval == 0:
                values = _read(result, step)
                self._log(writers, values, rate)
            interval = self.config.watchdog.replica_interval
            if interval is not None and (saving or step % interval == 0):
                check_replicas(self.engine.module, self.ctx, self.ranks, step=step)
            with self.throughput.paused():
                if last or step % self.config.evaluation.interval == 0:
                    self._evaluate(writers)
                if saving:
                    self._save()
            if stopping and not last:
                self._say(f"stopped at step {step} as asked; start again to continue")
                return EXIT_STOPPED
        return EXIT_COMPLETED

    def _prepare(self, *, first: bool) -> None:
        """Ready the engine for the stage of the next step, and where one begins measure anew."""
        stage = self.layout.curriculum.stage_after(self.step)
        length = stage.sequence_length
        self.engine.set_sequence_length(length)
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
                rate=speed,
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

    def _save_optimizer(self, directory: Path) -> list[Path]:
        engine = self.engine.deepspeed
        if self.store.identity.layout_bound_by is not None:
            return save_engine_state(engine, directory)
        return save_optimizer_state(engine, directory, ctx=self.ctx, rank=self.ranks.rank)

    def _save(self) -> None:
        self.watchdog.moved(f"the save of step {self.step}")
        self.store.save(
            CheckpointContents(
                step=self.step,
                write_engine=self._save_optimizer,
                weights=self.engine.weights(),
                trainer={
                    "step": self.step,
                    "tokens": self.tokens,
                    "data": self.loader.state_dict(),
                },
                position=ShardPosition.of(self.ctx),
                writes_weights=self.ctx.data.rank == 0,
            )
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
            f"run directory {self.config.run_dir}"
        )

    def _say(self, text: str) -> None:
        if self.ctx.is_main:
            print(text, flush=True)


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


def _write_config(config: RunConfig) -> None:
    path = Path(config.run_dir, "config.yaml")
    Storage().replace_file(path, to_yaml(config).encode("ascii"))


def _train_loader(config: RunConfig, layout: RunLayout, ctx: ParallelContext) -> TrainLoader:
    return build_train_loader(
        config.data,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.training.batch_size,
        micro_batches_per_step=config.training.gradient_accumulation_steps,
        data_rank=ctx.data.rank,
        data_size=ctx.data.size,
        seed=config.training.seed,
        vocab_size=config.model.vocab_size,
        curriculum=layout.curriculum,
    )


def _eval_batches(config: RunConfig, ctx: ParallelContext) -> EvalBatches | None:
    if not config.data.validation:
        return None
    return build_eval_batches(
        config.data,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.training.batch_size,
        data_rank=ctx.data.rank,
        data_size=ctx.data.size,
        vocab_size=config.model.vocab_size,
        max_windows=config.evaluation.max_windows,
    )


def _identity(config: RunConfig, layout: RunLayout, zero: ResolvedDeepSpeed) -> RunIdentity:
    return RunIdentity(
        layout=Layout(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            data=layout.data,
            expert=layout.expert,
            zero_stage=zero.zero_stage,
            precision=config.training.precision,
        ),
        config=resolved(config),
        fingerprints={},  # the loader compares those of its sources when its state is loaded
        layout_bound_by=layout_bound_by(config, zero),
    )
