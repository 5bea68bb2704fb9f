"""The memory of the recipe `delayed`, in a form that a checkpoint can hold without pickle.

Transformer Engine pickles it into each layer's extra state, and since 2.20 refuses to load what it
has pickled. Here it is a safetensors file in a tensor of bytes: the scales of the next step, and
the largest entries of the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from parallel.checkpoint.errors import CheckpointError

_DIRECTIONS = ("fwd", "bwd")
_FIELDS = ("scale", "amax_history")


def pack_history(meta: Mapping[str, Any]) -> Tensor:
    """The state of a layer whose `fp8_meta` this is, as bytes; none before the first step, and in
    recipes without history."""
    tensors = {}
    for direction in _DIRECTIONS:
        state = meta.get(f"scaling_{direction}")
        for field in _FIELDS:
            value = getattr(state, field, None)
            if value is None:
                return torch.empty(0, dtype=torch.uint8)
            tensors[f"{field}_{direction}"] = value.detach().cpu().contiguous()
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpack_history(packed: Tensor, meta: Mapping[str, Any]) -> None:
    """Copy packed state into that of a layer, which exists already.

    Raises:
        CheckpointError: it was not packed here, or is of another layer or recipe.
    """
    try:
        tensors = load(packed.cpu().numpy().tobytes())
    except SafetensorError as error:
        raise CheckpointError(
            "the FP8 history of a layer is not one that this version writes; earlier versions left "
            "it to pickle, which is not loaded: use training.fp8_recipe=tensorwise, which has none"
        ) from error
    for direction in _DIRECTIONS:
        state = meta[f"scaling_{direction}"]
        for field in _FIELDS:
            value, own = tensors.get(f"{field}_{direction}"), getattr(state, field)
            if value is None or value.shape != own.shape:
                shape = None if value is None else list(value.shape)
                raise CheckpointError(
                    f"the FP8 history of a layer has {field}_{direction} of shape {shape}, the "
                    f"layer {list(own.shape)}; use the checkpoint of a run with this model and "
                    "recipe"
                )
            own.copy_(value)
