"""An AMRPALlama as a model of transformers."""

from __future__ import annotations

from torch import Tensor

from models.amrpa.carry import AUX, AMRPAOutput
from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.hf.config import AMRPALlamaHFConfig
from models.amrpa.model import layer_specs
from models.hf.modeling import FamilyForCausalLM
from parallel.carry import LayerSpec


class AMRPALlamaForCausalLM(FamilyForCausalLM):
    """The layers of an AMRPALlama with `generate`, `from_pretrained` and `save_pretrained`.

    In training the loss holds the two losses of the memory, without padding. The layers' names are
    those of the project, under `model.`.
    """

    config: AMRPALlamaHFConfig
    config_class = AMRPALlamaHFConfig

    def layer_specs(self, settings: AMRPALlamaConfig) -> list[LayerSpec]:
        return layer_specs(settings)

    @property
    def has_auxiliary_loss(self) -> bool:
        return True

    def auxiliary_loss(self, output: AMRPAOutput) -> Tensor | None:
        """The weighted losses of the memory in training, per row [b]."""
        if not self.training:
            return None
        entries = dict(zip(AUX, output.aux.unbind(dim=-1), strict=True))
        diversity = self.config.diversity_weight * entries["diversity_loss"]
        return diversity + self.config.gate_reg_weight * entries["gate_loss"]
