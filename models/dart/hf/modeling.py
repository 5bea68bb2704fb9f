"""A DART as a model of transformers."""

from __future__ import annotations

from torch import nn

from models.dart.config import DARTConfig
from models.dart.hf.config import DARTHFConfig
from models.dart.layers import DARTPair
from models.dart.model import layer_specs
from models.hf.arguments import StateReader
from models.hf.modeling import FamilyForCausalLM
from parallel.carry import LayerSpec


class DARTForCausalLM(FamilyForCausalLM):
    """The layers of a DART with `generate`, `from_pretrained` and `save_pretrained`.

    `generate` and the loss are those of the causal stream, which reads a plan of every block; the
    hidden states are those of the blocks in their order, in `trunk="dual"` a diffusion block and a
    causal one by turns. The layers' names are those of the project, under `model.`.
    """

    config: DARTHFConfig
    config_class = DARTHFConfig

    def layer_specs(self, settings: DARTConfig) -> list[LayerSpec]:
        return layer_specs(settings)

    def readers_of(self, layer: nn.Module) -> list[StateReader]:
        """Of the pair's diffusion block, where it is a layer of its own, and of the causal one."""
        causal = super().readers_of(layer)
        if not isinstance(layer, DARTPair) or layer.diffusion is None:
            return causal
        return [StateReader(layer, lambda arguments, output: output.noised), *causal]

    def state_readers(self) -> list[StateReader]:
        """As in `FamilyForCausalLM`; the head's projection serves both streams, its norm one."""
        norm = self.model.get_submodule("head.norm")
        return [*super().state_readers()[:-1], StateReader(norm, lambda arguments, output: output)]
