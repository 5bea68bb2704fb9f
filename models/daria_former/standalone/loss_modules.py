"""The losses of training (models.daria_former.losses) as modules over tensors, batch first.

Every row of the given batch counts the same.
Shapes: b batch, s sequence, h hidden, E emotion, C categories, c segments, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.daria_former.config import DariaFormerConfig
from models.daria_former.losses import cosine_distance, emotion_smoothness, repetition
from models.daria_former.model import rhythm_regularizer
from parallel.context import ParallelContext
from parallel.cross_entropy import (
    IGNORED_LABEL,
    cross_entropy_and_entropy,
    vocab_parallel_entropy,
)

_SINGLE = ParallelContext.single()
# Weight of smoothness relative to the cross entropy of labels.
_SMOOTHNESS_WITH_LABELS = 0.1


class EmotionAlignmentLoss(nn.Module):
    """`mean |e_t - e_{t-1}|^2`; with labels `CE(W_c e, label)` and a tenth of it.

    States are `emotions` [b, s, E] of every token, or `prev_esv` and `curr_esv`, [b, E] or
    [b, s, E], of two moments; `emotion_logits` [b, C] and `emotion_labels` int64 [b].

    Raises:
        ValueError: one of two tensors that belong together is missing.
    """

    def forward(
        self,
        *,
        emotions: Tensor | None = None,
        prev_esv: Tensor | None = None,
        curr_esv: Tensor | None = None,
        emotion_logits: Tensor | None = None,
        emotion_labels: Tensor | None = None,
    ) -> Tensor:
        _check_together(prev_esv=prev_esv, curr_esv=curr_esv)
        if emotion_labels is not None:
            _check_together(emotion_logits=emotion_logits, emotion_labels=emotion_labels)
        states = [] if emotions is None else [emotions.transpose(0, 1)]
        if prev_esv is not None and curr_esv is not None:
            states.append(torch.stack((prev_esv, curr_esv)).flatten(1, -2))
        terms = [emotion_smoothness(state, None, ctx=_SINGLE).mean() for state in states]
        if emotion_labels is None or emotion_logits is None:
            return _sum(terms)
        alignment = F.cross_entropy(emotion_logits, emotion_labels)
        return _sum([alignment, *(_SMOOTHNESS_WITH_LABELS * term for term in terms)])


class RepetitionPenaltyLoss(nn.Module):
    """`mean_t relu(cos(y_t, y_{t+1}) - 0.9)` of hidden states [b, s, h]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return repetition(hidden_states.transpose(0, 1), None, ctx=_SINGLE).mean()


class RhythmRegularizer(nn.Module):
    """`mean_b relu(v - Var_t(entropy_t))` of logits [b, s, V], v `rhythm_target_var` in nats^2."""

    def __init__(self, target_var: float = 1.0) -> None:
        super().__init__()
        self.target_var = target_var

    def forward(self, logits: Tensor) -> Tensor:
        entropies = vocab_parallel_entropy(logits.transpose(0, 1), ctx=_SINGLE)
        return rhythm_regularizer(entropies, self.target_var).mean()


class MemoryConsistencyLoss(nn.Module):
    """`mean_c (1 - cos(m_c, h_c))` of memory readouts and hidden states of segments, [b, c, h].

    The target gets no gradient.
    """

    def forward(self, memory_readout: Tensor, memory_target: Tensor) -> Tensor:
        return cosine_distance(memory_readout, memory_target.detach()).mean()


class DariaFormerLoss(nn.Module):
    """The cross entropy and the other losses whose tensors are given, weighted by the
    configuration. A training run minimises `DariaFormerModel.loss`.

    Raises:
        ValueError: one of two tensors that belong together is missing.
    """

    def __init__(self, config: DariaFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.emotion = EmotionAlignmentLoss()
        self.repetition = RepetitionPenaltyLoss()
        self.memory = MemoryConsistencyLoss()

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        hidden_states: Tensor | None = None,
        emotion_logits: Tensor | None = None,
        emotion_labels: Tensor | None = None,
        prev_esv: Tensor | None = None,
        curr_esv: Tensor | None = None,
        emotions: Tensor | None = None,
        memory_readout: Tensor | None = None,
        memory_target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`logits` [b, s, V], `labels` int64 [b, s], the token after each (-100: not scored); the
        others as for the losses above. Returns `loss` and every term, 0 without its tensors."""
        losses, entropies = cross_entropy_and_entropy(logits.transpose(0, 1), labels, ctx=_SINGLE)
        zero = losses.new_zeros(())
        terms = {
            "ce_loss": losses.sum() / (labels != IGNORED_LABEL).sum().clamp(min=1),
            "emotion_loss": self.emotion(
                emotions=emotions,
                prev_esv=prev_esv,
                curr_esv=curr_esv,
                emotion_logits=emotion_logits,
                emotion_labels=emotion_labels,
            ).to(zero),
            "repetition_loss": zero,
            "rhythm_loss": rhythm_regularizer(entropies, self.config.rhythm_target_var).mean(),
            "memory_loss": zero,
        }
        if hidden_states is not None:
            terms["repetition_loss"] = self.repetition(hidden_states)
        _check_together(memory_readout=memory_readout, memory_target=memory_target)
        if memory_readout is not None:
            terms["memory_loss"] = self.memory(memory_readout, memory_target)
        total = terms["ce_loss"]
        for name in ("emotion", "repetition", "rhythm", "memory"):
            total = total + getattr(self.config, f"{name}_loss_weight") * terms[f"{name}_loss"]
        return {"loss": total, **terms}


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _check_together(**pair: Tensor | None) -> None:
    missing = [name for name, tensor in pair.items() if tensor is None]
    if len(missing) == 1:
        given = next(name for name in pair if name != missing[0])
        raise ValueError(f"{given} was given without {missing[0]}; give both or neither")
