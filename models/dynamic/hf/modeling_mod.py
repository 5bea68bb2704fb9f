"""A model of the family mod as a model of transformers."""

from __future__ import annotations

from models.dynamic.carry import MOD_AUX
from models.dynamic.config import MoDConfig
from models.dynamic.hf.config_mod import MoDHFConfig
from models.dynamic.hf.modeling import BaseDynamicCausalLM
from models.dynamic.model import mod_layer_specs
from parallel.carry import LayerSpec


class MoDForCausalLM(BaseDynamicCausalLM):
    """The layers of the family mod behind the interface of transformers."""

    config_class = MoDHFConfig
    aux_names = MOD_AUX

    def setup_dynamic_layers(self, settings: MoDConfig) -> list[LayerSpec]:
        return mod_layer_specs(settings)
