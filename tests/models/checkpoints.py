"""Checkpoints of a small model, written at any layout without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from models.base import ModelFamily
from models.checkpoint import StoredModel, parameter_table, write_manifest
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY
from parallel.carry import SequentialModel
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord, encode_manifest
from parallel.checkpoint.weights import ShardPosition, Weight, write_shard
from parallel.context import ParallelContext
from parallel.layer_state import persistent_buffers
from parallel.sharding import split
from tests.equivalence import build

VOCAB_SIZE = 301  # not divisible by 2: tensor ranks pad it


def config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 256,
        "init_std": 0.2,
    }
    return LlamaConfig(**(sizes | changes))


def model(of: Any, family: ModelFamily = FAMILY) -> SequentialModel:
    """In evaluation, away from where gates and gains start."""
    return build(family.layer_specs(of), ParallelContext.single(), seed=11, noise=0.1).eval()


def write_checkpoint(
    directory: Path,
    of: Any,
    *,
    family: ModelFamily = FAMILY,
    pipeline: int = 1,
    tensor: int = 1,
    tokenizer: str | None = "bytes",
    text: TextRecord = UNKNOWN_TEXT,
    dtype: torch.dtype = torch.float32,
    whole: SequentialModel | None = None,
) -> SequentialModel:
    """Cut a model's layers into stages and its weights into tensor ranks; returns the model,
    `whole` or a new one."""
    whole = model(of, family) if whole is None else whole
    table = parameter_table(family, of)
    tensors = {**dict(whole.named_parameters()), **persistent_buffers(whole)}
    layers = [spec.name for spec in whole.specs]
    (directory / "weights").mkdir(parents=True)
    for stage in range(pipeline):
        own = set(layers[stage * len(layers) // pipeline : (stage + 1) * len(layers) // pipeline])
        for rank in range(tensor):
            position = ShardPosition(stage, pipeline, rank, tensor)
            weights = []
            for name, info in table.items():
                if name.split(".")[0] in own:
                    part = split(tensors[name].detach(), info.sharding, size=tensor, rank=rank)
                    part = part.to(info.buffer_dtype or dtype)
                    weights.append(
                        Weight(name, tuple(part.shape), part.dtype, info.sharding, lambda p=part: p)
                    )
            with (directory / "weights" / position.file_name).open("wb") as file:
                write_shard(file, weights, position=position)
    write_manifest(directory, StoredModel(directory / "weights", family, of, tokenizer, text))
    return whole


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level keys of a JSON file; a manifest keeps a checksum that fits."""
    content = json.loads(path.read_text()) | changes
    is_manifest = content.pop("checksum", None) is not None
    path.write_bytes(encode_manifest(content) if is_manifest else json.dumps(content).encode())
