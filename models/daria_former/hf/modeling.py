"""A Daria-Former as a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from models.daria_former.carry import DariaInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.hf.config import DariaFormerHFConfig
from models.daria_former.model import layer_specs
from models.hf.modeling import FamilyForCausalLM
from parallel.carry import LayerSpec


class DariaFormerForCausalLM(FamilyForCausalLM):
    """The layers of a Daria-Former with `generate`, `from_pretrained` and `save_pretrained`.

    The layers' names are those of the project, under `model.`. For generation they keep caches that
    do not grow, but for the keys and values of the long path.
    """

    config: DariaFormerHFConfig
    config_class = DariaFormerHFConfig
    layers_take_any_length = False

    def layer_specs(self, settings: DariaFormerConfig) -> list[LayerSpec]:
        return layer_specs(settings)

    def inputs(
        self, tokens: Tensor, given: Mapping[str, Tensor], lengths: Tensor | None = None
    ) -> DariaInputs:
        return DariaInputs(tokens, **given)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        images: Tensor | None = None,
        audio: Tensor | None = None,
        persona: Tensor | None = None,
        emotion_state: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, V] of `input_ids` [b, s]; see `FamilyForCausalLM.run`.

        `images` [b, c, height, width], `audio` log-mel [b, n_mels, frames], `persona`
        [b, persona_dim] in place of the learned one, `emotion_state` fp32 [b, E], which the first
        token continues.
        """
        given = {"images": images, "audio": audio, "persona": persona, "emotion": emotion_state}
        return self.run(
            input_ids,
            given,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            others=others,
        )
