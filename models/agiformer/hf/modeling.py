"""An AGIFORMER as a model of transformers."""

from __future__ import annotations

from torch import nn

from models.agiformer.config import AgiformerConfig
from models.agiformer.hf.config import AgiformerHFConfig
from models.agiformer.model import layer_specs, set_plasticity
from models.hf.modeling import FamilyForCausalLM
from parallel.carry import LayerSpec


class AgiformerForCausalLM(FamilyForCausalLM):
    """The layers of an AGIFORMER with `generate`, `from_pretrained` and `save_pretrained`.

    The layers' names are those of the project, under `model.`. The cache does not grow with the
    text. The loss is the cross entropy, without the ponder cost.
    """

    config: AgiformerHFConfig
    config_class = AgiformerHFConfig
    has_token_states = False  # a state belongs to a patch
    layers_take_any_length = False

    def layer_specs(self, settings: AgiformerConfig) -> list[LayerSpec]:
        return layer_specs(settings)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("encoder.tokens")

    def set_plasticity(self, alpha: float) -> None:
        """Set the plasticity of every memory, in (0, 1]; it is saved with the weights."""
        set_plasticity(self.model, alpha)
        self.config.plasticity = alpha
