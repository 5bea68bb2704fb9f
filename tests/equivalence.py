"""Loss and every gradient of a model in one layout, in a form that layouts can be compared in.

The engine of the contract test. Gradients come back whole (merged over tensor ranks) under the
names of the single-process model, so that two results are compared entry by entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn

from models.base import ModelFamily, TokenInputs
from parallel.carry import LayerSpec, SequentialModel, run_layers
from parallel.context import ParallelContext
from parallel.cross_entropy import set_logits_parts
from parallel.random import initialize
from parallel.sharding import (
    Normal,
    declare,
    init_of,
    merge,
    sharding_of,
    sum_partial_gradients,
)
from parallel.wire import Wire


class Measured(NamedTuple):
    """The loss, its terms, and the full gradient of every parameter."""

    loss: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def measure(
    family: ModelFamily,
    config: BaseModel,
    inputs: TokenInputs,
    labels: Tensor,
    ctx: ParallelContext,
    *,
    cuts: Sequence[int] = (),
    recompute: bool = False,
    logits_parts: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Measured:
    """One forward and backward pass; `cuts` are the layers before which the carry crosses the wire.

    `noise`: see `build`. `dtype`: of the parameters; the wire carries what is declared in fp32.

    Collective over the tensor axis. A parameter without gradient is missing from `gradients`.
    """
    segmented = inputs.segment_ids is not None
    specs = family.layer_specs(config, segmented=segmented)
    model = build(specs, ctx, seed=seed, noise=noise, recompute=recompute).to(dtype)
    sum_partial_gradients(model, ctx)
    set_logits_parts(model.layers[-1], logits_parts)
    batch_size, seq_length = inputs.tokens.shape
    schema = family.carry_schema(
        config, ctx, micro_batch_size=batch_size, seq_length=seq_length, segmented=segmented
    )
    output = run_cut(specs, model, inputs, schema, cuts)
    total, terms = family.loss(output, labels, config=config, ctx=ctx)
    total.backward()
    return Measured(total.detach(), terms, full_gradients(model, ctx))


def build(
    specs: Sequence[LayerSpec],
    ctx: ParallelContext,
    *,
    seed: int,
    noise: float,
    recompute: bool = False,
) -> SequentialModel:
    """The model with N(0, noise^2) on what starts constant, so that no gate hides what it gates.

    Initial values are drawn once for all models that share them: drawing takes longer than a step.
    """
    model = SequentialModel(specs, ctx, seed=None, recompute=recompute)
    draw = _Draw.of(model, seed=seed, noise=noise)
    values = _DRAWN.get(draw)
    if values is None:
        values = _DRAWN[draw] = _drawn(specs, ctx, seed=seed, noise=noise)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


class _Draw(NamedTuple):
    """The inputs that decide the initial values of a rank's parameters (parallel/random.py)."""

    seed: int
    noise: float
    tensor_rank: int
    expert_rank: int
    parameters: tuple[Any, ...]

    @classmethod
    def of(cls, model: SequentialModel, *, seed: int, noise: float) -> _Draw:
        parameters = tuple(
            (name, p.shape, p.dtype, repr(init_of(name, p)), sharding_of(name, p))
            for name, p in model.named_parameters()
        )
        return cls(seed, noise, model.ctx.tensor.rank, model.ctx.expert.rank, parameters)


_DRAWN: dict[_Draw, dict[str, Tensor]] = {}


def _drawn(
    specs: Sequence[LayerSpec], ctx: ParallelContext, *, seed: int, noise: float
) -> dict[str, Tensor]:
    def disturb(spec: LayerSpec, layer: nn.Module) -> None:
        if noise:
            rank = ctx.tensor.rank
            perturb(layer, seed=seed, prefix=spec.name, tensor_rank=rank, std=noise)

    model = SequentialModel(specs, ctx, seed=seed, after_each=disturb)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def perturb(module: nn.Module, *, seed: int, prefix: str, tensor_rank: int, std: float) -> None:
    """Add N(0, std^2) to every parameter that starts constant, the same at any layout.

    Gates and modulations that start at zero hide what lies behind them: to compare layouts or to
    look for leaks, the model has to be somewhere else.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta or isinstance(init_of(name, parameter), Normal):
            continue
        noise = nn.Parameter(torch.empty_like(parameter))
        holder = nn.ParameterDict(
            {"noise": declare(noise, sharding_of(name, parameter), Normal(std))}
        )
        names = {"noise": f"{prefix}.{name}/noise"}
        initialize(holder, seed=seed, prefix="", tensor_rank=tensor_rank, names=names)
        with torch.no_grad():
            parameter.add_(noise)


def full_gradients(model: nn.Module, ctx: ParallelContext) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, merged over tensor ranks (collective)."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        shards = [parameter.grad]
        if ctx.tensor.size > 1:
            shards = [torch.empty_like(parameter.grad) for _ in range(ctx.tensor.size)]
            dist.all_gather(shards, parameter.grad.contiguous(), group=ctx.tensor.group)
        gradients[name] = merge(shards, sharding_of(name, parameter)).clone()
    return gradients


def run_cut(
    specs: Sequence[LayerSpec],
    model: SequentialModel,
    carry: Any,
    schema: Any,
    cuts: Sequence[int],
) -> Any:
    """The output of the last layer when the carry crosses the wire before the layers `cuts`."""
    bounds = [0, *sorted(cuts), len(specs)]
    for start, stop in itertools.pairwise(bounds):
        if start:
            layer = specs[start - 1].name
            wire = Wire(schema, after=layer)
            carry = wire.unpack(_sent(wire.pack(carry, layer=layer)))
        carry = run_layers(
            specs[start:stop],
            model.layers[start:stop],
            carry,
            model.ctx,
            recompute=model.recompute,
        )
    return carry


def _sent(packed: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Other buffers with the same bits, as a receive leaves them."""
    if isinstance(packed, Tensor):
        return packed.clone()
    return tuple(tensor.clone() for tensor in packed)
