"""Low-rank adapters of linear layers (arXiv 2106.09685): several per layer, each with a weight.

The weight of an adapter is a number, or a value that the family computes for every row or token.
The linear layer's own parameters keep their names, so that a model with adapters has the parameters
of the plain model and `*.lora.*`.

Shapes: s sequence, b batch, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.counter_rng import dropout
from parallel.context import ParallelContext
from parallel.regions import copy_to_tensor_region, gather_sequence, reduce_from_tensor_region
from parallel.sharding import Constant, Sharding, declare

PRIMARY = "primary"

# The stream of a block's noise that its adapters draw from, and how many channels each layer has.
_DROPOUT_STREAM = 3
_DROPOUT_CHANNELS = 1 << 24


class ComputedWeight(NamedTuple):
    """An adapter weight that the family computes in every call and puts into `Conditions`: one per
    row, or one per token (`per_token`)."""

    kind: str
    per_token: bool


class LowRank(nn.Module):
    """`w (alpha / r) B A x` with A [r, in] Kaiming-uniform and B [out, r] zero, for one layer.

    For a column-parallel layer A is replicated over tensor ranks and B is sharded like W; for a
    row-parallel one A is sharded like W and B is replicated, and the result is this rank's partial
    sum. Either way a rank has only a partial gradient of the replicated matrix, also without
    sequence parallelism.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(
                f"LoRA rank={rank} and alpha={alpha} must be positive and finite; choose larger "
                "ones"
            )
        self.rank, self.alpha = rank, alpha
        cut, whole = _sharding(weight), Sharding(partial_gradient=True)
        A, B = weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
        first, second = (cut, whole) if cut.dim == 1 else (whole, cut)
        self.A = declare(nn.Parameter(A), first, _kaiming_uniform)
        self.B = declare(nn.Parameter(B), second, Constant(0.0))

    def forward(self, x: Tensor, weight: float | Tensor, onto: Tensor) -> Tensor:
        """Added to `onto` [s, b, out] of x [s, b, in] (or [..., in] with a number as weight); a
        weight fp32 [s or 1, b or 1, 1]."""
        inner = F.linear(x, self.A)
        scale = self.alpha / self.rank * weight
        inner = inner * (scale.to(inner.dtype) if isinstance(scale, Tensor) else scale)
        if inner.shape[:-1] != onto.shape[:-1]:  # slots without rows, a weight for each row
            return onto + F.linear(inner, self.B)
        # One pass over the output instead of three.
        return torch.addmm(onto.flatten(0, -2), inner.flatten(0, -2), self.B.T).view_as(onto)

    def product(self) -> Tensor:
        """`(alpha / r) B A` in fp32 or better: what the adapter adds to W at weight 1."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.alpha / self.rank * (self.B.to(dtype) @ self.A.to(dtype))


class Conditions:
    """Inputs of a block's adapters for the current call.

    `weights`: the computed adapter weights, fp32 [s or 1, b or 1, 1], already passed into the
    tensor-parallel region. `keys` int64 [s, b]: the random keys for dropout.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.keys: Tensor | None = None
        self.is_noisy = True


class LoRALinear(nn.Module):
    """`y = W x + s_0 B_0 A_0 dropout(x) + sum_n w_n s_n B_n A_n x`, `s = alpha / r`.

    Takes the place of a linear layer and its parameters. The primary adapter (0) is always on, the
    others (n) are those of `active`. An adapter whose weight is one for every token acts on tokens
    only, not on inputs that all tokens share (`per_token=False`); the same holds for dropout.

    A drop-in for a column- or row-parallel layer of parallel.layers, with the same collectives: the
    input is gathered once for all products, and a row-parallel sum is reduced once.

    Raises:
        ValueError: the layer multiplies in FP8, which adapters would take out of it, or is no
            nn.Linear.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.ctx: ParallelContext = getattr(base, "ctx", None) or ParallelContext.single()
        if self.ctx.precision.is_fp8:
            raise ValueError(
                f"lora_rank={rank} with precision=fp8: adapters are beside products of torch, and "
                "the adapted layers would multiply in bf16; set lora_rank=0 or use precision=bf16"
            )
        if not isinstance(base, nn.Linear):
            raise ValueError(
                f"LoRA around a {type(base).__module__}.{type(base).__name__} is not possible, "
                "only around torch's linear layers; name other layers as targets"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA dropout={dropout} must be at least 0 and less than 1")
        self.is_row = _sharding(base.weight).dim == 1
        self.dropout = dropout
        self.register_parameter("weight", base.get_parameter("weight"))
        self.register_parameter("bias", getattr(base, "bias", None))
        self.lora = nn.ModuleDict({PRIMARY: LowRank(base.weight, rank=rank, alpha=alpha)})
        self.active: dict[str, float | ComputedWeight] = {PRIMARY: 1.0}
        self.conditions = Conditions()
        self.number = 0  # among the layers of its block that may be adapted
        self._original: tuple[Tensor, int] | None = None  # W before merging, version of W after
        self._base = (base,)  # in a tuple, so that it is no child

    @property
    def is_merged(self) -> bool:
        return self._original is not None

    def forward(self, x: Tensor, *, collectives: bool = True, per_token: bool = True) -> Tensor:
        if not collectives:
            return self._product(x, per_token=per_token)
        if not self.is_row:
            x = copy_to_tensor_region(gather_sequence(x, ctx=self.ctx), ctx=self.ctx)
            return self._product(x, per_token=per_token)
        y = reduce_from_tensor_region(self._product(x, per_token=per_token), ctx=self.ctx)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor, *, per_token: bool) -> Tensor:
        """The local product without collectives, and without the bias of a row-parallel layer."""
        y = F.linear(x, self.weight, None if self.is_row else self.bias)
        if self.is_merged:
            return y
        for name, weight in self.active.items():
            if isinstance(weight, ComputedWeight) and weight.per_token and not per_token:
                continue
            known = self.conditions.weights[name] if isinstance(weight, ComputedWeight) else weight
            given = self._dropped(x, per_token) if name == PRIMARY else x
            y = self.lora[name](given, known, y)
        return y

    def _dropped(self, x: Tensor, per_token: bool) -> Tensor:
        if not (self.dropout and self.training and per_token and self.conditions.is_noisy):
            return x
        if self.conditions.keys is None:  # not in a model whose carry has keys for noise
            return F.dropout(x, self.dropout)
        first = self.number * _DROPOUT_CHANNELS
        if self.is_row:
            first += self.ctx.tensor.rank * x.shape[-1]
        keys = self.conditions.keys
        return dropout(x, keys, self.dropout, stream=_DROPOUT_STREAM, first=first)

    @torch.no_grad()
    def merge(self) -> None:
        """Add every active adapter to W, of which a copy is kept until `unmerge`."""
        total = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        for name, weight in self.active.items():
            if isinstance(weight, ComputedWeight):
                raise ValueError(
                    f"adapter {name!r} has weight={weight.kind!r}, computed in every call, and only"
                    " a number can be merged; deactivate it, or activate it with a number"
                )
            total = total + weight * self.lora[name].product()  # type: ignore[operator]
        original = self.weight.detach().clone()
        self.weight.copy_(total)
        self._original = (original, self.weight._version)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`, bit for bit.

        Raises:
            ValueError: the weight was trained or loaded since, and unmerging would lose that.
        """
        assert self._original is not None
        original, version = self._original
        if self.weight._version != version:
            raise ValueError(
                "a weight was changed after its adapters were merged into it, and going back would "
                "lose that; unmerge before training or loading, or use strip()"
            )
        self.weight.copy_(original)
        self._original = None

    def unwrapped(self) -> nn.Linear:
        """The wrapped linear layer with its current weight, without adapters."""
        base = self._base[0]
        base.register_parameter("weight", self.get_parameter("weight"))
        base.register_parameter("bias", self._parameters["bias"])
        return base.train(self.training)


class Target(NamedTuple):
    """A linear layer with or without adapters, and its name."""

    name: str
    layer: Any


def named_targets(root: nn.Module, targets: Collection[str]) -> Iterator[Target]:
    """The linear layers of `root` whose last name is one of `targets`, adapted or not."""
    for name, module in root.named_modules():
        if name.rpartition(".")[2] in targets and hasattr(module, "weight"):
            yield Target(name, module)


def wrap(
    root: nn.Module, targets: Collection[str], *, rank: int, alpha: float, dropout: float
) -> list[Target]:
    """Put a LoRALinear around every target that has none; returns the new ones."""
    wrapped = []
    for name, layer in list(named_targets(root, targets)):
        if not isinstance(layer, LoRALinear):
            adapted = LoRALinear(layer, rank=rank, alpha=alpha, dropout=dropout)
            owner, _, last = name.rpartition(".")
            setattr(root.get_submodule(owner), last, adapted)
            wrapped.append(Target(name, adapted))
    return wrapped


def _sharding(weight: Tensor) -> Sharding:
    return getattr(weight, "sharding", Sharding())


def _kaiming_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
