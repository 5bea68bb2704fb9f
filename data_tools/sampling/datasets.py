"""The shuffled datasets of a run, one for each source of its DataConfig."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.config import DataConfig
from data_tools.corpus.token_stream import NamedStream
from data_tools.sampling.fim import FillInTheMiddle
from data_tools.sampling.fim_tokens import find_fim_tokens
from data_tools.sampling.token_dataset import TokenDataset
from data_tools.tokenization.byte_vocabulary import BYTE_VOCAB_SIZE


def build_datasets(
    config: DataConfig,
    sources: Sequence[NamedStream],
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
) -> list[TokenDataset]:
    """Build the dataset of each source; their order is fixed by names, seed and length.

    Raises:
        DataError: a source is too short, or the sentinels of `data.fim` cannot be used.
    """
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
    tokens = find_fim_tokens(
        config.fim,
        tokenizer=config.tokenizer,
        first_id=BYTE_VOCAB_SIZE if config.kind == "bytes" else 0,
        vocab_size=vocab_size,
    )
    return FillInTheMiddle(
        tokens,
        rate=config.fim.rate,
        spm_rate=config.fim.spm_rate,
        level=config.fim.level,
        key=key,
    )
