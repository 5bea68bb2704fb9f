"""Distributions to sample from, and the acceptance of drafts. Probabilities are fp64.

Shapes: b batch, n drafts, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.common.sampling import check_sampling


class Sampling(NamedTuple):
    """The choice of a token from logits; temperature 0 is the most probable one."""

    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 0.9
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def check(self) -> None:
        """Raises ValueError: a setting is out of its range."""
        check_sampling(self.temperature, top_k=self.top_k, top_p=self.top_p)
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be finite and above 0; use 1 "
                "for none"
            )

    def probabilities(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """The distribution of the next token: logits [b, V] after `prefix` int64 [b, t].

        Half precision would lower the entropy of what is drawn, so all of it is fp64.
        """
        scores = logits.double()
        if self.repetition_penalty != 1.0:
            seen = scores.gather(1, prefix)
            penalty = self.repetition_penalty
            seen = torch.where(seen > 0, seen / penalty, seen * penalty)
            scores = scores.scatter(1, prefix, seen)
        if self.temperature == 0.0:
            best = scores.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(scores).scatter(1, best, 1.0)
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1.0:
            ordered, ids = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(1, ids, ordered)
        return probabilities / probabilities.sum(dim=-1, keepdim=True)

    def draw(self, probabilities: Tensor) -> Tensor:
        """A token of every distribution [..., V]: int64 [...]."""
        flat = probabilities.flatten(0, -2)
        drawn = torch.multinomial(flat, 1, generator=self.generator)
        return drawn.view(probabilities.shape[:-1])

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=device, dtype=torch.float64)


class Accepted(NamedTuple):
    """`num_kept` int64 [b]: drafts that are kept. `token` int64 [b]: the one after them."""

    num_kept: Tensor
    token: Tensor


def accept_drafts(p: Tensor, q: Tensor, drafts: Tensor, sampling: Sampling) -> Accepted:
    """Keep drafts d_1 ... d_n, drawn from q, as if they and the token after them came from p.

    Draft i is kept with probability min(1, p_i / q_i) of it; the first that is not is drawn again
    from `(p_i - q_i)_+`, and after n kept ones a token is drawn from p_{n+1}. The law of the
    result is p's, whatever q is. p [b, n + 1, V], of which p_i is given d_1 ... d_{i-1}; q
    [b, n, V]; drafts int64 [b, n]. Source: arXiv 2211.17192, 2302.01318.
    """
    at = drafts.unsqueeze(-1)
    ratio = (p[:, :-1].gather(-1, at) / q.gather(-1, at)).squeeze(-1)
    kept = sampling.uniform(*drafts.shape, device=p.device) < ratio
    count = kept.long().cumprod(dim=1).sum(dim=1)
    rest = torch.cat(((p[:, :-1] - q).clamp(min=0.0), p[:, -1:]), dim=1)
    rest = rest.gather(1, count.view(-1, 1, 1).expand(-1, 1, p.shape[-1])).squeeze(1)
    own = p.gather(1, count.view(-1, 1, 1).expand(-1, 1, p.shape[-1])).squeeze(1)
    # p and q are equal up to rounding where nothing is left, and then nothing was rejected.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, own)
    return Accepted(count, sampling.draw(rest))


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance `u + s (c - u)` of log-probabilities, [b, V].

    Source: arXiv 2207.12598; for text 2306.17806, with s of 1.2 to 2.
    """
    c, u = conditional.double().log_softmax(dim=-1), unconditional.double().log_softmax(dim=-1)
    return u + scale * (c - u)
