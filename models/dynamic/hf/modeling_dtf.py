"""A model of the family dtf as a model of transformers."""

from __future__ import annotations

from models.dynamic.carry import DTF_AUX
from models.dynamic.config import DTFConfig
from models.dynamic.hf.config_dtf import DTFHFConfig
from models.dynamic.hf.modeling import BaseDynamicCausalLM
from models.dynamic.model import dtf_layer_specs
from parallel.carry import LayerSpec


class DTFForCausalLM(BaseDynamicCausalLM):
    """The layers of the family dtf behind the interface of transformers."""

    config_class = DTFHFConfig
    aux_names = DTF_AUX

    def setup_dynamic_layers(self, settings: DTFConfig) -> list[LayerSpec]:
        return dtf_layer_specs(settings)
