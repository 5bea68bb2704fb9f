"""The data of a run on one data rank, for training and for evaluation."""

from __future__ import annotations

from data_tools.loading.builders import (
    build_eval_batches,
    build_train_loader,
    open_training_sources,
)
from data_tools.loading.evaluation import EvalBatches
from data_tools.loading.loader import TrainLoader
from parallel.context import Axis
from pretrain.config import RunConfig
from pretrain.config.run_length import plan_run


def open_training_data(config: RunConfig, axis: Axis) -> TrainLoader:
    """Open the loader of a rank of the data axis at the start of the run; its `curriculum` plans
    the steps.

    Raises:
        ConfigError, DataError: the data cannot be used, or the steps cannot be planned.
    """
    vocab_size = config.model.vocab_size
    sources = open_training_sources(config.data, vocab_size=vocab_size)
    num_tokens = sum(stream.num_tokens for _, stream in sources)
    return build_train_loader(
        config.data,
        sources=sources,
        curriculum=plan_run(config, data_size=axis.size, num_tokens=num_tokens),
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.training.batch_size,
        data_rank=axis.rank,
        data_size=axis.size,
        seed=config.training.seed,
        vocab_size=vocab_size,
    )


def open_held_out_data(config: RunConfig, axis: Axis) -> EvalBatches | None:
    """Open the held-out windows of a rank of the data axis; None without data.validation.

    Raises:
        DataError: the data cannot be used.
    """
    if not config.data.validation:
        return None
    return build_eval_batches(
        config.data,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.training.batch_size,
        data_rank=axis.rank,
        data_size=axis.size,
        vocab_size=config.model.vocab_size,
        max_windows=config.evaluation.max_windows,
    )
