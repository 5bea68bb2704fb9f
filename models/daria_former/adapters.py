"""Low-rank adapters inside a block (arXiv 2106.09685): several on one layer, each with a weight.

A weight is a number, or follows what a token is about: the emotion state, or the persona given.
The linear layer's own parameters keep their names, so that a model with adapters is a plain model
and `*.lora.*`.

Shapes: s sequence, b batch, r rank, m slots, E emotion, p persona, t tensor size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.daria_former.config import LORA_TARGETS
from models.daria_former.counter_rng import dropout
from parallel.context import ParallelContext
from parallel.precision import at_least_fp32
from parallel.regions import enter_tensor_region, gather_sequence, leave_tensor_region
from parallel.sharding import Constant, Normal, Sharding, declare, declare_replicated

PRIMARY = "primary"
# What the weight of an adapter may follow instead of being a number.
FOLLOWED = ("esv", "persona")

# The stream of a block's noise that its adapters draw from, and how many channels each layer has.
_DROPOUT_STREAM = 3
_DROPOUT_CHANNELS = 1 << 24


class LowRank(nn.Module):
    """`w (alpha / r) B A x` with A [r, in] Kaiming-uniform and B [out, r] zero, for one layer.

    With a column-parallel layer A is whole on every tensor rank and B is cut like W; with a
    row-parallel one A is cut like W and B is whole, and the result is this rank's part of a sum.
    Either way a rank sees only a part of the gradient of the whole matrix, also without sequence
    parallelism.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(f"LoRA rank={rank}, alpha={alpha}: both must be positive")
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
    """What the adapters of a block need to know of the call under way.

    `weights`: of the adapters that follow something, fp32 [s or 1, b or 1, 1], ready for what a
    tensor rank computes alone. `keys` int64 [s, b]: what dropout is drawn from.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.keys: Tensor | None = None
        self.is_noisy = True


class LoRALinear(nn.Module):
    """`y = W x + s_0 B_0 A_0 dropout(x) + sum_n w_n s_n B_n A_n x`, `s = alpha / r`.

    Takes the place of a linear layer and its parameters. The primary adapter (0) is always on, the
    others (n) are those of `active`. An adapter that follows the emotion state acts on tokens only:
    learned slots and encoded images, which all tokens share, have no state. The same holds for
    dropout.

    Stands in for a column- or row-parallel layer of parallel.layers, with the same collectives:
    the input is gathered for all products at once, and a row-parallel sum is taken once.

    Raises:
        ValueError: the layer is no nn.Linear, such as those of Transformer Engine under FP8.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise ValueError(
                f"LoRA around a {type(base).__module__}.{type(base).__name__} is not possible, "
                "only around torch's linear layers; with precision=fp8 use lora_rank=0"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA dropout={dropout} must be at least 0 and less than 1")
        self.ctx: ParallelContext = getattr(base, "ctx", None) or ParallelContext.single()
        self.is_row = _sharding(base.weight).dim == 1
        self.dropout = dropout
        self.register_parameter("weight", base.get_parameter("weight"))
        self.register_parameter("bias", getattr(base, "bias", None))
        self.lora = nn.ModuleDict({PRIMARY: LowRank(base.weight, rank=rank, alpha=alpha)})
        self.active: dict[str, float | str] = {PRIMARY: 1.0}
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
            x = enter_tensor_region(gather_sequence(x, ctx=self.ctx), ctx=self.ctx)
            return self._product(x, per_token=per_token)
        y = leave_tensor_region(self._product(x, per_token=per_token), ctx=self.ctx)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor, *, per_token: bool) -> Tensor:
        """Without collectives, and of a row-parallel layer without its bias."""
        y = F.linear(x, self.weight, None if self.is_row else self.bias)
        if self.is_merged:
            return y
        for name, weight in self.active.items():
            if weight == "esv" and not per_token:
                continue
            known = self.conditions.weights[name] if isinstance(weight, str) else weight
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
            if isinstance(weight, str):
                raise ValueError(
                    f"adapter {name!r} follows {weight!r}, another weight for every token, and "
                    "cannot be merged; deactivate it, or activate it with a number"
                )
            total = total + weight * self.lora[name].product()  # type: ignore[operator]
        original = self.weight.detach().clone()
        self.weight.copy_(total)
        self._original = (original, self.weight._version)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The reverse of `merge`, bit for bit.

        Raises:
            ValueError: the weight was trained or loaded in between, which would be lost.
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
        """The linear layer that was wrapped, with the present weight and without adapters."""
        base = self._base[0]
        base.register_parameter("weight", self.get_parameter("weight"))
        base.register_parameter("bias", self._parameters["bias"])
        return base.train(self.training)


class BlockAdapters(nn.Module):
    """What the adapters of one block share: the weights of those that follow something.

        esv:      w_t = clamp(kappa . e_t, 0, 1)    e: the emotion state that enters the block
        persona:  w = sigmoid(kappa . p)            p: the persona given, or the learned one

    kappa is learned, one per adapter and block: blocks after different update sites see different
    emotion states. It starts at N(0, 1) for esv, where 0 would never train (B is 0, too), and at 0,
    half strength, for persona. Hooks on the block keep `conditions` filled during its forward pass.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        config: Any = block.config
        self.ctx: Any = block.ctx
        self.sizes = {"esv": config.emotion_dim, "persona": config.persona_dim}
        self.esv, self.persona = nn.ParameterDict(), nn.ParameterDict()
        self.conditions = Conditions()
        self.given_persona: Tensor | None = None  # [b or 1, p], set by the manager
        self.following: dict[str, str] = {}  # active adapter -> what its weight follows
        self._hooks = (
            block.register_forward_pre_hook(self._enter),
            block.register_forward_hook(self._leave, always_call=True),
        )

    def bind(self, block: nn.Module) -> None:
        """Make the block's adapted layers read `conditions`."""
        for number, (_, layer) in enumerate(named_targets(block, LORA_TARGETS)):
            if isinstance(layer, LoRALinear):
                layer.number, layer.conditions = number, self.conditions

    def learn_to_follow(self, name: str, kind: str, *, like: Tensor) -> nn.Parameter | None:
        """Add the kappa of an adapter; None where there is one already."""
        kappas = getattr(self, kind)
        if name in kappas:
            return None
        kappa = nn.Parameter(like.new_empty(self.sizes[kind]))
        init = Normal(1.0) if kind == "esv" else Constant(0.0)
        kappas[name] = declare_replicated(kappa, init, ctx=self.ctx)
        return kappas[name]

    def detach(self) -> None:
        """Remove the hooks from the block."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        carry, conditions = args[0], self.conditions
        conditions.keys = None if carry.keys is None else carry.keys.T
        conditions.is_noisy = len(args) < 2 or args[1] is None
        for name, kind in self.following.items():
            if kind == "esv":
                weight = (
                    (carry.emotion @ at_least_fp32(self.esv[name])).clamp(0.0, 1.0).unsqueeze(-1)
                )
            else:
                assert self.given_persona is not None
                kappa = at_least_fp32(self.persona[name])
                logits = self.given_persona.to(kappa.dtype) @ kappa
                weight = logits.sigmoid().view(1, -1, 1)
            conditions.weights[name] = enter_tensor_region(weight, ctx=self.ctx)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.conditions.weights.clear()  # they hold the graph of the pass
        self.conditions.keys = None


class Target(NamedTuple):
    """A linear layer that adapters may be put around, or are: its name, and the layer."""

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


def adapted_block(block: nn.Module) -> BlockAdapters:
    """Build the primary adapter of a configuration into a block that has just been built."""
    config: Any = block.config
    wrap(
        block,
        config.lora_targets,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
    )
    adapters = BlockAdapters(block)
    adapters.bind(block)
    return adapters


def _sharding(weight: Tensor) -> Sharding:
    return getattr(weight, "sharding", Sharding())


def _kaiming_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
