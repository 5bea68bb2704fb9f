"""Adapters of a block, with weights that may be computed from the emotion state or the persona.

Shapes: s sequence, b batch, E emotion, p persona.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.common.lora.layers import ComputedWeight, Conditions, LoRALinear, named_targets, wrap
from models.daria_former.config import LORA_TARGETS
from parallel.precision import at_least_fp32
from parallel.regions import copy_to_tensor_region
from parallel.sharding import Constant, Normal, declare_replicated

# The computed adapter weights.
COMPUTED_WEIGHTS = {
    "esv": ComputedWeight("esv", per_token=True),
    "persona": ComputedWeight("persona", per_token=False),
}


class BlockAdapters(nn.Module):
    """Computed weights of the adapters of one block.

        esv:      w_t = clamp(kappa . e_t, 0, 1)    e: the emotion state that enters the block
        persona:  w = sigmoid(kappa . p)            p: the given or the learned persona

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
        self.computed: dict[str, str] = {}  # active adapter -> the kind of its computed weight
        self._hooks = (
            block.register_forward_pre_hook(self._enter),
            block.register_forward_hook(self._leave, always_call=True),
        )

    def share_conditions(self, block: nn.Module) -> None:
        """Make the block's adapted layers read `conditions`."""
        for number, (_, layer) in enumerate(named_targets(block, LORA_TARGETS)):
            if isinstance(layer, LoRALinear):
                layer.number, layer.conditions = number, self.conditions

    def add_kappa(self, name: str, kind: str, *, like: Tensor) -> nn.Parameter | None:
        """Add the kappa of an adapter; None if it has one already."""
        kappas = getattr(self, kind)
        if name in kappas:
            return None
        kappa = nn.Parameter(like.new_empty(self.sizes[kind]))
        init = Normal(1.0) if kind == "esv" else Constant(0.0)
        kappas[name] = declare_replicated(kappa, init, ctx=self.ctx)
        return kappas[name]

    def remove_hooks(self) -> None:
        """Remove the hooks from the block."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        carry, conditions = args[0], self.conditions
        conditions.keys = None if carry.keys is None else carry.keys.T
        conditions.is_noisy = len(args) < 2 or args[1] is None
        for name, kind in self.computed.items():
            if kind == "esv":
                kappa = at_least_fp32(self.esv[name])
                weight = (carry.emotion @ kappa).clamp(0.0, 1.0).unsqueeze(-1)
            else:
                assert self.given_persona is not None
                kappa = at_least_fp32(self.persona[name])
                weight = (self.given_persona.to(kappa.dtype) @ kappa).sigmoid().view(1, -1, 1)
            conditions.weights[name] = copy_to_tensor_region(weight, ctx=self.ctx)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.conditions.weights.clear()  # they hold the graph of the pass
        self.conditions.keys = None


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
    adapters.share_conditions(block)
    return adapters
