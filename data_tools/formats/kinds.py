"""The registry: every format that `data_tools.convert` reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.formats import arrow, datatrove, litdata, llmc, mds, megatron, nanogpt, olmo
from data_tools.formats.blocks import ReadOptions, Sink, Source, WriteOptions


class Kind(NamedTuple):
    """A format: how it is opened and created, and what it can hold."""

    open: Callable[[Sequence[Path], ReadOptions], list[Source]]
    create: Callable[[Path, np.dtype[Any], WriteOptions], Sink]
    dtypes: tuple[str, ...]
    """Token dtypes that are written."""
    suffix: str = ""
    """What may be left out of the path of an input."""
    beside: tuple[str, ...] = ()
    """Suffixes of the files that are written with that of `suffix`."""
    reads: frozenset[str] = frozenset()
    """Options of ReadOptions beside `eod` and `bos` that have an effect."""
    writes: frozenset[str] = frozenset()
    """Options of WriteOptions beside `overwrite` that have an effect."""
    has_boundaries: bool = True
    """Whether documents are recorded; else only an end or begin token shows them."""
    has_empty: bool = False
    """Whether documents of no tokens can be recorded."""

    is_raw: bool = False
    """Whether a file holds ids one after another and nothing else, as Megatron's .bin does."""

    hashes_ids: bool = False
    """Whether its writer computes the checksum of the ids itself."""


KINDS: dict[str, Kind] = {
    "megatron": Kind(
        megatron.open_megatron,
        megatron.MegatronWriter,
        megatron.DTYPES,
        beside=(".idx", ".json"),
        hashes_ids=True,
    ),
    "nanogpt": Kind(
        nanogpt.open_nanogpt,
        nanogpt.NanoGptWriter,
        nanogpt.DTYPES,
        suffix=".bin",
        reads=frozenset({"dtype"}),
        has_boundaries=False,
        is_raw=True,
    ),
    "llmc": Kind(
        llmc.open_llmc,
        llmc.LlmcWriter,
        llmc.DTYPES,
        writes=frozenset({"shard_tokens"}),
        has_boundaries=False,
    ),
    "olmo": Kind(
        olmo.open_olmo,
        olmo.OlmoWriter,
        olmo.DTYPES,
        suffix=".npy",
        beside=(".csv.gz",),
        reads=frozenset({"dtype"}),
        is_raw=True,
    ),
    "datatrove": Kind(
        datatrove.open_datatrove,
        datatrove.DatatroveWriter,
        datatrove.DTYPES,
        suffix=".ds",
        beside=(".ds.index",),
        is_raw=True,
    ),
    "parquet": Kind(
        arrow.open_parquet,
        arrow.ParquetWriter,
        arrow.DTYPES,
        suffix=".parquet",
        reads=frozenset({"column"}),
        writes=frozenset({"column"}),
        has_empty=True,
    ),
    "mds": Kind(
        mds.open_mds,
        mds.MdsWriter,
        mds.DTYPES,
        reads=frozenset({"column", "dtype"}),
        writes=frozenset({"column"}),
    ),
    "litdata": Kind(litdata.open_litdata, litdata.LitdataWriter, litdata.DTYPES),
    "arrow": Kind(
        arrow.open_arrow,
        arrow.ArrowWriter,
        arrow.DTYPES,
        reads=frozenset({"column"}),
        writes=frozenset({"column"}),
        has_empty=True,
    ),
}
