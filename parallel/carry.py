"""A model as an ordered list of layers that pass one named carry from one to the next.

A family declares its carry once, as a NamedTuple class, and describes it for a given run with the
same class filled with `Field`s. Every layer between the first and the last takes and returns the
carry. The same list of `LayerSpec`s is built whole (`SequentialModel`) or cut into pipeline stages
(parallel.pipeline); layers do not know which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.random import initialize
from parallel.sharding import local_shape


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a model, not built yet.

    `name`: a flat identifier, unique in the model; parameters are called `name.path` in the whole
    model, in every pipeline stage and in checkpoints. `module`: called as `module(ctx=ctx,
    **kwargs)`. `tied`: parameter of this layer -> full name of the earlier layer's parameter that
    it shares. `recompute`: whether activation recomputation applies to the layer.
    """

    name: str
    module: type[nn.Module]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    recompute: bool = True


# Called with every finished layer before the next one is built.
AfterEach = Callable[[LayerSpec, nn.Module], None]


class Field(NamedTuple):
    """One field of a carry: local shape, dtype, and whether a gradient flows back through it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool = False

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class Varying:
    """A field of a carry that is a tuple of tensors, only as many as later layers need.

    `after`: layer -> the fields that its output holds; none after a layer that is not named.
    """

    after: Mapping[str, tuple[Field, ...]]


def schema_after(schema: Any, layer: str) -> Any:
    """The schema of the output of one layer: every `Varying` field becomes a tuple of `Field`s."""
    return type(schema)(
        *(field.after.get(layer, ()) if isinstance(field, Varying) else field for field in schema)
    )


def leaves(carry: Any) -> list[tuple[str, Any]]:
    """Name and value of every tensor of a carry, or of every `Field` of the schema of one layer's
    output; absent ones are left out."""
    found: list[tuple[str, Any]] = []
    for name, value in zip(carry._fields, carry, strict=True):
        if _is_several(value):
            found += [(f"{name}[{i}]", each) for i, each in enumerate(value)]
        elif value is not None:
            found.append((name, value))
    return found


def _is_several(value: Any) -> bool:
    return isinstance(value, tuple) and not isinstance(value, Field)


def check_carry(layer: str, carry: Any, schema: Any) -> None:
    """Check a layer's output against the carry schema of its family.

    Raises:
        ValueError: names the layer, the field, and the expected and actual value.
    """
    schema = schema_after(schema, layer)
    if type(carry) is not type(schema):
        raise ValueError(
            f"layer {layer} returned {type(carry).__name__}, "
            f"expected the carry {type(schema).__name__}"
        )
    for name, value, expected in zip(schema._fields, carry, schema, strict=True):
        if not _is_several(expected):
            _check_field(layer, name, value, expected)
            continue
        if not isinstance(value, tuple) or len(value) != len(expected):
            came = f"{len(value)}" if isinstance(value, tuple) else type(value).__name__
            raise ValueError(
                f"layer {layer}, carry field {name}: got {came}, expected {len(expected)} tensors; "
                "correct the layer or the carry schema of its family"
            )
        for i, pair in enumerate(zip(value, expected, strict=True)):
            _check_field(layer, f"{name}[{i}]", *pair)


def _check_field(layer: str, name: str, value: Any, expected: Field | None) -> None:
    if expected is None and value is None:
        return
    if expected is None or not isinstance(value, Tensor):
        came = type(value).__name__
        raise ValueError(
            f"layer {layer}, carry field {name}: got {came}, expected {expected}; correct the "
            "layer or the carry schema of its family"
        )
    if (value.dtype, tuple(value.shape)) != (expected.dtype, tuple(expected.shape)):
        came = str(Field(tuple(value.shape), value.dtype))
        raise ValueError(
            f"layer {layer}, carry field {name}: got {came}, expected {expected}; correct the "
            "layer or the carry schema of its family"
        )


class Tie(NamedTuple):
    """Parameter `path` of layer `layer` is the parameter `target` (full name) of another layer."""

    layer: str
    path: str
    target: str


def ties(specs: Iterable[LayerSpec]) -> list[Tie]:
    """Every tied parameter of a model, in the order of its layers.

    Raises:
        ValueError: a target does not belong to an earlier layer, or is itself tied to another.
    """
    found: list[Tie] = []
    seen: set[str] = set()
    owners: dict[str, str] = {}
    for spec in specs:
        for path, target in spec.tied.items():
            if target.split(".")[0] not in seen:
                raise ValueError(
                    f"layer {spec.name} ties {path} to {target}, which is not in an earlier layer"
                )
            if target in owners:
                raise ValueError(
                    f"layer {spec.name} ties {path} to {target}, which is itself tied; "
                    f"tie it to {owners[target]}"
                )
            owners[f"{spec.name}.{path}"] = target
            found.append(Tie(spec.name, path, target))
        seen.add(spec.name)
    return found


def canonical_names(specs: Iterable[LayerSpec]) -> dict[str, str]:
    """Map a tied parameter's name in its own layer to the canonical name of all its copies.

    The canonical name is the one in the first layer that holds the parameter, as in the whole model
    and in checkpoints. Every decision by parameter name must use it, or copies would diverge.
    """
    return {f"{tie.layer}.{tie.path}": tie.target for tie in ties(specs)}


def build_layers(
    specs: Sequence[LayerSpec],
    ctx: ParallelContext,
    *,
    seed: int | None,
    after_each: AfterEach | None = None,
) -> dict[str, nn.Module]:
    """Build consecutive layers on `ctx.device`, initialised from (seed, parameter name).

    With `seed=None` parameters are left uninitialised, for weights about to be loaded.

    A parameter tied to one of these layers becomes the same object; one tied to a layer elsewhere
    is a copy with the same initial value. `after_each` is where ZeRO-3 partitions the layer, so
    that no rank ever holds the whole model, and where stored weights are loaded into it.
    """
    layers: dict[str, nn.Module] = {}
    foreign: dict[str, nn.Parameter] = {}  # copies of parameters that belong to layers elsewhere
    for spec in specs:
        if not spec.name.isidentifier() or spec.name in layers:
            raise ValueError(f"layer name {spec.name!r} is not a unique identifier")
        layer = spec.module(ctx=ctx, **spec.kwargs)
        if seed is not None:
            initialize(
                layer,
                seed=seed,
                prefix=spec.name,
                tensor_rank=ctx.tensor.rank,
                expert_rank=ctx.expert.rank,
                names=dict(spec.tied),
            )
        for path, target in spec.tied.items():
            owner, _, target_path = target.partition(".")
            if owner in layers:
                _set_parameter(layer, path, layers[owner].get_parameter(target_path))
            elif target in foreign:
                _set_parameter(layer, path, foreign[target])
            else:
                foreign[target] = layer.get_parameter(path)
        layers[spec.name] = layer
        if after_each is not None:
            after_each(spec, layer)
    return layers


class SequentialModel(nn.Module):
    """The whole model in one process: `carry = layer(carry)` over the ordered layers.

    `forward(inputs)` returns the output of the last layer. With `cache` (from `new_cache`) each
    layer that keeps state between calls receives its own entry as a second argument, and the tokens
    passed continue those already seen.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        ctx: ParallelContext,
        *,
        seed: int | None = 0,
        recompute: bool = False,
        after_each: AfterEach | None = None,
    ) -> None:
        super().__init__()
        ties(specs)
        self.specs = tuple(specs)
        self.ctx = ctx
        self.recompute = recompute
        layers = build_layers(self.specs, ctx, seed=seed, after_each=after_each)
        for name, layer in layers.items():
            self.add_module(name, layer)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.get_submodule(spec.name) for spec in self.specs]

    def forward(self, inputs: Any, cache: Mapping[str, Any] | None = None) -> Any:
        with self.ctx.precision.autocast():
            if cache is None:
                return run_layers(
                    self.specs, self.layers, inputs, self.ctx, recompute=self.recompute
                )
            carry = inputs
            for spec, layer in zip(self.specs, self.layers, strict=True):
                carry = layer(carry, cache[spec.name]) if spec.name in cache else layer(carry)
            return carry

    def new_cache(self, batch_size: int, max_length: int) -> dict[str, Any]:
        """Empty state for generation: layer name -> what its `new_cache` returns."""
        return {
            spec.name: layer.new_cache(batch_size, max_length)  # type: ignore[operator]
            for spec, layer in zip(self.specs, self.layers, strict=True)
            if hasattr(layer, "new_cache")
        }


def run_layers(
    specs: Sequence[LayerSpec],
    layers: Sequence[nn.Module],
    carry: Any,
    ctx: ParallelContext,
    *,
    recompute: bool,
) -> Any:
    """Run consecutive layers on the carry; with `recompute`, recompute those that allow it."""
    for spec, layer in zip(specs, layers, strict=True):
        if recompute and spec.recompute and torch.is_grad_enabled():
            carry = ctx.precision.checkpoint(layer, carry)
        else:
            carry = layer(carry)
    return carry


def check_layers(model: SequentialModel, inputs: Any, schema: Any) -> Any:
    """Run a model on its device and check the output of every layer but the last.

    On the meta device it costs no memory and no arithmetic, so it runs before anything large is
    built. `model` is built for one process (ParallelContext.single(device="meta")); `schema`
    describes its carry. Among layers of one class with equal arguments only the first runs: the
    others return the same.

    Returns the carry that the last layer takes.

    Raises:
        ValueError: a layer breaks the schema of the carry.
    """
    carry = type(inputs)(*(x if x is None else x.to(model.ctx.device) for x in inputs))
    checked: list[tuple[type[nn.Module], Mapping[str, Any]]] = []
    for spec, layer in zip(model.specs[:-1], model.layers[:-1], strict=True):
        if (spec.module, spec.kwargs) in checked:
            continue
        carry = layer(carry)
        check_carry(spec.name, carry, schema)
        if spec is not model.specs[0]:  # which takes the inputs instead of a carry
            checked.append((spec.module, spec.kwargs))
    return carry


def _set_parameter(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    own = owner.get_parameter(name)
    shape = local_shape(parameter)
    if own.shape != shape:
        raise ValueError(
            f"cannot tie {path} of shape {tuple(own.shape)} to a parameter of shape {shape}"
        )
    mine, theirs = _declared(own), _declared(parameter)
    if mine != theirs:
        raise ValueError(
            f"cannot tie {path}, declared {mine}, to a parameter declared {theirs}: a pipeline "
            "stage trains its copy by its own declaration; declare both alike"
        )
    setattr(owner, name, parameter)


def _declared(parameter: nn.Parameter) -> str:
    """Describe how a tied parameter is sharded and trained, for comparing its copies.

    Roles are compared only as far as an optimizer distinguishes them: an embedding may be tied to a
    head.
    """
    role = getattr(parameter, "role", None)
    kind = role if role in ("matrix", "vector") else "neither matrix nor vector"
    trained = "trained" if parameter.requires_grad else "frozen"
    return f"{kind}, {trained}, {getattr(parameter, 'sharding', None)}"
