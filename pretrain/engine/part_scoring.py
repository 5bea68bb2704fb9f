"""Log-likelihoods of rows of any length through the evaluation of a run, at its layout.

Rows are cut into parts of one length, padded on the right, which changes nothing for their tokens:
every family is causal in evaluation. A part is split over data ranks like held-out text.

Shapes: n rows of a part, b rows of a batch, s tokens, e scored tokens, r requests, V vocabulary,
t tensor ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_tools.loading.batch import Batch
from models.base import logits_of
from models.evaluation.scoring import Request, Row, entries_of, rows_of, score_tokens
from parallel.cross_entropy import IGNORED_LABEL
from pretrain.engine.train_spec import TrainSpec

# Of scored tokens whose logits are gathered over tensor ranks at a time.
_TOKENS = 512


class Part(NamedTuple):
    """Rows of all data ranks: `tokens` int32 [n, s], `entries` int32 [e, 4], one
    `models.evaluation.scoring.Entry` each, whose row is one of the n."""

    tokens: npt.NDArray[np.int32]
    entries: npt.NDArray[np.int32]


class PartScores(NamedTuple):
    """Scores of `requests` int64 [r], each once: the sum of the log-probabilities of its scored
    tokens, fp64 [r], and how many of them are not the most probable token, int64 [r]."""

    requests: npt.NDArray[np.int64]
    log_likelihoods: npt.NDArray[np.float64]
    num_surprises: npt.NDArray[np.int64]


def parts_of(
    requests: Sequence[Request], *, lengths: Sequence[int], round_size: int, num_rounds: int
) -> Iterator[Part]:
    """Parts of at most `num_rounds` rounds, a round being a batch of every data rank.

    A row gets the smallest of `lengths` that holds it; the longest rows come first.
    """

    def length_of(row: Row) -> int:
        return min(length for length in lengths if length >= len(row.inputs))

    for length, group in itertools.groupby(rows_of(requests), key=length_of):
        rows = list(group)
        for first in range(0, len(rows), round_size * num_rounds):
            own = rows[first : first + round_size * num_rounds]
            tokens = np.zeros((-(-len(own) // round_size) * round_size, length), dtype=np.int32)
            for number, row in enumerate(own):
                tokens[number, : len(row.inputs)] = row.inputs
            yield Part(tokens, np.array(entries_of(own, requests), dtype=np.int32))


class PartScoring:
    """The objective of a pass over a part: scores this data rank's rows as their logits come."""

    def __init__(self, spec: TrainSpec, part: Part) -> None:
        self.spec, self._part = spec, part
        self._size = spec.config.training.batch_size
        # First row of each batch of this rank.
        stride, first = self._size * spec.ctx.data.size, self._size * spec.ctx.data.rank
        self._firsts = range(first, len(part.tokens), stride)
        self._next = iter(self._firsts)
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def batches(self) -> list[Batch]:
        """The batches of this data rank, as many as every other has."""
        return [self._batch(first) for first in self._firsts]

    def _batch(self, first: int) -> Batch:
        tokens = torch.from_numpy(self._part.tokens[first : first + self._size]).long()
        return Batch(
            tokens=tokens,
            labels=torch.full_like(tokens, IGNORED_LABEL),
            segment_ids=torch.zeros_like(tokens, dtype=torch.int32)
            if self.spec.segmented
            else None,
        )

    def __call__(self, output: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the rows of the next batch; the loss is 0."""
        first, ctx = next(self._next), self.spec.ctx
        rows = self._part.entries[:, 1]
        own = self._part.entries[(rows >= first) & (rows < first + self._size)]
        logits = logits_of(output)  # [s, b, V/t]
        for entries in torch.from_numpy(own).long().to(logits.device).split(_TOKENS):
            positions, row, tokens, requests = entries.unbind(dim=1)
            found, is_greedy = score_tokens(logits[positions, row - first], tokens, ctx=ctx)
            self._found.append((requests, found, is_greedy))
        zero = torch.zeros((), device=logits.device)
        return zero, dict.fromkeys(self.spec.loss_names, zero)

    def scores(self) -> PartScores:
        """The scores of all requests of this data rank, where the last stage is."""
        if not self._found:
            return PartScores(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
        columns = (torch.cat(x).cpu().numpy() for x in zip(*self._found, strict=True))
        owners, log_probs, is_greedy = columns
        requests, places = np.unique(owners, return_inverse=True)
        totals = np.zeros(len(requests))
        surprises = np.zeros(len(requests), dtype=np.int64)
        np.add.at(totals, places, log_probs)
        np.add.at(surprises, places, ~is_greedy)
        return PartScores(requests, totals, surprises)
