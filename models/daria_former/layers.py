"""The layers of a Daria-Former: embedding, DAC block, head.

Shapes: s sequence, b batch, h hidden, E emotion, n heads, P paths, V vocabulary, t tensor size.
Between layers activations are [s, b, .], or [s/t, b, .] under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import TokenInputs
from models.common.counter_rng import dropout, next_layer, normal, prefix_keys
from models.common.decoder import embed_tokens
from models.common.history import History
from models.common.init import replicated, residual_output
from models.common.norms import RMSNorm
from models.daria_former.adapters import adapted_block
from models.daria_former.attention import MultiContextAttention
from models.daria_former.cache import BlockCache, EmbeddingCache
from models.daria_former.carry import AUX, DariaCarry, DariaInputs, DariaOutput
from models.daria_former.config import DariaFormerConfig
from models.daria_former.emotion import EmotionExpressionLayer
from models.daria_former.encoders import ModalityEncoder
from models.daria_former.losses import (
    block_measurements,
    emotion_smoothness,
    emotion_variance,
    repetition,
    with_entries,
)
from models.daria_former.modulation import (
    ZERO,
    AdaptiveNorm,
    ConversationRhythmLayer,
    EmotionModulatedFFN,
    ResidualFusion,
    RhythmGate,
)
from models.daria_former.paths import Rotaries, Sources
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_logits
from parallel.layers import VocabParallelEmbedding, VocabParallelHead
from parallel.precision import at_least_fp32
from parallel.regions import gather_sequence, local_sequence
from parallel.sharding import Normal


class ContextRouter(nn.Module):
    """Gate priors of every block's paths, and the segment logit, which weighs a token when it is
    pooled into memory: `W norm(x) + b` per token of the embedding.

    [s/t, b, h] -> fp32 [s, b, num_priors], whole on every tensor rank; with the memory path the
    last channel is the segment logit. Causal by construction: no token looks at another. It starts
    at 0.
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        size = config.num_priors
        self.norm = RMSNorm(config.hidden_dim, eps=config.norm_eps, ctx=ctx)
        self.weight = replicated((size, config.hidden_dim), ZERO, ctx)
        self.bias = replicated((size,), ZERO, ctx)

    def forward(self, x: Tensor) -> Tensor:
        priors = at_least_fp32(F.linear(self.norm(x), self.weight, self.bias))
        return gather_sequence(priors, ctx=self.ctx)


class DariaEmbedding(nn.Module):
    """The first layer: builds the carry from the inputs.

    The hidden state is the token table's row; from it come the router's priors and the first
    emotion state. The bank holds the learned slots that all blocks project for themselves:
    persistent memory, and the persona, `slots + W_p p` with p given or learned.
    """

    def __init__(self, config: DariaFormerConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx, self.segmented = config, ctx, segmented
        hidden, init = config.hidden_dim, Normal(config.initializer_range)
        self.tokens = VocabParallelEmbedding(config.vocab_size, hidden, ctx=ctx, init=init)
        self.router = ContextRouter(config, ctx=ctx) if config.num_priors else None
        self.emotion = EmotionExpressionLayer(config, is_first=True, ctx=ctx)
        if config.has("memory") and config.persistent_memory_slots:
            self.persistent = replicated((2 * config.persistent_memory_slots, hidden), init, ctx)
        if config.has("persona"):
            self.persona_slots = replicated((config.persona_memory_slots, hidden), init, ctx)
            self.persona = replicated((config.persona_dim,), Normal(1.0), ctx)
            self.persona_projection = replicated((hidden, config.persona_dim), ZERO, ctx)
        if config.modality_enabled:
            self.encoder = ModalityEncoder(config, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> EmbeddingCache:
        """Empty state for generation."""
        return EmbeddingCache(max_rollback=self.config.segment_len)

    def forward(
        self, inputs: TokenInputs | DariaInputs, cache: EmbeddingCache | None = None
    ) -> DariaCarry:
        given = inputs if isinstance(inputs, DariaInputs) else DariaInputs(*inputs)
        _check_vectors(given, self.config)
        if cache is not None:
            optional = ("images", "audio", "persona", "emotion")
            cache.check_given(frozenset(x for x in optional if getattr(given, x) is not None))
        hidden, positions = embed_tokens(self.tokens, given, segmented=self.segmented)
        noisy = self.config.is_noisy and cache is None
        return DariaCarry(
            hidden=hidden,
            emotion=self.emotion(
                hidden,
                previous=None,
                starts=document_starts(positions),
                initial=given.emotion,
                history=None if cache is None else cache.emotion,
            ),
            priors=None if self.router is None else self.router(hidden),
            aux=torch.zeros(given.tokens.shape[0], len(AUX), device=hidden.device),
            bank=self._bank(given, cache),
            modality=self._modality(given, cache),
            positions=positions,
            keys=prefix_keys(given.tokens, positions) if noisy else None,
        )

    def persona_bank(self, persona: Tensor) -> Tensor:
        """`slots + W_p p`, [m, b or 1, h], of a persona [b or 1, persona_dim]."""
        offset = F.linear(persona.to(self.persona_slots.dtype), self.persona_projection)
        return self.persona_slots.unsqueeze(1) + offset

    def _bank(self, given: DariaInputs, cache: EmbeddingCache | None) -> Tensor | None:
        if cache is not None and cache.bank is not None:
            return cache.bank
        parts = []
        if hasattr(self, "persistent"):
            parts.append(self.persistent.unsqueeze(1))
        if hasattr(self, "persona_slots"):
            persona = self.persona.unsqueeze(0) if given.persona is None else given.persona
            parts.append(self.persona_bank(persona))
        elif given.persona is not None:
            raise ValueError(
                "persona was given to a model without the persona path; add persona to paths of "
                "its configuration before building it"
            )
        batch = max([1, *(part.shape[1] for part in parts)])
        bank = torch.cat([part.expand(-1, batch, -1) for part in parts]) if parts else None
        if cache is not None:
            cache.bank = bank
        return bank

    def _modality(self, given: DariaInputs, cache: EmbeddingCache | None) -> Tensor | None:
        if cache is not None and cache.modality is not None:
            return cache.modality
        if not self.config.modality_enabled:
            if given.images is not None or given.audio is not None:
                raise ValueError(
                    "images or audio were given to a model without them; set image_enabled or "
                    "audio_enabled of its configuration before building it"
                )
            return None
        encoded: Tensor | None = self.encoder(given.images, given.audio, given.tokens.shape[0])
        if cache is not None:
            cache.modality = encoded
        return encoded


class DACBlock(nn.Module):
    """One block.

        a = (1 + tanh(w e)) attention(norm_1(x, e))
        f = ffn(norm_2(x + a, e), e)
        u = fusion(a, f, x)
        x = x + rhythm(u) * u

    and, in some blocks, an update of the emotion state e from x. At its initial gates it is a
    pre-norm block, x + a + ffn(norm(x + a)), to about 1 %.
    """

    def __init__(
        self,
        config: DariaFormerConfig,
        *,
        updates_emotion: bool,
        is_last: bool,
        rotaries: Rotaries,
        ctx: ParallelContext,
    ) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        self.is_last = is_last
        output_init = residual_output(config.initializer_range, num_layers=config.num_layers)
        self.attention_norm = AdaptiveNorm(config, ctx=ctx)
        self.attention = MultiContextAttention(
            config, rotaries=rotaries, output_init=output_init, ctx=ctx
        )
        self.attention_scale = replicated((1, config.emotion_dim), ZERO, ctx)
        self.ffn_norm = AdaptiveNorm(config, ctx=ctx)
        self.ffn = EmotionModulatedFFN(config, output_init=output_init, ctx=ctx)
        self.fusion = ResidualFusion(config, ctx=ctx)
        self.rhythm = RhythmGate(config, ctx=ctx)
        self.emotion = EmotionExpressionLayer(config, ctx=ctx) if updates_emotion else None
        self.lora = adapted_block(self) if config.lora_rank else None

    def new_cache(self, batch_size: int, max_length: int) -> BlockCache:
        """Empty state for generation."""
        emotion = None if self.emotion is None else History(self.config.segment_len + 1)
        return self.attention.new_cache(batch_size, max_length, emotion=emotion)

    def forward(self, carry: DariaCarry, cache: BlockCache | None = None) -> DariaCarry:
        x, own = carry.hidden, local_sequence(carry.emotion, ctx=self.ctx)
        sources = Sources(carry.priors, carry.bank, carry.modality, carry.positions, carry.keys)
        strength = 1.0 + F.linear(carry.emotion, at_least_fp32(self.attention_scale)).tanh()
        attended = self.attention(self.attention_norm(x, own), sources, strength, cache)
        a = self._dropped(attended.output, carry, stream=1)
        f = self.ffn(self.ffn_norm(x + a, own), carry.emotion)
        u = self.fusion(a, self._dropped(f, carry, stream=2), x)
        x = self.rhythm(x, u)
        emotion = carry.emotion
        if self.emotion is not None:
            emotion = self.emotion(
                x,
                previous=emotion,
                starts=document_starts(carry.positions),
                history=None if cache is None else cache.emotion,
            )
        aux = carry.aux
        if self.training and cache is None:
            aux = aux + block_measurements(
                attended, x, self.attention, config=self.config, is_last=self.is_last, ctx=self.ctx
            )
        keys = None if carry.keys is None else next_layer(carry.keys)
        return carry._replace(hidden=x, emotion=emotion, aux=aux, keys=keys)

    def _dropped(self, x: Tensor, carry: DariaCarry, *, stream: int) -> Tensor:
        if not self.training or self.config.dropout == 0 or carry.keys is None:
            return x
        keys = local_sequence(carry.keys.T, ctx=self.ctx)
        return dropout(x, keys, self.config.dropout, stream=stream)


class DariaHead(nn.Module):
    """Logits over this rank's part of the vocabulary, [s, b, ceil(V/t)].

        y = norm(x) + W_s e + C^T softmax(W_c e)         style of the state and of its category
        logits = W rhythm(y) / T,                        T = 1 + tanh(w_T e) / 2

    The temperature is part of the model, in training as in generation, so that its likelihood is
    exact; a sampler must not apply it again.
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        hidden, emotion = config.hidden_dim, config.emotion_dim
        init = Normal(config.initializer_range)
        self.norm = RMSNorm(hidden, eps=config.norm_eps, ctx=ctx)
        self.style = replicated((hidden, emotion), ZERO, ctx)
        self.category = replicated((config.emotion_categories, emotion), init, ctx)
        self.category_style = replicated((hidden, config.emotion_categories), ZERO, ctx)
        self.rhythm = ConversationRhythmLayer(config, ctx=ctx)
        self.temperature = replicated((1, emotion), ZERO, ctx)
        self.output = VocabParallelHead(config.vocab_size, hidden, ctx=ctx, init=init)

    def forward(self, carry: DariaCarry) -> DariaOutput:
        x = carry.hidden
        own = local_sequence(carry.emotion, ctx=self.ctx).to(x.dtype)
        y = self.norm(x) + F.linear(own, self.style)
        mood = F.linear(own, self.category).softmax(dim=-1)
        y = self.rhythm(y + F.linear(mood, self.category_style), self._noise(carry))
        temperature = 1.0 + 0.5 * F.linear(own, self.temperature).tanh()
        # Dividing the input of a linear layer divides its output, which is V / h times as large.
        logits = vocab_logits(self.output, y / temperature)
        aux = carry.aux
        if self.training:
            aux = aux + with_entries(
                emotion_loss=emotion_smoothness(carry.emotion, carry.positions, ctx=self.ctx),
                repetition_loss=repetition(y, carry.positions, ctx=self.ctx),
                emotion_variance=emotion_variance(carry.emotion),
            )
        return DariaOutput(logits, aux, y, carry.emotion)

    def _noise(self, carry: DariaCarry) -> Tensor | None:
        if not self.training or self.config.rhythm_noise_std == 0 or carry.keys is None:
            return None
        keys = local_sequence(carry.keys.T, ctx=self.ctx)
        return normal(keys, self.config.hidden_dim, stream=0)


def _check_vectors(given: DariaInputs, config: DariaFormerConfig) -> None:
    """Refuse a persona or an emotion state that is not one vector for every row, or for all."""
    for name, size in (("persona", config.persona_dim), ("emotion", config.emotion_dim)):
        value, rows = getattr(given, name), given.tokens.shape[0]
        if value is not None and tuple(value.shape) not in ((rows, size), (1, size)):
            raise ValueError(
                f"{name} of shape {list(value.shape)} with {rows} rows of tokens must be "
                f"[{rows}, {size}] ({name}_dim); give one vector for every row"
            )


def document_starts(positions: Tensor | None) -> Tensor | None:
    """bool [s, b]: tokens that begin a document, from positions [b, s]."""
    return None if positions is None else positions.T == 0
