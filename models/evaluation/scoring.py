"""Log-likelihoods of tokens given those before them, in batches of rows of any length.

Rows are padded on the right, which changes nothing for their tokens: every family is causal in
evaluation. They go through the layers' caches in chunks, so that no more logits are kept than those
of one chunk, whatever the length of a row.

Shapes: b batch, s tokens of a chunk, V vocabulary, n scored tokens of a chunk, r requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import TokenInputs, logits_of
from models.generate import PREFILL_CHUNK
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.layers import gather_logits


class Request(NamedTuple):
    """The last `num_scored` of `tokens`, each to be scored given all tokens before it."""

    tokens: Sequence[int]
    num_scored: int


class Score(NamedTuple):
    """`log_likelihood`: the sum over the scored tokens, in nats. `is_greedy`: whether each of them
    is the most probable one."""

    log_likelihood: float
    is_greedy: bool


class Row(NamedTuple):
    """The input of requests that differ in their last token, or in where their scores begin;
    `owners`: their numbers."""

    inputs: tuple[int, ...]
    owners: list[int]


class _Scored(NamedTuple):
    """The scored tokens of a batch, one entry each: position of the logits, row, token, request."""

    positions: Tensor
    rows: Tensor
    targets: Tensor
    owners: Tensor


@torch.inference_mode()
def score(
    model: SequentialModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda num_requests: None,
) -> list[Score]:
    """Score every request with a model in evaluation; results are in the order of `requests`.

    Requests whose tokens differ in the last one alone, such as the letters of a multiple choice,
    are computed once. `batch_size`: rows of different tokens at a time. `progress` is called with
    the number of requests that each batch has answered.

    Raises:
        ValueError: a request without a scored token, or without one before it; or a token that the
            model does not have.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more; raise it")
    check_requests(requests)
    totals = torch.zeros(len(requests), dtype=torch.float64, device=model.ctx.device)
    surprises = torch.zeros(len(requests), dtype=torch.int64, device=model.ctx.device)
    rows = rows_of(requests)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        _add_scores(model, batch, requests, totals, surprises)
        progress(sum(len(row.owners) for row in batch))
    return [
        Score(total, surprising == 0)
        for total, surprising in zip(totals.tolist(), surprises.tolist(), strict=True)
    ]


def rows_of(requests: Sequence[Request]) -> list[Row]:
    """Rows of different inputs, the longest first: memory runs out at once or not at all."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, request in enumerate(requests):
        inputs = tuple(request.tokens[:-1])
        rows.setdefault(inputs, Row(inputs, [])).owners.append(number)
    return sorted(rows.values(), key=lambda row: -len(row.inputs))


class Entry(NamedTuple):
    """A scored token of a batch: the position and the row of its logits, and its request."""

    position: int
    row: int
    target: int
    owner: int


def entries_of(rows: Sequence[Row], requests: Sequence[Request]) -> list[Entry]:
    """The scored tokens of a batch of rows, in the order of their positions."""
    return sorted(
        Entry(position, number, requests[owner].tokens[position + 1], owner)
        for number, row in enumerate(rows)
        for owner in row.owners
        for position in range(len(row.inputs) - requests[owner].num_scored, len(row.inputs))
    )


def score_tokens(logits: Tensor, targets: Tensor, *, ctx: ParallelContext) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, fp64 [n], and whether it is the most probable token, bool
    [n], from logits [n, V/t]; collective over tensor ranks."""
    chosen = gather_logits(logits, ctx=ctx)
    log_probs = chosen.log_softmax(-1, torch.promote_types(chosen.dtype, torch.float32))
    found = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return found.double(), chosen.argmax(dim=-1) == targets


def _add_scores(
    model: SequentialModel,
    batch: Sequence[Row],
    requests: Sequence[Request],
    totals: Tensor,
    surprises: Tensor,
) -> None:
    """Add to `totals` fp64 [r], and to `surprises` int64 [r] the tokens that are not greedy."""
    device = totals.device
    tokens = padded([row.inputs for row in batch], device=device)
    # In the order of positions, so that the tokens of a chunk are a slice.
    columns = torch.tensor(entries_of(batch, requests), device=device).unbind(dim=1)
    scored = _Scored(*(column.contiguous() for column in columns))
    cache = model.new_cache(*tokens.shape)
    start = 0
    for chunk, part in _with_chunks(tokens.split(PREFILL_CHUNK, dim=1), scored):
        logits = logits_of(model(TokenInputs(chunk), cache))
        if len(part.owners):
            found, is_greedy = score_tokens(
                logits[part.positions - start, part.rows], part.targets, ctx=model.ctx
            )
            totals.index_add_(0, part.owners, found)
            surprises.index_add_(0, part.owners, (~is_greedy).long())
        start += chunk.shape[1]


def _with_chunks(chunks: Iterable[Tensor], scored: _Scored) -> Iterator[tuple[Tensor, _Scored]]:
    """Each chunk [b, s] with the tokens that its logits score."""
    start = 0
    for chunk in chunks:
        stop = start + chunk.shape[1]
        bounds = torch.tensor([start, stop], device=chunk.device)
        first, last = torch.searchsorted(scored.positions, bounds).tolist()
        yield chunk, _Scored(*(x[first:last] for x in scored))
        start = stop


def padded(rows: Sequence[Sequence[int]], *, device: torch.device | str) -> Tensor:
    """Rows of token ids as int64 [b, length of the longest], with zeros after the others."""
    length = max(map(len, rows))
    filled = [[*row, *[0] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def check_requests(requests: Sequence[Request]) -> None:
    """Raises ValueError: a request without a scored token, or without one before it."""
    for number, request in enumerate(requests):
        if not 1 <= request.num_scored < len(request.tokens):
            raise ValueError(
                f"request {number} scores {request.num_scored} of {len(request.tokens)} tokens: at "
                "least one has to be scored, from at least one before it; give it more context"
            )
