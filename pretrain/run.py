"""A run from its resolved settings to its exit code: set-up around the train loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from data_tools.corpus.corpus_info import TextRules
from data_tools.loading.builders import data_warnings
from data_tools.loading.evaluation import EvalBatches
from data_tools.loading.loader import TrainLoader
from data_tools.loading.sources import corpus_tokenizer, read_text_rules
from parallel.checkpoint.manifest import TextRecord
from parallel.checkpoint.storage import Storage
from parallel.context import ParallelContext
from parallel.precision import Precision
from pretrain.checkpointing import CheckpointStore, Layout, RunIdentity
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.checkpointing.resumption import describe_changes
from pretrain.checkpointing.rng_state import seed_rng
from pretrain.checkpointing.selection import Checkpoint
from pretrain.checkpointing.train_state import TrainState
from pretrain.config import RunConfig, resolved, to_yaml
from pretrain.config.deepspeed import DeepSpeedSettings, layout_bound_by
from pretrain.config.layout import RunLayout
from pretrain.config.resolve import ResolvedRun
from pretrain.distributed.consensus import RankGroup
from pretrain.distributed.process_groups import (
    build_rank_group,
    limit_groups,
    prepare,
    process_group,
)
from pretrain.distributed.rendezvous import World, rendezvous
from pretrain.engine.build import build_engine
from pretrain.engine.engine import Engine
from pretrain.engine.initial_weights import initial_weights
from pretrain.engine.parameter_groups import describe_groups
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision, check_model
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from pretrain.metrics.profile import check_profile
from pretrain.run_data import open_held_out_data, open_training_data
from pretrain.run_status import clear_markers, write_marker
from pretrain.supervision.signals import GracefulStop
from pretrain.supervision.watchdog import Watchdog
from pretrain.task_evaluation import open_tasks

logger = logging.getLogger(__name__)


class _RunContext(NamedTuple):
    """State of a rank after the rendezvous."""

    stop: GracefulStop
    watchdog: Watchdog
    ctx: ParallelContext
    ranks: RankGroup


class _Data(NamedTuple):
    """The opened data of a run."""

    loader: TrainLoader
    evaluation: EvalBatches | None
    text: TextRules


def run(settings: ResolvedRun, *, last_step: int | None = None) -> int:
    """Train from the newest checkpoint, or from the beginning; returns an exit code.

    After `last_step` the run stops as if a signal had asked for it.

    Raises:
        AgreedError: the data, the model or a checkpoint cannot be used; one line says why.
        ConfigError: a setting cannot be used; nothing has been started.
        TrainingError: training cannot continue, see `stability` in the configuration.
    """
    config, layout, ds_config = settings
    precision = build_precision(config)
    check_profile(config.logging)
    with ExitStack() as stack:
        stop, watchdog, ctx, ranks = init_run(config, layout, precision, stack)
        spec = TrainSpec.of(config, ds_config, ctx)
        groups = ranks.check_on_rank0(lambda: _check_model(spec))
        watchdog.progress("opening the data")
        data = _open_data(config, ctx, ranks, stack)
        state = TrainState(config, data.loader, data_size=layout.data)
        watchdog.progress("searching for a checkpoint")
        store = _open_store(config, _identity(config, layout, ds_config, data), ranks, stack)
        checkpoint = store.find(config.resume, progress=watchdog.advance)
        ranks.run_on_rank0(lambda: clear_markers(Path(config.run_dir)))
        if checkpoint is not None:
            _plan_resume(checkpoint, config, layout, state, ranks)
            if state.step == state.total_steps:
                ranks.run_on_rank0(lambda: _report_complete(config, state.step))
                return EXIT_COMPLETED
        ranks.run_on_rank0(lambda: _warn_about_data(config, data))
        watchdog.progress("loading the tasks of the evaluation")
        tasks = open_tasks(config, data.text, ranks, watchdog.advance)
        watchdog.progress("building the model")
        engine = _build_engine(spec, ranks, watchdog, is_fresh=checkpoint is None)
        checkpointer = stack.enter_context(
            Checkpointer(
                store,
                asynchronous=config.checkpoint.asynchronous,
                progress=watchdog.progress,
                advance=watchdog.advance,
            )
        )
        loop = TrainLoop(
            config, layout, engine, state, data.evaluation, checkpointer, ranks, watchdog, tasks
        )
        if checkpoint is not None:
            loop.restore(checkpoint)
        else:
            seed_rng(seed=config.training.seed, step=0, rank=ranks.rank)
        watchdog.progress("writing config.yaml")
        # Only now: a failed start must not leave its settings behind.
        ranks.run_on_rank0(lambda: _write_config(config, groups or ""))
        stop.started()
        stop.last_step = last_step
        code = loop.run(stop)
        # Every rank has saved: a launcher that sees the marker may end them.
        ranks.run_on_rank0(lambda: write_marker(Path(config.run_dir), code))
        return code


def init_run(
    config: RunConfig, layout: RunLayout, precision: Precision, stack: ExitStack
) -> _RunContext:
    """Set up ranks and process groups, under a watchdog from the rendezvous on.

    `stack` tears everything down.
    """
    stop = stack.enter_context(GracefulStop(starting=True))
    world, limit = World.from_environment(), config.watchdog.timeout
    prepare()
    store = rendezvous(world, purpose=config.run_dir, timeout=limit)
    watchdog = Watchdog(
        Path(config.run_dir),
        rank=world.rank,
        size=world.size,
        store=store,
        timeout=limit,
        slow_ratio=config.watchdog.slow_ratio,
    )
    stack.enter_context(watchdog)
    watchdog.progress("creating process groups")
    group = process_group(tensor_size=layout.tensor, store=store, timeout=limit)
    stack.push(watchdog.on_exit)  # for an error while groups are created
    device = stack.enter_context(group)
    stack.push(watchdog.on_exit)  # for any later one, before the group is destroyed
    ranks = build_rank_group(limit)
    ctx = build_context(config, precision=precision, device=device)
    axes = {"tensor": ctx.tensor, "pipeline": ctx.pipeline, "data": ctx.data}
    watchdog.set_layout(
        ", ".join(f"{name} {axis.rank}" for name, axis in axes.items() if axis.size > 1),
        stage=ctx.pipeline.rank,
    )
    return _RunContext(stop, watchdog, ctx, ranks)


def _open_data(
    config: RunConfig, ctx: ParallelContext, ranks: RankGroup, stack: ExitStack
) -> _Data:
    loader = ranks.run_on_all_ranks(lambda: open_training_data(config, ctx.data))
    stack.enter_context(loader)
    evaluation = ranks.run_on_all_ranks(lambda: open_held_out_data(config, ctx.data))
    return _Data(loader, evaluation, ranks.run_on_all_ranks(lambda: read_text_rules(config.data)))


def _open_store(
    config: RunConfig, identity: RunIdentity, ranks: RankGroup, stack: ExitStack
) -> CheckpointStore:
    if config.checkpoint.asynchronous:
        # Collectives of a save in the background must not interleave with the main thread's.
        ranks = build_rank_group(config.watchdog.timeout)
    store = CheckpointStore(
        Path(config.run_dir),
        identity=identity,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        skip_before=None if config.stability.spike is None else config.stability.spike.skip_before,
        ranks=ranks,
    )
    stack.callback(store.close)
    return store


def _build_engine(
    spec: TrainSpec, ranks: RankGroup, watchdog: Watchdog, *, is_fresh: bool
) -> Engine:
    """Build the engine; in a fresh run it takes the weights of training.init_from."""
    weights = initial_weights(spec.config, spec.ctx, ranks) if is_fresh else None
    load = None if weights is None else weights.load
    engine = build_engine(spec, load_layer=load, progress=watchdog.advance)
    limit_groups(spec.config.watchdog.timeout)
    return engine


def _plan_resume(
    checkpoint: Checkpoint,
    config: RunConfig,
    layout: RunLayout,
    state: TrainState,
    ranks: RankGroup,
) -> None:
    """Plan the remaining steps, and print the changes since the checkpoint.

    The loop restores this state again with everything else. Doing it here refuses a checkpoint
    that does not fit the data or the settings before the model is built.
    """
    ranks.run_on_all_ranks(lambda: state.load_state_dict(checkpoint.trainer))
    ranks.run_on_rank0(
        lambda: _print_lines(describe_changes(checkpoint, config, layout, state.curriculum))
    )


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _report_complete(config: RunConfig, step: int) -> None:
    _print_lines([f"{config.run_dir} is complete at step {step}: there is nothing left to train"])
    write_marker(Path(config.run_dir), EXIT_COMPLETED)


def _warn_about_data(config: RunConfig, data: _Data) -> None:
    curriculum = data.loader.curriculum
    for line in data_warnings(config.data, curriculum, data.loader, data.evaluation):
        logger.warning("%s", line)


def _check_model(spec: TrainSpec) -> str:
    """Check the model on the meta device; describes how each group of parameters is trained."""
    return describe_groups(check_model(spec), spec.config.training)


def _write_config(config: RunConfig, groups: str) -> None:
    """Write config.yaml, and print `groups`."""
    path = Path(config.run_dir, "config.yaml")
    Storage().replace_file(path, to_yaml(config).encode("ascii"))
    _print_lines([groups])


def _identity(
    config: RunConfig,
    layout: RunLayout,
    ds_config: DeepSpeedSettings,
    data: _Data,
) -> RunIdentity:
    return RunIdentity(
        layout=Layout(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            data=layout.data,
            expert=layout.expert,
            zero_stage=ds_config.zero_stage,
            precision=config.training.precision,
        ),
        config=resolved(config),
        fingerprints=_fingerprints(config, data.loader, data.evaluation),
        layout_bound_by=layout_bound_by(config, ds_config),
        text=TextRecord(**data.text._asdict()),
    )


def _fingerprints(
    config: RunConfig, loader: TrainLoader, evaluation: EvalBatches | None
) -> dict[str, str]:
    """Map each setting that names a file to its fingerprint, if one is known."""
    splits = {"train": loader.fingerprints}
    if evaluation is not None:
        splits["validation"] = evaluation.fingerprints
    found = {
        f"data.{split}.{name}.path": fingerprint
        for split, fingerprints in splits.items()
        for name, fingerprint in fingerprints.items()
    }
    tokenizer = corpus_tokenizer(config.data)
    return found if tokenizer is None else {**found, "data.tokenizer": tokenizer}
