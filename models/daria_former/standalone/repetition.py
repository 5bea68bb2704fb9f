"""Repetition control for generation: repeated text raises the temperature and lowers logits.

Shapes: b batch, t tokens so far, V vocabulary, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A multiplier of rolling hashes; products wrap around.
_BASE = 0x5851F42D4C957F2D


class RepetitionControl(nn.Module):
    """A logits processor that penalises repetition and templates; it has no trained parameters.

        T      = T_base (1 + (rep + sim) / 2)      rep: share of repeated n-grams,
                                                   sim: relu(cos(h_t, h_{t-1})) * weight
        logits = logits + bias - weight * count_v / t

    The counts act on the logits, so that greedy decoding changes, too. `bias` is 0 until
    `fit_anti_template`; it is a buffer, saved with the model.
    """

    def __init__(self, vocab_size: int, *, ngram: int, weight: float) -> None:
        super().__init__()
        self.ngram, self.weight = ngram, weight
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(vocab_size))

    @torch.no_grad()
    def fit_anti_template(self, token_counts: Tensor) -> None:
        """Lower the logits of tokens that a corpus of templates overuses: counts [V].

        `bias_v = -weight * max(0, log odds of v against the uniform distribution)`.

        Raises:
            ValueError: counts of another vocabulary, negative ones, or none at all.
        """
        if token_counts.shape != self.bias.shape or (token_counts < 0).any():
            raise ValueError(
                f"token_counts of shape {list(token_counts.shape)} must be {len(self.bias)} "
                "numbers of 0 or more, one for each token"
            )
        if not token_counts.sum() > 0:
            raise ValueError("token_counts are all 0; count the tokens of some templates")
        share = token_counts.double() / token_counts.sum()
        self.bias.copy_(-self.weight * (share * len(share)).clamp(min=1.0).log())

    def forward(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [b, V] after penalties for the tokens [b, t] so far: transformers' interface."""
        counts = torch.zeros_like(scores, dtype=torch.float32)
        ones = torch.ones_like(input_ids, dtype=torch.float32)
        counts.scatter_add_(1, input_ids, ones)
        penalty = self.weight * counts / max(1, input_ids.shape[1])
        return scores + (self.bias - penalty).to(scores.dtype)

    def temperature(
        self, base: float, input_ids: Tensor, states: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The temperature of each row, [b, 1]; `states`: the hidden states [b, h] of the last two
        tokens."""
        rise = self.repetition(input_ids)
        if states is not None:
            rise = rise + self.weight * F.cosine_similarity(*states, dim=-1).relu().float()
        return (base * (1.0 + 0.5 * rise)).unsqueeze(1)

    def repetition(self, input_ids: Tensor) -> Tensor:
        """The fraction of each row's n-grams that occurred earlier in the row, fp32 [b]."""
        if input_ids.shape[1] < self.ngram + 1:
            return torch.zeros(len(input_ids), device=input_ids.device)
        windows = input_ids.unfold(1, self.ngram, 1)
        powers = [1]
        for _ in range(self.ngram - 1):
            powers.append((powers[-1] * _BASE) & 0x7FFFFFFFFFFFFFFF)
        hashes = (windows * torch.tensor(powers, device=input_ids.device)).sum(dim=-1)
        ordered = hashes.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(dim=1)
        return repeated.float() / hashes.shape[1]


class RepetitionScores:
    """A ScoreProcessor for models.generate: `(logits + penalties) / T`, both set by the control, if
    any; without a base temperature, as in greedy decoding, there is no division.

    The model's output has `hidden` [s, b, h].
    """

    def __init__(self, control: RepetitionControl | None, temperature: float | None) -> None:
        self.control, self.temperature = control, temperature
        self.states: tuple[Tensor | None, Tensor | None] = (None, None)  # of the last two tokens

    def observe(self, output: Any) -> None:
        hidden = output.hidden
        self.states = (hidden[-2] if len(hidden) > 1 else self.states[1], hidden[-1])

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.control is not None:
            scores = self.control(tokens, scores)
        if self.temperature is None:
            return scores
        if self.control is None:
            return scores / self.temperature
        before, last = self.states
        states = None if before is None or last is None else (before, last)
        heat = self.control.temperature(self.temperature, tokens, states)
        return scores / heat.to(scores.device)
