"""Checkpoints of standalone training, in the format of every run.

    checkpoint-N/manifest.json                  configuration, step, sha256 of every file
                 weights/*.safetensors          the family's layers: what generation, conversion
                                                and `training.init_from` of a run read
                 training/state.safetensors     optimizer, schedule, and the model's own additions
                 training/rank_00.safetensors   data position and random numbers of each process

Nothing is pickled. A nested state becomes its tensors and, in the file's metadata, JSON that says
where each belongs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checkpoint import StoredModel, open_checkpoint, write_manifest
from models.standalone.model import StandaloneModel
from parallel.carry import ties
from parallel.checkpoint.errors import RESTORE, brief
from parallel.checkpoint.manifest import (
    MANIFEST_NAME,
    load_manifest,
    verify_content,
    verify_listing,
)
from parallel.checkpoint.storage import Storage
from parallel.checkpoint.weights import ShardPosition, Weight, module_weights, write_shard
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from parallel.sharding import Sharding

_BODY = "body."
_MODEL, _STATE_KEY, _TENSOR_KEY = "model", "state", "$tensor"


class TrainingState(NamedTuple):
    """The resumable training state: `shared` by all processes (step, optimizer, schedule) and `own`
    to this one (data position, random state). Nested dicts and lists of tensors and JSON types.
    """

    shared: dict[str, Any]
    own: dict[str, Any]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def save_training(folder: Path, model: StandaloneModel, state: TrainingState, *, step: int) -> None:
    """Write a checkpoint that training can continue (collective); the processes share the disk.

    The folder appears, or is replaced, once it is complete.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    training = partial / "training"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        training.mkdir(parents=True)
    _barrier()
    _write_state(training / f"rank_{rank():02d}.safetensors", state.own)
    _barrier()
    if rank() == 0:
        additions = {k: v for k, v in model.state_dict().items() if not k.startswith(_BODY)}
        _write_state(training / "state.safetensors", {**state.shared, _MODEL: additions})
        stored = StoredModel(partial / "weights", model.family, model.config, None)
        write_model(partial, stored, module_weights(model.body), step=step)
        _replace(folder, partial)
    _barrier()


def write_model(folder: Path, stored: StoredModel, weights: list[Weight], *, step: int = 0) -> None:
    """Write the weights and the manifest of a checkpoint; other files of it are already there."""
    position = ShardPosition()
    stored.weights.mkdir(parents=True)
    with Storage().create(stored.weights / position.file_name) as file:
        write_shard(file, weights, position=position)
    write_manifest(folder, stored, step=step)


def open_training(folder: Path) -> StoredModel:
    """Open a checkpoint of `save_training` after verifying every file.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if not (folder / MANIFEST_NAME).is_file() or not has_training_state(folder):
        raise ValueError(f"{folder} is no checkpoint of a Trainer; give a folder checkpoint-N")
    manifest = load_manifest(folder / MANIFEST_NAME)
    damage = verify_listing(folder, manifest) or verify_content(folder, manifest, manifest.files)
    if damage is not None:
        raise ValueError(damage)
    return open_checkpoint(folder)


def has_training_state(folder: Path) -> bool:
    return (folder / "training" / "state.safetensors").is_file()


def load_training_state(folder: Path) -> TrainingState:
    """The state of this process.

    Raises:
        ValueError: another number of processes wrote it, or a file is damaged.
    """
    written_by = len(list((folder / "training").glob("rank_*.safetensors")))
    check_num_ranks(folder, written_by)
    own = _read_state(folder / "training" / f"rank_{rank():02d}.safetensors")
    return TrainingState(_read_state(folder / "training" / "state.safetensors"), own)


def check_num_ranks(folder: Path, written_by: int) -> None:
    """Raise ValueError unless the number of processes is that of the checkpoint."""
    if written_by != num_ranks():
        raise ValueError(
            f"{folder} was written by {written_by} processes and there are {num_ranks()}; start "
            f"{written_by}, so that each continues its own data"
        )


def load_model_state(folder: Path, stored: StoredModel) -> dict[str, Tensor]:
    """The state dict of a StandaloneModel, a tied tensor under each of its names."""
    with ShardedWeightsReader(stored.weights) as reader:
        state = {f"{_BODY}{name}": tensor for name, tensor in reader.items()}
    for tie in ties(stored.family.layer_specs(stored.config)):
        state[f"{_BODY}{tie.layer}.{tie.path}"] = state[f"{_BODY}{tie.target}"]
    if has_training_state(folder):
        path = folder / "training" / "state.safetensors"
        additions = _read_state(path).get(_MODEL)
        if not isinstance(additions, dict):
            raise ValueError(
                f"{path} is damaged: it cannot be read as the state of a model; {RESTORE}"
            )
        state |= additions
    return state


def load_into(
    model: StandaloneModel,
    state: Mapping[str, Any],
    *,
    source: Path,
    load: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """`load` (by default the model's `load_state_dict`) of a state dict from a file.

    Raises:
        ValueError: its tensors are not those of the model.
    """
    try:
        (load or model.load_state_dict)(state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = brief(error, most=300)
        raise ValueError(
            f"{source} does not fit the model ({reason}); it is damaged or of another model: build "
            "the model with the configuration and the adapters that it was saved with"
        ) from error


def _replace(folder: Path, complete: Path) -> None:
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    complete.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _write_state(path: Path, state: Any) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_without_tensors(state, tensors, ""))
    weights = [
        Weight(name, tuple(tensor.shape), tensor.dtype, Sharding(), tensor.detach)
        for name, tensor in tensors.items()
    ]
    with Storage().create(path) as file:
        write_shard(file, weights, position=ShardPosition(), metadata={_STATE_KEY: text})


def _without_tensors(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON types in place of a nested state; moves its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR_KEY: name}
    if isinstance(value, Mapping):
        return {str(k): _without_tensors(v, tensors, f"{name}/{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(v, tensors, f"{name}/{i}") for i, v in enumerate(value)]
    return value


def _read_state(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            state = _with_tensors(json.loads(file.metadata()[_STATE_KEY]), file.get_tensor)
            if not isinstance(state, dict):
                raise TypeError(f"a state is no {type(state).__name__}")
            return state
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it cannot be read; {RESTORE}") from error


def _with_tensors(value: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR_KEY}:
            return tensor_of(value[_TENSOR_KEY])
        return {key: _with_tensors(item, tensor_of) for key, item in value.items()}
    return [_with_tensors(v, tensor_of) for v in value] if isinstance(value, list) else value
