"""Models from checkpoint directories: configuration, weights, tokenizer. Nothing is unpickled.

The directory holds `manifest.json`, whose `config` is that of the run, and `weights/`, which
parallel.checkpoint.weights reads at any layout.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from models.base import ModelFamily
from models.layer_counts import layers_without_memory
from models.registry import get_config_class, get_family
from parallel.carry import SequentialModel
from parallel.checkpoint.errors import RESTORE, brief
from parallel.checkpoint.file_hashes import hash_files
from parallel.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    UNKNOWN_TEXT,
    FileEntry,
    Layout,
    Manifest,
    TextRecord,
    load_manifest,
)
from parallel.checkpoint.weights_reader import ShardedWeightsReader, find_weights, verify_weights
from parallel.context import ParallelContext
from parallel.layer_state import persistent_buffers
from parallel.precision import Precision
from parallel.sharding import Sharding, sharding_of

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class StoredModel(NamedTuple):
    """The model stored in a checkpoint; `tokenizer` is None if the checkpoint names none."""

    weights: Path
    family: ModelFamily
    config: Any
    tokenizer: str | None
    text: TextRecord = UNKNOWN_TEXT


def open_checkpoint(path: Path | str) -> StoredModel:
    """Open a checkpoint (`step_N`), or the newest one of a run directory.

    Raises:
        ValueError: there is none, or its manifest or a weight file is damaged.
    """
    weights = find_weights(Path(path))
    path = weights.parent / MANIFEST_NAME
    manifest = load_manifest(path)
    try:
        model, data = dict(manifest.config["model"]), dict(manifest.config["data"])
        family = get_family(model["family"])
        tokenizer = "bytes" if data.get("kind") == "bytes" else data.get("tokenizer")
        if not isinstance(tokenizer, str | None):
            raise TypeError(f"data.tokenizer={tokenizer!r}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it has no model configuration; {RESTORE}") from error
    verify_weights(weights)
    return StoredModel(weights, family, parse_config(model, source=path), tokenizer, manifest.text)


def origin_of(checkpoint: Path) -> str | None:
    """The source of the initial weights of a checkpoint's run (`training.init_from`), or None.

    Raises:
        ValueError: its manifest is damaged.
    """
    training = load_manifest(checkpoint / MANIFEST_NAME).config.get("training")
    origin = training.get("init_from") if isinstance(training, dict) else None
    return origin if isinstance(origin, str) else None


def parse_config(values: dict[str, Any], *, source: Path) -> Any:
    """Parse the configuration of the family named by its key `family`.

    Raises:
        ValueError: one line with the first invalid key.
    """
    try:
        return get_config_class(values["family"]).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("model", *map(str, first["loc"])))
        raise ValueError(f"{source}: {key}={first['input']!r}: {first['msg']}") from None


def check_device(name: str) -> None:
    """Raise ValueError if the device of `--device` cannot be used."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({brief(error)}); try cpu") from error


def load_model(
    stored: StoredModel, *, device: torch.device | str, precision: str | None = None
) -> SequentialModel:
    """Load the whole model onto one device, in `precision` (fp32, bf16) or the stored dtype.

    Raises:
        ValueError: the weights do not match the configuration exactly.
    """
    with ShardedWeightsReader(stored.weights) as reader:
        table = parameter_table(stored.family, stored.config)
        check_names(reader.names(), table, source=stored.weights)
        name = precision or _PRECISIONS.get(reader.full(next(iter(table))).dtype, "fp32")
        ctx = ParallelContext.single(precision=Precision(name), device=device)
        model = SequentialModel(stored.family.layer_specs(stored.config), ctx, seed=None)
        model.to(ctx.precision.dtype)
        with torch.no_grad():
            for key, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
                full = reader.full(key)
                check_shape(key, full.shape, table[key].shape, source=stored.weights)
                tensor.copy_(full)
    return model.eval()


class ParameterInfo(NamedTuple):
    """Full shape and sharding of a stored tensor. `buffer_dtype`: the dtype of a buffer, which is
    kept at any precision; None for a parameter."""

    shape: torch.Size
    sharding: Sharding
    buffer_dtype: torch.dtype | None = None


def parameter_table(family: ModelFamily, config: Any) -> dict[str, ParameterInfo]:
    """Every parameter and persistent buffer in layer order, a tied parameter once; built on the
    meta device, without memory or arithmetic."""
    table: dict[str, ParameterInfo] = {}
    for spec, layer in layers_without_memory(family.layer_specs(config)):
        for path, parameter in layer.named_parameters():
            if path not in spec.tied:
                name = f"{spec.name}.{path}"
                table[name] = ParameterInfo(parameter.shape, sharding_of(name, parameter))
        for path, buffer in persistent_buffers(layer).items():
            table[f"{spec.name}.{path}"] = ParameterInfo(buffer.shape, Sharding(), buffer.dtype)
    return table


def check_names(found: Collection[str], expected: Collection[str], *, source: Path) -> None:
    """Compare two sets of tensor names.

    Raises:
        ValueError: names the first ten that are missing and that are unexpected.
    """
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = [
        f"{kind} {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
        for kind, names in (("lacks", missing), ("has unexpected", surplus))
        if names
    ]
    if parts:
        raise ValueError(
            f"{source} {' and '.join(parts)}, so it is not of this model configuration; use "
            "weights and configuration of one model"
        )


def check_shape(name: str, found: torch.Size, expected: torch.Size, *, source: Path) -> None:
    """Compare a tensor's shape with the model's.

    Raises:
        ValueError: they differ.
    """
    if found != expected:
        raise ValueError(
            f"{source}: {name} has shape {list(found)}, the model configuration says "
            f"{list(expected)}; use weights and configuration of one model"
        )


def write_manifest(directory: Path, stored: StoredModel, *, step: int = 0) -> None:
    """Write the manifest that completes a checkpoint whose files are already in `directory`.

    The format is that of training checkpoints, so that every reader of those can read it.
    """
    table = parameter_table(stored.family, stored.config)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        step=step,
        layout=Layout(),
        config={
            "model": stored.config.model_dump(mode="json"),
            "data": {"tokenizer": stored.tokenizer},
        },
        text=stored.text,
        fingerprints={},
        versions={"torch": torch.__version__},
        sharding={
            name: (info.sharding.dim, info.sharding.full_size) for name, info in table.items()
        },
        files=_entries(directory),
    )
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _entries(directory: Path) -> dict[str, FileEntry]:
    entries = {}
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path, record, error in hash_files(paths):
        if record is None:
            raise error or OSError(f"{path} cannot be read")
        entries[path.relative_to(directory).as_posix()] = FileEntry(**record._asdict(), rank=0)
    return entries
