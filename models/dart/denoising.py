"""From a block without tokens to one with all of them: both reverse processes.

Shapes: b batch, B block size, h hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.dart.config import DARTConfig
from models.dart.sampling import Sampling
from models.dart.schedule import alphas


class Block(NamedTuple):
    """A block to fill in, [b, B] each: its tokens, which of them are known, and which are in the
    row at all."""

    tokens: Tensor
    is_known: Tensor
    is_inside: Tensor


class Draw(Protocol):
    """A token for every place, int64 [b, B], of a block that shows `tokens` where not `hidden`, or
    `states` [b, B, h] with gaussian noise of `levels` int64 [b]."""

    def __call__(
        self, tokens: Tensor, hidden: Tensor, levels: Tensor, states: Tensor | None = None
    ) -> Tensor: ...


def unmask(
    config: DARTConfig, block: Block, draw: Draw, *, num_steps: int, sampling: Sampling
) -> Tensor:
    """The tokens of a block by masked diffusion, int64 [b, B].

    From level k to k' a hidden token is drawn with probability `(alpha_k' - alpha_k) / (1 -
    alpha_k)`, and is not hidden again. Every row begins at the level of what it shows, whatever
    the rows beside it show.
    """
    tokens, hidden = block.tokens, ~block.is_known
    alpha = alphas(config, tokens.device)
    levels = levels_down(
        config, shown=block.is_known.sum(dim=1), total=hidden.shape[1], steps=num_steps
    )
    for level, following in itertools.pairwise(levels):
        drawn = draw(tokens, hidden, level)
        share = ((alpha[following] - alpha[level]) / (1.0 - alpha[level])).unsqueeze(1)
        shown = hidden & block.is_inside
        shown &= sampling.uniform(*hidden.shape, device=hidden.device) < share
        tokens = torch.where(shown, drawn, tokens)
        hidden = hidden & ~shown
    return tokens


def reverse(
    config: DARTConfig,
    block: Block,
    draw: Draw,
    clean: Callable[[Tensor], Tensor],
    *,
    num_steps: int,
    sampling: Sampling,
) -> Tensor:
    """The tokens of a block by gaussian diffusion, int64 [b, B].

    At every level a token v is drawn from what the model says of it, and the state of the next one
    from q(x_k' | x_k, e_v); a known token is v itself, so that its states are those of training.
    Drawn, not averaged: with exact predictions of independent tokens every number of steps then has
    the law of the text. `clean`: e of tokens, [b, B] -> [b, B, h].
    """
    tokens, alpha = block.tokens, alphas(config)
    wanted, states = block.is_inside & ~block.is_known, None
    shown = torch.zeros_like(tokens[:, 0])
    levels = levels_down(config, shown=shown, total=tokens.shape[1], steps=num_steps)
    for level, following in itertools.pairwise(levels):
        hidden = torch.ones_like(wanted) if states is None else ~block.is_inside
        tokens = torch.where(wanted, draw(tokens, hidden, level, states), tokens)
        states = posterior_draw(
            states, clean(tokens), alpha[level[0]].item(), alpha[following[0]].item(), sampling
        )
    return tokens


def posterior_draw(
    states: Tensor | None, clean: Tensor, alpha: float, following: float, sampling: Sampling
) -> Tensor:
    """Draw x' from q(x' | x, e), x = `states` of a level with `alpha`, e = `clean`, and `following`
    the alpha of x': fp64 [b, B, h]. None: of level T, where x says nothing.

        r = alpha / alpha',   mean = (sqrt(alpha') (1 - r) e + sqrt(r) (1 - alpha') x) / (1 - alpha)
        variance = (1 - r) (1 - alpha') / (1 - alpha)

    Source: arXiv 2006.11239, equations 6 and 7.
    """
    ratio, clean = alpha / following, clean.double()
    mean = following**0.5 * (1.0 - ratio) / (1.0 - alpha) * clean
    if states is not None:
        mean = mean + ratio**0.5 * (1.0 - following) / (1.0 - alpha) * states.double()
    variance = (1.0 - ratio) * (1.0 - following) / (1.0 - alpha)
    return mean + variance**0.5 * sampling.normal(*clean.shape, device=clean.device)


def levels_down(config: DARTConfig, *, shown: Tensor, total: int, steps: int) -> list[Tensor]:
    """Levels, int64 [b] each, from those of blocks of which `shown` int64 [b] of `total` tokens are
    shown, down to 0, which a row reaches at the last of them alone.

    Level T where none is; below it where some are, since at T a block holds no token.
    """
    most = config.diffusion_steps
    hidden_share = 1.0 - shown.double().unsqueeze(1) / total
    shares = 1.0 - alphas(config, shown.device)[1:most]
    top = 1 + (shares - hidden_share).abs().argmin(dim=1)
    top = top.where(shown > 0, most)
    steps = min(steps, int(top.max()))
    return [-(-top * (steps - i) // steps) for i in range(steps + 1)]
