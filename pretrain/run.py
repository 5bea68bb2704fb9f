"""A run from its configuration to its exit code: what is around the train loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data_tools.corpus.corpus_info import TextRules
from data_tools.loading.builders import build_eval_batches, build_train_loader, data_remarks
from data_tools.loading.evaluation import EvalBatches
from data_tools.loading.loader import TrainLoader
from data_tools.loading.sources import corpus_tokenizer, read_text_rules
from parallel.checkpoint.manifest import TextRecord
from parallel.checkpoint.storage import Storage
from parallel.context import ParallelContext
from pretrain.checkpointing import (
    CheckpointStore,
    Layout,
    RunIdentity,
)
from pretrain.checkpointing.async_save import Saves
from pretrain.checkpointing.resumption import changes_told, go_on_from
from pretrain.checkpointing.rng_state import seed_rng
from pretrain.config import RunConfig, resolved, to_yaml
from pretrain.config.deepspeed import ResolvedDeepSpeed, layout_bound_by, resolve_ds_config
from pretrain.config.layout import RunLayout, check_layout
from pretrain.distributed.process_groups import limit_groups
from pretrain.distributed.rendezvous import World
from pretrain.engine.engine import build_engine
from pretrain.engine.initial_weights import initial_weights
from pretrain.engine.parameter_groups import describe_groups
from pretrain.engine.train_spec import RunPlan, build_precision, check_model
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from pretrain.run_status import clear_markers, leave_marker
from pretrain.start import agreement, start

logger = logging.getLogger(__name__)


def run(config: RunConfig, ds_config_path: str | None = None) -> int:
    """Train as `config` says, from the newest checkpoint if there is one; returns an exit code.

    Raises:
        AgreedError: the data, the model or a checkpoint cannot be used; one line says why.
        ConfigError: a setting cannot be used; nothing has been started yet.
        TrainingError: training cannot go on, see `stability` in the configuration.
    """
    layout = check_layout(config, World.from_environment().size)
    zero = resolve_ds_config(ds_config_path, config, data_size=layout.data)
    precision = build_precision(config)
    with ExitStack() as stack:
        stop, watchdog, ctx, ranks = start(config, layout, precision, stack)
        plan = RunPlan.of(config, zero, ctx)
        whole = ranks.together(lambda: check_model(plan))
        watchdog.moved("the opening of the data")
        loader = stack.enter_context(ranks.together(lambda: _train_loader(config, layout, ctx)))
        evaluation = ranks.together(lambda: _eval_batches(config, ctx))
        text = ranks.together(lambda: read_text_rules(config.data))
        watchdog.moved("the search for a checkpoint")
        store = CheckpointStore(
            Path(config.run_dir),
            identity=_identity(config, layout, zero, text, loader, evaluation),
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            # What agrees in the background must not meet what the main thread agrees on.
            ranks=agreement(config.watchdog.timeout) if config.checkpoint.asynchronous else ranks,
        )
        stack.callback(store.close)
        checkpoint = store.find(config.resume)
        ranks.on_first(lambda: clear_markers(Path(config.run_dir)))
        if checkpoint is not None:
            layout = ranks.together(lambda: go_on_from(checkpoint, config, layout, loader))
            ranks.on_first(lambda: _say(changes_told(checkpoint, config, layout)))
            if layout.total_steps == checkpoint.step:
                ranks.on_first(lambda: _end_complete(config, checkpoint.step))
                return EXIT_COMPLETED
        ranks.on_first(
            lambda: _warn(data_remarks(config.data, layout.curriculum, loader, evaluation))
        )
        watchdog.moved("the building of the model")
        weights = initial_weights(config, ctx, ranks) if checkpoint is None else None
        engine = build_engine(plan, load_layer=None if weights is None else weights.load)
        limit_groups(config.watchdog.timeout)
        saves = stack.enter_context(
            Saves(store, asynchronous=config.checkpoint.asynchronous, moved=watchdog.moved)
        )
        loop = TrainLoop(config, layout, engine, loader, evaluation, saves, ranks, watchdog)
        if checkpoint is not None:
            loop.restore(checkpoint)
        else:
            seed_rng(seed=config.training.seed, step=0, rank=ranks.rank)
        # Only now: a start that fails leaves nothing that speaks of its settings.
        ranks.on_first(lambda: _write_config(config))
        stop.started()
        if ctx.is_main:
            print(describe_groups(whole, config.training), flush=True)
        code = loop.run(stop)
        # Every rank has saved: a launcher that reads the marker may end all of them.
        ranks.on_first(lambda: leave_marker(Path(config.run_dir), code))
        return code


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        logger.warning("%s", line)


def _end_complete(config: RunConfig, step: int) -> None:
    _say([f"{config.run_dir} is complete at step {step}: there is nothing left to train"])
    leave_marker(Path(config.run_dir), EXIT_COMPLETED)


def _write_config(config: RunConfig) -> None:
    path = Path(config.run_dir, "config.yaml")
    Storage().replace_file(path, to_yaml(config).encode("ascii"))


def _train_loader(config: RunConfig, layout: RunLayout, ctx: ParallelContext) -> TrainLoader:
    return build_train_loader(
        config.data,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.training.batch_size,
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


def _identity(
    config: RunConfig,
    layout: RunLayout,
    zero: ResolvedDeepSpeed,
    text: TextRules,
    loader: TrainLoader,
    evaluation: EvalBatches | None,
) -> RunIdentity:
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
        fingerprints=_fingerprints(config, loader, evaluation),
        layout_bound_by=layout_bound_by(config, zero),
        text=TextRecord(**text._asdict()),
    )


def _fingerprints(
    config: RunConfig, loader: TrainLoader, evaluation: EvalBatches | None
) -> dict[str, str]:
    """Of every file that the configuration names: setting -> fingerprint, where one is known."""
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
