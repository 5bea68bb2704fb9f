"""Daria-Former as a transformers model: `DariaFormerForCausalLM` and its configuration.

The entry of the exported `modeling_daria_former.py` (models.hf_bundle).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from models.daria_former.carry import DariaInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.specs import layer_specs
from models.hf_modeling import FamilyForCausalLM, FamilyPreTrainedConfig


class DariaFormerHFConfig(FamilyPreTrainedConfig):
    """`config.json` of a Daria-Former; `family_config` holds the settings of DariaFormerConfig."""

    model_type = "daria_former"
    family_config_class: ClassVar[Any] = DariaFormerConfig


class DariaFormerForCausalLM(FamilyForCausalLM):
    """Daria-Former with a language modelling head.

    `forward` also takes `images` [b, c, height, width], `audio` [b, n_mels, frames], `persona`
    [b, persona_dim] and `emotion` [b, emotion_dim].
    """

    config_class = DariaFormerHFConfig
    base_model_prefix = ""
    _no_split_modules: ClassVar[list[str]] = ["DACBlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "model.head.output.weight": "model.embedding.tokens.weight"
    }
    family_specs = staticmethod(layer_specs)

    @staticmethod
    def family_inputs(tokens: Tensor, segments: Tensor | None, **inputs: Any) -> DariaInputs:
        return DariaInputs(tokens, segments, **inputs)

    def get_input_embeddings(self) -> Any:
        return self.model.layers[0].tokens

    def set_input_embeddings(self, value: Any) -> None:
        raise ValueError("the vocabulary of a trained Daria-Former cannot be changed")
