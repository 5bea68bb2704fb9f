"""The model in one process, with the published interface."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.daria_former.carry import DariaInputs, DariaOutput
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY
from models.daria_former.paths import Rotaries
from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from models.daria_former.standalone.memory_api import MemoryIntegrationSystem
from models.standalone.model import Cache, StandaloneModel, check_tokens


class Outputs(TypedDict, total=False):
    """Outputs of a call, batch first: `logits` [b, s, V], `hidden_states` [b, s, h], `kv_cache`
    as it was given; on demand `emotion_state` [b, E] and `emotion_logits` [b, categories] after
    the last token."""

    logits: Tensor
    hidden_states: Tensor
    kv_cache: Cache | None
    emotion_state: Tensor
    emotion_logits: Tensor


class DariaFormerModel(StandaloneModel):
    """Every layer of the family in one process."""

    optional_inputs = ("images", "audio", "persona")

    def __init__(self, config: DariaFormerConfig, *, device: torch.device | str = "cpu") -> None:
        super().__init__(FAMILY, config, device=device)
        self.variability = ReactionVariabilitySystem(self.config).to(device)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        audio: Tensor | None = None,
        emotion_state: Tensor | None = None,
        kv_cache: Cache | None = None,
        return_emotion: bool = False,
        persona: Tensor | None = None,
    ) -> Outputs:
        """Logits of `input_ids` int64 [b, s], which continue those that `kv_cache` has seen.

        `images` [b, c, height, width], `audio` log-mel [b, n_mels, frames], `persona`
        [b, persona_dim]; with a cache they are given once. `emotion_state` [b, E]: what the first
        update site continues.

        Raises:
            ValueError: an input that the model does not have or of a wrong shape, or a context
                beyond `max_seq_len`.
        """
        inputs = self.make_inputs(
            input_ids, kv_cache, images=images, audio=audio, persona=persona, emotion=emotion_state
        )
        output: DariaOutput = self.body(inputs, kv_cache)
        outputs: Outputs = {
            "logits": output.logits.transpose(0, 1),
            "hidden_states": output.hidden.transpose(0, 1),
            "kv_cache": kv_cache,
        }
        if return_emotion:
            outputs["emotion_state"] = output.emotion[-1]
            outputs["emotion_logits"] = F.linear(output.emotion[-1], self.head.category)
        return outputs

    def make_inputs(
        self, input_ids: Tensor, kv_cache: Cache | None = None, **optional: Any
    ) -> DariaInputs:
        """Build the first layer's inputs; layers check the optional ones.

        Raises:
            ValueError: tokens outside the vocabulary or beyond `max_seq_len`.
        """
        check_tokens(input_ids, vocab_size=self.config.vocab_size)
        seen = 0 if kv_cache is None else kv_cache["embedding"].emotion.length
        check_length(seen + input_ids.shape[1], self.config)
        return DariaInputs(input_ids, **optional)

    # Parts, by their published names.

    @property
    def embedding(self) -> Any:
        return self.body.layers[0]

    @property
    def layers(self) -> list[nn.Module]:
        return self.body.layers[1:-1]

    @property
    def head(self) -> Any:
        return self.body.layers[-1]

    @property
    def text_encoder(self) -> nn.Module:
        return self.embedding.tokens

    @property
    def rope(self) -> Rotaries:
        return self.layers[0].attention.rotaries  # type: ignore[union-attr, return-value]

    @property
    def emotion(self) -> list[nn.Module]:
        """The update sites of the emotion state, in order; the first one reads the embedding."""
        sites = (layer.emotion for layer in self.body.layers[:-1])
        return [site for site in sites if isinstance(site, nn.Module)]

    @property
    def memory(self) -> MemoryIntegrationSystem:
        return MemoryIntegrationSystem(self)

    @property
    def context_router(self) -> nn.Module | None:
        """None where a block has one path and no memory, and so nothing to route."""
        return self.embedding.router

    @property
    def image_encoder(self) -> nn.Module | None:
        return self.embedding.encoder.image if self.config.image_enabled else None

    @property
    def audio_encoder(self) -> nn.Module | None:
        return self.embedding.encoder.audio if self.config.audio_enabled else None

    @property
    def final_norm(self) -> nn.Module:
        return self.head.norm

    @property
    def rhythm(self) -> nn.Module:
        return self.head.rhythm

    @property
    def lm_head(self) -> nn.Module:
        return self.head.output


def check_length(length: int, config: DariaFormerConfig) -> None:
    """Compare the length of a text, in tokens, with what positions there are.

    Raises:
        ValueError: it is too long.
    """
    if length > config.max_seq_len:
        raise ValueError(
            f"a text of {length} tokens is longer than max_seq_len={config.max_seq_len}; shorten "
            "it, or raise max_seq_len of the configuration"
        )
