"""From a DataConfig to the iterators of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data_tools.config import DataConfig
from data_tools.corpus.overlap import overlap_remarks
from data_tools.corpus.token_stream import NamedStream
from data_tools.errors import DataError, NoSuchFileError
from data_tools.loading.evaluation import EvalBatches
from data_tools.loading.loader import TrainLoader
from data_tools.loading.sources import open_sources
from data_tools.sampling.curriculum import Curriculum, Stage
from data_tools.sampling.fim import FillInTheMiddle
from data_tools.sampling.fim_tokens import find_sentinels
from data_tools.sampling.token_dataset import TokenDataset
from data_tools.tokenization.byte_vocabulary import BYTE_VOCAB_SIZE


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
    """The endless training micro-batches of one data-parallel rank.

    The order of samples depends on the seed, the names, weights and contents of the sources and
    the sequence length; not on the batch size, `data_size`, the workers or restarts. `curriculum`
    is the run's, which stages and `max_epochs` need; it says how many samples a step takes, and
    without one `micro_batches_per_step` does. `sources`: from `open_training_sources`, which is
    called without them. `state` is what `state_dict` gave; without one the
    run's first `consumed_samples` samples are skipped.

    Raises:
        DataError: a source is missing, damaged, too short or of another vocabulary or tokenizer,
            the run would read one more often than its `max_epochs`, or `state` belongs to other
            data.
    """
    sequences_per_step = micro_batch_size * micro_batches_per_step * data_size
    loader = TrainLoader(
        _datasets(
            config,
            open_training_sources(config, vocab_size=vocab_size) if sources is None else sources,
            sequence_length=sequence_length,
            seed=seed,
            vocab_size=vocab_size,
        ),
        curriculum or _endless(config, sequence_length, sequences_per_step),
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        seed=seed,
        vocab_size=vocab_size,
        num_workers=config.num_workers,
    )
    _move_to_position(loader, state, consumed_samples)
    check_epochs(config, curriculum, loader)
    return loader


def open_training_sources(config: DataConfig, *, vocab_size: int) -> list[NamedStream]:
    """The streams of `config.train`, under the names of their sources.

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


def _datasets(
    config: DataConfig,
    sources: Sequence[NamedStream],
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
) -> list[TokenDataset]:
    return [
        TokenDataset(
            stream,
            name=name,
            sequence_length=sequence_length,
            seed=seed,
            reset_at_documents=config.reset_at_documents,
            fim=_fim(config, vocab_size=vocab_size, key=f"{seed} {name}"),
        )
        for name, stream in sources
    ]


def _fim(config: DataConfig, *, vocab_size: int, key: str) -> FillInTheMiddle | None:
    if config.fim is None:
        return None
    sentinels = find_sentinels(
        config.fim,
        tokenizer=config.tokenizer,
        first_id=BYTE_VOCAB_SIZE if config.kind == "bytes" else 0,
        vocab_size=vocab_size,
    )
    return FillInTheMiddle(
        sentinels,
        rate=config.fim.rate,
        spm_rate=config.fim.spm_rate,
        level=config.fim.level,
        key=key,
    )


def _endless(config: DataConfig, sequence_length: int, sequences_per_step: int) -> Curriculum:
    if config.stages:
        raise DataError("data.stages need the length of the run; give its curriculum")
    weights = {source.name: source.weight for source in config.train}
    stage = Stage(0, weights, sequence_length, {}, sequences_per_step)
    return Curriculum([stage], total_steps=0)


def check_epochs(config: DataConfig, curriculum: Curriculum | None, loader: TrainLoader) -> None:
    """Check how often the run will have read each source at its end.

    Raises:
        DataError: one more often than its `max_epochs`.
    """
    limits = {s.name: s.max_epochs for s in config.train if s.max_epochs is not None}
    if not limits:
        return
    if curriculum is None:
        raise DataError("max_epochs needs the length of the run; give its curriculum")
    epochs = epochs_of(curriculum, loader)
    for name, limit in limits.items():
        if epochs.get(name, 0.0) > limit:
            raise DataError(
                f"data source {name}: the run would read it {epochs[name]:.3g} times, more than "
                f"max_epochs {limit:g}; lower its weight, shorten the run or raise max_epochs"
            )


def epochs_of(curriculum: Curriculum, loader: TrainLoader) -> dict[str, float]:
    """How often the run will have read each source at its end."""
    return loader.epochs_at(curriculum.position_after(curriculum.total_steps).samples)


def data_remarks(
    config: DataConfig, curriculum: Curriculum, loader: TrainLoader, held_out: EvalBatches | None
) -> list[str]:
    """What there is to say of the data of a run, a line each: text that is read again and again,
    and held-out text that is trained on."""
    often = [
        f"data source {name}: the run reads it {epochs:.3g} times, more than data.warn_epochs="
        f"{config.warn_epochs:g}; add text, lower its weight, or raise data.warn_epochs"
        for name, epochs in epochs_of(curriculum, loader).items()
        if epochs > config.warn_epochs
    ]
    return often + ([] if held_out is None else overlap_remarks(loader.sources, held_out.sources))


def _move_to_position(
    loader: TrainLoader, state: Mapping[str, Any] | None, consumed_samples: int
) -> None:
    if state is None:
        loader.skip_to(consumed_samples)
        return
    loader.load_state_dict(state)
    if consumed_samples not in (0, loader.consumed_samples):
        raise DataError(
            f"consumed_samples is {consumed_samples}, but the checkpoint's data position is "
            f"{loader.consumed_samples}; give one of them"
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
    """The held-out micro-batches of one data-parallel rank, read in order, each token scored once.

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
                f"data source {name}: {stream.num_tokens} tokens, at least 2 needed to score one"
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
