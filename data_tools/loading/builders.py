"""Builders of the training and evaluation iterators of a run from its DataConfig."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data_tools.config import DataConfig
from data_tools.corpus.overlap import overlap_warnings
from data_tools.corpus.token_stream import NamedStream
from data_tools.errors import DataError, NoSuchFileError
from data_tools.loading.evaluation import EvalBatches
from data_tools.loading.loader import TrainLoader
from data_tools.loading.sources import open_sources
from data_tools.sampling.curriculum import Curriculum, Stage
from data_tools.sampling.datasets import build_datasets


def build_train_loader(
    config: DataConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    seed: int,
    vocab_size: int,
    micro_batches_per_step: int = 1,
    curriculum: Curriculum | None = None,
    sources: Sequence[NamedStream] | None = None,
    consumed_samples: int = 0,
    state: Mapping[str, Any] | None = None,
) -> TrainLoader:
    """Build the endless iterator over the training micro-batches of one data-parallel rank.

    The sample order depends on the seed, the names, weights and contents of the sources and the
    sequence length; not on the batch size, `data_size`, the workers or restarts.

    Args:
        micro_batches_per_step: Micro-batches per rank and step, used without a `curriculum`.
        curriculum: Curriculum of the run, which sets the samples per step; required for stages and
            `max_epochs`.
        sources: Result of `open_training_sources`; None: open them here.
        consumed_samples: Samples of the run to skip, used without a `state`.
        state: Result of `TrainLoader.state_dict` to resume from.

    Raises:
        DataError: a source is missing, damaged, too short or of another vocabulary or tokenizer,
            the run would exceed the `max_epochs` of one, or `state` belongs to other data.
    """
    sequences_per_step = micro_batch_size * micro_batches_per_step * data_size
    loader = TrainLoader(
        build_datasets(
            config,
            open_training_sources(config, vocab_size=vocab_size) if sources is None else sources,
            sequence_length=sequence_length,
            seed=seed,
            vocab_size=vocab_size,
        ),
        curriculum or _one_stage_curriculum(config, sequence_length, sequences_per_step),
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        seed=seed,
        vocab_size=vocab_size,
        num_workers=config.num_workers,
    )
    _restore_position(loader, state, consumed_samples)
    check_epochs(config, curriculum, loader)
    return loader


def open_training_sources(config: DataConfig, *, vocab_size: int) -> list[NamedStream]:
    """Open the streams of `config.train` under the names of their sources.

    Raises:
        DataError: a source is missing, damaged or of another vocabulary or tokenizer.
    """
    return _open(config, "train", vocab_size=vocab_size)


def _open(
    config: DataConfig, split: Literal["train", "validation"], *, vocab_size: int
) -> list[NamedStream]:
    try:
        return open_sources(config, getattr(config, split), vocab_size=vocab_size)
    except NoSuchFileError as error:
        raise DataError(f"data.{split}: {error}") from error


def _one_stage_curriculum(
    config: DataConfig, sequence_length: int, sequences_per_step: int
) -> Curriculum:
    if config.stages:
        raise DataError("data.stages need the length of the run; pass its curriculum")
    weights = {source.name: source.weight for source in config.train}
    stage = Stage(0, weights, sequence_length, {}, sequences_per_step)
    return Curriculum([stage], total_steps=0)


def check_epochs(config: DataConfig, curriculum: Curriculum | None, loader: TrainLoader) -> None:
    """Check the number of passes that the run makes over each source.

    Raises:
        DataError: it exceeds the `max_epochs` of a source.
    """
    limits = {s.name: s.max_epochs for s in config.train if s.max_epochs is not None}
    if not limits:
        return
    if curriculum is None:
        raise DataError("max_epochs needs the length of the run; pass its curriculum")
    epochs = epochs_per_source(curriculum, loader)
    for name, limit in limits.items():
        if epochs.get(name, 0.0) > limit:
            raise DataError(
                f"data source {name}: the run would read it {epochs[name]:.3g} times, more than "
                f"max_epochs {limit:g}; lower its weight, shorten the run or raise max_epochs"
            )


def epochs_per_source(curriculum: Curriculum, loader: TrainLoader) -> dict[str, float]:
    """Return the number of passes over each source at the end of the run."""
    return loader.epochs_at(curriculum.position_after(curriculum.total_steps).samples)


def data_warnings(
    config: DataConfig, curriculum: Curriculum, loader: TrainLoader, held_out: EvalBatches | None
) -> list[str]:
    """Return warnings about repeated training text and held-out text that is trained on."""
    repeated = [
        f"data source {name}: the run reads it {epochs:.3g} times, more than data.warn_epochs="
        f"{config.warn_epochs:g}; add text, lower its weight, or raise data.warn_epochs"
        for name, epochs in epochs_per_source(curriculum, loader).items()
        if epochs > config.warn_epochs
    ]
    return repeated + (
        [] if held_out is None else overlap_warnings(loader.sources, held_out.sources)
    )


def _restore_position(
    loader: TrainLoader, state: Mapping[str, Any] | None, consumed_samples: int
) -> None:
    if state is None:
        loader.skip_to(consumed_samples)
        return
    loader.load_state_dict(state)
    if consumed_samples not in (0, loader.consumed_samples):
        raise DataError(
            f"consumed_samples is {consumed_samples}, but the checkpoint's data position is "
            f"{loader.consumed_samples}; pass one of the two"
        )


def build_eval_batches(
    config: DataConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    vocab_size: int,
    max_windows: int | None = None,
) -> EvalBatches:
    """Build the held-out micro-batches of one data-parallel rank, in order, each token scored once.

    Raises:
        DataError: `data.validation` is empty, `max_windows` is below 1, or a source is
            missing, damaged, too short or of another vocabulary or tokenizer.
    """
    if not config.validation:
        raise DataError("data.validation is empty; name held-out text, or turn evaluation off")
    if max_windows is not None and max_windows < 1:
        raise DataError(f"max_windows is {max_windows}, but at least 1 is needed; raise it")
    streams = _open(config, "validation", vocab_size=vocab_size)
    for name, stream in streams:
        if stream.num_tokens < 2:
            raise DataError(
                f"data source {name}: {stream.num_tokens} tokens, at least 2 needed to score one; "
                "add text or remove the source"
            )
    return EvalBatches(
        streams,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        vocab_size=vocab_size,
        reset_at_documents=config.reset_at_documents,
        max_windows=max_windows,
    )
