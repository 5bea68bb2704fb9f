"""The model in one process, with the interface that was published."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import LossOutput
from models.daria_former.carry import DariaInputs, DariaOutput
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY
from models.daria_former.paths import Rotaries
from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from models.daria_former.standalone.memory_api import MemoryIntegrationSystem
from parallel.carry import SequentialModel
from parallel.context import ParallelContext

Cache = dict[str, Any]


class Outputs(TypedDict, total=False):
    """What a call returns, batch first: `logits` [b, s, V], `hidden_states` [b, s, h], `kv_cache`
    as it was given; on demand `emotion_state` [b, E] and `emotion_logits` [b, categories] after
    the last token."""

    logits: Tensor
    hidden_states: Tensor
    kv_cache: Cache | None
    emotion_state: Tensor
    emotion_logits: Tensor


class DariaFormerModel(nn.Module):
    """Every layer of the family in one process.

    Weights are drawn from torch's seed; names of parameters are those of a training run behind
    `body.`.
    """

    def __init__(self, config: DariaFormerConfig, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config.model_copy()  # which may be changed for the next model
        seed = torch.initial_seed() % (1 << 31)
        ctx = ParallelContext.single(device=device)
        self.body = SequentialModel(FAMILY.layer_specs(self.config), ctx, seed=seed)
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
        inputs = DariaInputs(
            input_ids, images=images, audio=audio, persona=persona, emotion=emotion_state
        )
        self._check(inputs, kv_cache)
        output = self.run(inputs, kv_cache)
        outputs: Outputs = {
            "logits": output.logits.transpose(0, 1),
            "hidden_states": output.hidden.transpose(0, 1),
            "kv_cache": kv_cache,
        }
        if return_emotion:
            outputs["emotion_state"] = output.emotion[-1]
            outputs["emotion_logits"] = F.linear(output.emotion[-1], self.head.category)
        return outputs

    def run(self, inputs: DariaInputs, kv_cache: Cache | None = None) -> DariaOutput:
        """The family's own output, sequence first, with what its losses need."""
        return self.body(inputs) if kv_cache is None else self.body(inputs, kv_cache)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        num_scored: Tensor | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """What a training run minimises, and its terms; `labels` int64 [b, s], -100: not scored.

        `num_scored`: what the sum over tokens is divided by (models.base.ModelFamily).
        """
        given = DariaInputs(input_ids, **inputs)
        self._check(given, None)
        output = self.run(given)
        return FAMILY.loss(
            output, labels, config=self.config, ctx=self.body.ctx, num_scored=num_scored
        )

    def count_parameters(self, trainable_only: bool = True) -> int:
        """How many numbers the model has; a tied head counts once."""
        counted = (p for p in self.parameters() if p.requires_grad or not trainable_only)
        return sum(parameter.numel() for parameter in counted)

    def gradient_checkpointing_enable(self) -> None:
        """Compute the blocks again in backward instead of keeping their activations."""
        self.body.recompute = True

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Empty state for a generation of up to `max_length` tokens, prompt included."""
        return self.body.new_cache(batch_size, max_length)

    def rollback(self, kv_cache: Cache, length: int) -> None:
        """Forget the tokens from number `length` on, as when a draft was refused.

        Raises:
            ValueError: more than `segment_len` tokens are taken back.
        """
        for layer in kv_cache.values():
            layer.rollback(length)

    def _check(self, inputs: DariaInputs, kv_cache: Cache | None) -> None:
        """Compare tokens with the vocabulary and the positions; layers check the other inputs.

        Raises:
            ValueError: says what the tokens are and what they must be.
        """
        tokens, config = inputs.tokens, self.config
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(
                f"input_ids {str(tokens.dtype).removeprefix('torch.')}{list(tokens.shape)} must be "
                "int64[batch, tokens >= 1]"
            )
        # Looking costs nothing on the host, and a wait for the device elsewhere.
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < (
            config.vocab_size
        ):
            raise ValueError(
                f"input_ids hold {int(tokens.min())} ... {int(tokens.max())}, and the model has "
                f"vocab_size={config.vocab_size} tokens from 0; use the tokenizer of its data"
            )
        seen = 0 if kv_cache is None else kv_cache["embedding"].emotion.length
        check_length(seen + tokens.shape[1], config)

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
        """The update sites of the emotion state, in their order; the first reads the embedding."""
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
