"""Gaps in held-out text filled by the diffusion stream of `hybrid`, scored by causal streams.

A gap is the middle half of a block: what comes before it and the last quarter of the block are
known. Diffusion sees both; the causal stream, which fills the same gaps byte by byte, what comes
before alone. Controls are the text itself and the gaps of another row. A fill that fits what
follows makes the bytes after it likelier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.base import ModelFamily, TokenInputs
from models.dart.generation import fill_in
from models.dart.modes import Request, continue_rows, evaluating
from models.dart.sampling import Sampling
from tests.benchmarks.timing import Table
from tests.evidence.training import Trained, over_seeds

PROMPT, TOTAL = 32, 96
PASSES = (1, 8)


class Score(NamedTuple):
    """Nats per byte of the gaps and of the known bytes behind them, share of bytes found again."""

    own_gaps: float
    own_behind: float
    judge_gaps: float
    judge_behind: float
    found: float


def gaps(block_size: int) -> Tensor:
    """Bool [TOTAL]: the bytes that are hidden, none of them in the prompt."""
    place = torch.arange(TOTAL)
    offset = place % block_size
    middle = (offset >= block_size // 4) & (offset < 3 * block_size // 4)
    return middle & (place >= PROMPT)


def behind(block_size: int) -> Tensor:
    """Bool [TOTAL]: the known bytes between a gap and the end of its block."""
    place = torch.arange(TOTAL)
    return (place % block_size >= 3 * block_size // 4) & (place >= PROMPT)


def _sampling() -> Sampling:
    return Sampling(1.0, None, None, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_diffusion(trained: Trained, config: Any, rows: Tensor, *, num_steps: int) -> Tensor:
    """Rows [b, TOTAL] with their gaps filled in `num_steps` passes a block."""
    hidden = gaps(config.block_size).expand_as(rows)
    with evaluating(trained.model):
        return fill_in(
            trained.model, config, rows.masked_fill(hidden, 0), ~hidden,
            num_steps=num_steps, sampling=_sampling(), guidance_scale=1.0,
        ).tokens  # fmt: skip


def by_prefix(trained: Trained, config: Any, rows: Tensor) -> Tensor:
    """Rows with their gaps filled byte by byte, each byte sampled after those before it."""
    filled, sampling = rows.clone(), _sampling()
    for place in gaps(config.block_size).nonzero().flatten().tolist():
        request = Request("ar", place + 1, sampling)
        longer = continue_rows(trained.model, config, filled[:, :place], request)
        filled[:, place] = longer.tokens[:, place]
    return filled


@torch.no_grad()
def losses(trained: Trained, family: ModelFamily, rows: Tensor) -> Tensor:
    """Nats [b, TOTAL] of every byte after those before it, 0 for the first."""
    output = trained.model(TokenInputs(rows[:, :-1]))
    scored = family.token_losses(output, rows[:, 1:], trained.model.ctx).T
    return torch.cat((torch.zeros(len(rows), 1), scored), dim=1)


def score(filled: Tensor, rows: Tensor, block_size: int, own: Tensor, judge: Tensor) -> Score:
    """`own`, `judge`: losses [b, TOTAL] of the filled rows."""
    hidden, known = gaps(block_size), behind(block_size)
    means = [float(each[:, places].mean()) for each in (own, judge) for places in (hidden, known)]
    return Score(*means, float((filled == rows)[:, hidden].double().mean()))


def table(
    name: str,
    config: Any,
    fitted: Sequence[Trained],
    judges: Sequence[Trained],
    families: tuple[ModelFamily, ModelFamily],
    rows: Tensor,
) -> Table:
    """`families`: those of `fitted` and of `judges`, one of each per seed; `rows`: [b, TOTAL]."""
    ways = {
        "the text": lambda trained: rows,
        **{
            f"diffusion, {n} passes a block": lambda trained, n=n: by_diffusion(
                trained, config, rows, num_steps=n
            )
            for n in PASSES
        },
        "ar, from what comes before": lambda trained: by_prefix(trained, config, rows),
        "gaps of another row": lambda trained: torch.where(
            gaps(config.block_size), rows.roll(1, 0), rows
        ),
    }
    lines = []
    for way, fill in ways.items():
        scores = []
        for trained, judge in zip(fitted, judges, strict=True):
            filled = fill(trained)
            own, theirs = losses(trained, families[0], filled), losses(judge, families[1], filled)
            scores.append(score(filled, rows, config.block_size, own, theirs))
        columns = [over_seeds(values) for values in zip(*scores, strict=True)]
        lines.append((way, *columns))
    return Table(
        f"Gaps of {config.block_size // 2} bytes, {name}: nats per byte under its own causal "
        "stream and under the judge",
        (
            "",
            "own: gaps",
            "own: behind",
            "judge: gaps",
            "judge: behind",
            "share of the text's bytes",
        ),
        lines,
    )
