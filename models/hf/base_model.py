"""Families initialised from pretrained transformers models: configuration and weights.

Parameters that the family adds (routers, priors) are initialised as in a new model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import BaseModelMapping, HFMapping, ModelFamily
from models.checkpoint import check_names, check_shape, parameter_table
from models.hf.import_weights import (
    ForeignModel,
    converted,
    load_sound,
    open_foreign_weights,
    read_contents,
    stored_dtype,
    with_prefix,
    without_copies,
)
from models.registry import get_family
from parallel.carry import LayerSpec
from parallel.checkpoint.weights import Weight, write_files
from parallel.context import ParallelContext
from parallel.layer_state import persistent_buffers
from parallel.random import initialize


def require_base(family: ModelFamily) -> BaseModelMapping:
    """The family's mapping from a transformers base model.

    Raises:
        ValueError: it has none.
    """
    base = family.require_hf().base
    if base is None:
        raise ValueError(
            f"the {family.name} family extends no base model; leave out --family or --plain"
        )
    return base


def read_base_config(
    directory: Path, family_name: str, changes: Mapping[str, Any], *, from_scratch: bool = False
) -> ForeignModel:
    """Read the configuration of a family for the model in `directory`, with changed settings.

    `from_scratch`: no weights will be taken, so that sizes may differ.

    Raises:
        ValueError: the family cannot be initialised from that model, a setting is invalid, or the
            sizes differ although weights are taken.
    """
    family = get_family(family_name)
    base, path = require_base(family), directory / "config.json"
    contents = read_contents(path)
    if contents["model_type"] not in base.model_types:
        raise ValueError(
            f"{path}: model_type={contents['model_type']!r} is no base model of the {family_name} "
            f"family; choose a model of type {' or '.join(base.model_types)}"
        )
    defaults = {} if from_scratch else base.defaults
    config = converted(base.from_config, contents, {**defaults, **changes}, path=path)
    if not from_scratch:
        theirs = converted(base.from_config, contents, {}, path=path)
        base.check_sizes(config, theirs, str(path))
    return ForeignModel(directory, family, family.require_hf(), config)


def plain_model(family: ModelFamily, config: Any) -> HFMapping:
    """The mapping that exports a model as its base model.

    Raises:
        ValueError: its family has none, or the two differ even with every token computed.
    """
    base = require_base(family)
    base.to_config(config)
    return HFMapping(
        model_types=base.model_types,
        to_config=base.to_config,
        from_config=lambda contents: base.from_config(contents, {}),
        names=base.names,
        tied=family.require_hf().tied,
        derived=family.require_hf().derived,
    )


class BaseWeights(NamedTuple):
    """`names`: our name -> theirs, of every tensor that is taken. `load(our name, dtype)`: loads it
    on the CPU; dtype None keeps theirs. `dtype`: the dtype of their first tensor."""

    names: dict[str, str]
    load: Callable[[str, torch.dtype | None], Tensor]
    dtype: torch.dtype


@contextlib.contextmanager
def base_weights(model: ForeignModel) -> Iterator[BaseWeights]:
    """Open the weights that `model` takes from its base: the first layers of a deeper one.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    base, source = require_base(model.family), model.directory
    whole = base.from_config(read_contents(source / "config.json"), {})
    names, table = base.names(model.config), parameter_table(model.family, model.config)
    with open_foreign_weights(source) as tensors:
        tensors = with_prefix(tensors, base.names(whole).values())
        kept = without_copies(tensors, model.hf, whole, source=source)
        check_names(kept, base.names(whole).values(), source=source)
        for ours, theirs in names.items():
            check_shape(theirs, kept[theirs].shape, table[ours].shape, source=source)

        def load(name: str, dtype: torch.dtype | None) -> Tensor:
            foreign = kept[names[name]]
            return load_sound(names[name], foreign, dtype or foreign.dtype)

        yield BaseWeights(names, load, kept[next(iter(names.values()))].dtype)


def import_base_weights(
    model: ForeignModel, output: Path, *, dtype: torch.dtype | None, from_scratch: bool = False
) -> dict[str, str]:
    """Write a model initialised from the weights of `model.directory`, one tensor in memory at a
    time; returns our name -> theirs for every tensor taken. `dtype` None keeps theirs.

    Raises:
        ValueError: the weights of the directory are not those that its config.json describes.
    """
    specs = {spec.name: spec for spec in model.family.layer_specs(model.config)}
    with contextlib.ExitStack() as stack:
        taken = BaseWeights({}, _nothing, torch.float32)
        if not from_scratch:
            taken = stack.enter_context(base_weights(model))
        weights = []
        for name, info in parameter_table(model.family, model.config).items():
            target = info.buffer_dtype or dtype or stored_dtype(taken.dtype)
            layer, _, path = name.partition(".")
            load = partial(_initial, specs[layer], path, target)
            if name in taken.names:
                load = partial(taken.load, name, target)
            weights.append(Weight(name, tuple(info.shape), target, info.sharding, load))
        write_files(output, weights)
    return taken.names


def _nothing(name: str, dtype: torch.dtype | None) -> Tensor:
    raise AssertionError(f"{name} is not taken from anywhere")


def _initial(spec: LayerSpec, path: str, dtype: torch.dtype) -> Tensor:
    """The initial value of one parameter or buffer of a new layer."""
    layer = spec.module(ctx=ParallelContext.single(), **spec.kwargs)
    buffers = persistent_buffers(layer)
    if path in buffers:
        return buffers[path].to(dtype)
    for name, parameter in list(layer.named_parameters()):
        if name != path:  # not drawn, and its memory is never touched
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, nn.Parameter(parameter.to("meta")))
    initialize(layer, seed=torch.initial_seed(), prefix=spec.name, tensor_rank=0)
    return layer.get_parameter(path).detach().to(dtype)
