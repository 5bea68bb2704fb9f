"""Weights written as a Hugging Face directory, one shard in memory at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from models.base import HFMapping
from models.checkpoint import StoredModel, check_names, check_shape, parameter_table
from models.hf.code_bundle import write_files
from parallel.checkpoint.file_modes import follow_umask
from parallel.checkpoint.weights_reader import ShardedWeightsReader


def export_configuration(
    stored: StoredModel, output: Path, *, hf: HFMapping, dtype: torch.dtype | None
) -> None:
    """Write config.json and, for a model that transformers does not have, its code into `output`.

    Raises:
        ValueError: transformers has no model of this shape, or the weights are not those of the
            configuration.
    """
    with open_weights(stored) as reader:
        target = dtype or first_dtype(reader, stored)
    contents = hf.to_config(stored.config) | {"dtype": str(target).removeprefix("torch.")}
    write_json(output / "config.json", contents)
    write_files(hf.code, output)


def export_weights(
    stored: StoredModel,
    output: Path,
    *,
    hf: HFMapping,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """Write the weights into `output`, one shard in memory at a time.

    `hf`: the mapping of names; tensors without one are left out. `dtype` None keeps that of the
    weights.

    Raises:
        ValueError: the weights are not those of the configuration, or are of several dtypes and
            `dtype` is None.
    """
    with open_weights(stored) as reader:
        _write_weights(
            reader,
            stored,
            output,
            _parts(hf, stored.config),
            dtype or first_dtype(reader, stored),
            max_shard_size=max_shard_size,
            cast=dtype is not None,
        )


@contextlib.contextmanager
def open_weights(stored: StoredModel) -> Iterator[ShardedWeightsReader]:
    """Open the weights of a checkpoint.

    Raises:
        ValueError: they are not those of its configuration.
    """
    with ShardedWeightsReader(stored.weights) as reader:
        table = parameter_table(stored.family, stored.config)
        check_names(reader.names(), table, source=stored.weights)
        yield reader


def first_dtype(reader: ShardedWeightsReader, stored: StoredModel) -> torch.dtype:
    """The dtype of the first tensor of a checkpoint."""
    return reader.full(next(iter(parameter_table(stored.family, stored.config)))).dtype


def _parts(hf: HFMapping, config: Any) -> dict[str, tuple[str, ...]]:
    """Their name of every tensor of the file -> our names of what its rows hold."""
    ours = {theirs: name for name, theirs in hf.names(config).items()}
    fused = hf.fused(config)
    inside = {part for parts in fused.values() for part in parts}
    single = {theirs: (name,) for theirs, name in ours.items() if theirs not in inside}
    return single | {whole: tuple(ours[part] for part in parts) for whole, parts in fused.items()}


def _write_weights(
    reader: ShardedWeightsReader,
    stored: StoredModel,
    output: Path,
    parts: Mapping[str, tuple[str, ...]],
    dtype: torch.dtype,
    *,
    max_shard_size: str,
    cast: bool,
) -> None:
    table = parameter_table(stored.family, stored.config)

    def placeholder(names: tuple[str, ...]) -> Tensor:
        first = table[names[0]]
        shape = (sum(table[name].shape[0] for name in names), *first.shape[1:])
        return torch.empty(
            shape if len(names) > 1 else first.shape,
            dtype=first.buffer_dtype or dtype,
            device="meta",
        )

    plan = split_torch_state_dict_into_shards(
        {theirs: placeholder(names) for theirs, names in parts.items()},
        max_shard_size=max_shard_size,
    )

    def load(name: str) -> Tensor:
        full = reader.full(name)
        check_shape(name, full.shape, table[name].shape, source=stored.weights)
        if table[name].buffer_dtype is not None:
            return full.contiguous()
        if full.dtype != dtype and not cast:
            raise ValueError(
                f"{stored.weights}: {name} is {full.dtype}, others are {dtype}; choose --dtype"
            )
        return full.to(dtype).contiguous()

    for file_name, tensors in plan.filename_to_tensors.items():
        shard = {
            theirs: torch.cat([load(name) for name in parts[theirs]])
            if len(parts[theirs]) > 1
            else load(*parts[theirs])
            for theirs in tensors
        }
        save_file(shard, output / file_name, metadata={"format": "pt"})
        follow_umask(output / file_name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(output / "model.safetensors.index.json", index)


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write the contents of a file of the directory."""
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="ascii")
