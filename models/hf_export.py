"""Weights written as a Hugging Face directory, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from models.base import HFMapping
from models.checkpoint import StoredModel, check_names, check_shape, parameter_table
from models.hf_bundle import bundle
from parallel.weights_io import ShardedWeightsReader


def export_model(
    stored: StoredModel,
    output: Path,
    *,
    hf: HFMapping,
    dtype: torch.dtype | None,
    max_shard_size: str,
    special_tokens: dict[str, int],
) -> None:
    """Write config.json, generation_config.json, the weights and, for a model that transformers
    does not have, its code into the directory `output`.

    `hf`: in whose names; tensors that it does not name are left out. `dtype` None keeps that of the
    weights. `special_tokens`: `eos_token_id` and the like.

    Raises:
        ValueError: the weights are not those of the configuration, are of several dtypes and
            `dtype` is None, or transformers has no model of this shape.
    """
    contents = hf.to_config(stored.config)
    with ShardedWeightsReader(stored.weights) as reader:
        table = parameter_table(stored.family, stored.config)
        check_names(reader.names(), table, source=stored.weights)
        target = dtype or reader.full(next(iter(table))).dtype
        _write_weights(
            reader,
            stored,
            output,
            hf.names(stored.config),
            target,
            max_shard_size=max_shard_size,
            cast=dtype is not None,
        )
    contents |= special_tokens | {"dtype": str(target).removeprefix("torch.")}
    _write_json(output / "config.json", contents)
    _write_json(output / "generation_config.json", special_tokens)
    for name, text in bundle(hf.code).items():
        (output / name).write_text(text, encoding="utf-8")


def _write_weights(
    reader: ShardedWeightsReader,
    stored: StoredModel,
    output: Path,
    names: Mapping[str, str],
    dtype: torch.dtype,
    *,
    max_shard_size: str,
    cast: bool,
) -> None:
    table = parameter_table(stored.family, stored.config)
    ours = {theirs: name for name, theirs in names.items()}
    plan = split_torch_state_dict_into_shards(
        {
            theirs: torch.empty(
                table[name].shape, dtype=table[name].buffer_dtype or dtype, device="meta"
            )
            for name, theirs in names.items()
        },
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
        shard = {theirs: load(ours[theirs]) for theirs in tensors}
        save_file(shard, output / file_name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(output / "model.safetensors.index.json", index)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="ascii")
