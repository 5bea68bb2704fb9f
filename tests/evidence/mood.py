"""A hidden mood: whether the emotion state carries what a short window cannot.

Tokens come from a hidden Markov model. A mood lasts 100 tokens on average and decides the table
`p(next token | token)`. Best possible losses are exact, by the forward algorithm: with the whole
past, and with as much of it as stacked windows reach. The model sees a window of 2 tokens in each
of 2 layers and has neither a long nor a memory path, so only its emotion state can reach further.

In the arm without it every weight that reads the state (adaptive norms, the FFN's bias, attention
strength, style, temperature) stays at the zero it starts from; all else is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from tests.benchmarks.timing import Table
from tests.evidence.training import (
    NO_AUX,
    NO_NOISE,
    Batch,
    future_leak,
    logits_of,
    over_seeds,
    train,
)

MOODS, VOCAB, STAY, CONTRAST = 8, 16, 0.99, 0.7
LENGTH, ROWS, STEPS, LR = 256, 16, 400, 3e-3
TEST_SEED, TEST_ROWS, BURN_IN = 10_000, 64, 64
WINDOW, LAYERS = 2, 2
REACH = LAYERS * (WINDOW - 1) + 1  # tokens that decide a prediction through windows alone

# The last component of every parameter through which the state acts.
READERS = ("scale", "shift", "emotion", "attention_scale", "style", "category_style", "temperature")


class Source(NamedTuple):
    """`tables` fp64 [mood, token, next token], `moves` fp64 [mood, next mood]."""

    tables: Tensor
    moves: Tensor

    @classmethod
    def random(cls, seed: int) -> Source:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(1, VOCAB, VOCAB, generator=generator)
        own = torch.randn(MOODS, VOCAB, VOCAB, generator=generator)
        tables = (shared + CONTRAST * own).double().softmax(dim=-1)
        moves = torch.full((MOODS, MOODS), (1.0 - STAY) / (MOODS - 1), dtype=torch.float64)
        return cls(tables, moves.fill_diagonal_(STAY))

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        mood = torch.randint(MOODS, (rows,), generator=generator)
        token = torch.randint(VOCAB, (rows,), generator=generator)
        stream = [token]
        for _ in range(LENGTH):
            mood = torch.multinomial(self.moves[mood], 1, generator=generator).squeeze(1)
            chances = self.tables[mood, token]
            token = torch.multinomial(chances, 1, generator=generator).squeeze(1)
            stream.append(token)
        tokens = torch.stack(stream, dim=1)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def floor(self, batch: Batch, *, reach: int) -> float:
        """Mean loss after BURN_IN of the best prediction from the last `reach` tokens, in nats.

        The filter `p(mood) <- normalised(p(mood) p(token | token before, mood)) moves`, begun anew
        `reach` tokens before each prediction. Exact: the mood's stationary law is uniform.
        """
        likelihood = self.tables[:, batch.tokens, batch.labels].permute(2, 1, 0)
        losses = []
        for t in range(BURN_IN, LENGTH):
            belief = torch.full_like(likelihood[0], 1.0 / MOODS)
            for seen in likelihood[max(0, t - reach + 1) : t]:
                belief = belief * seen
                belief = belief / belief.sum(dim=-1, keepdim=True) @ self.moves
            losses.append(-(belief * likelihood[t]).sum(dim=-1).log())
        return float(torch.stack(losses).mean())


class Result(NamedTuple):
    """Nats per token after BURN_IN, largest future leak, and how much the first state matters."""

    loss: float
    leak: float
    influence: float


def config() -> DariaFormerConfig:
    return DariaFormerConfig(
        vocab_size=VOCAB,
        hidden_dim=64,
        num_layers=LAYERS,
        num_heads=2,
        num_kv_heads=2,
        ffn_hidden_dim=192,
        max_seq_len=LENGTH,
        paths=("local",),
        sliding_window_size=WINDOW,
        emotion_dim=32,
        esv_sites=LAYERS,
        rhythm_rank=16,
        initializer_range=0.1,  # 0.02 suits widths of a thousand
        **NO_AUX,  # the floors bound cross entropy
        **NO_NOISE,
    )


def reads_state(name: str) -> bool:
    """Whether the emotion state acts through the parameter `name`; all of them start at 0."""
    is_site = ".emotion." in name
    return name.rsplit(".", 1)[-1] in READERS and not is_site and "rhythm" not in name


def run(source: Source, *, with_state: bool, seed: int, steps: int = STEPS) -> Result:
    """Train one arm and score it on rows that it has not seen."""
    generator = torch.Generator().manual_seed(seed)
    batches = iter(lambda: source.draw(ROWS, generator), None)
    trained = train(
        FAMILY,
        config(),
        batches,
        steps=steps,
        lr=LR,
        seed=seed,
        frozen=None if with_state else reads_state,
    )
    test = held_out(source)
    logits = logits_of(trained.model, test.tokens)[BURN_IN:]
    result = Result(
        loss=float(cross_entropy(logits.flatten(0, 1), test.labels.T[BURN_IN:].flatten())),
        leak=future_leak(trained.model, test.tokens[:4], vocab_size=VOCAB),
        influence=influence(trained.model, test.tokens[:4]),
    )
    print(f"with_state={with_state}, seed {seed}: {result}", flush=True)
    return result


def held_out(source: Source) -> Batch:
    return source.draw(TEST_ROWS, torch.Generator().manual_seed(TEST_SEED))


@torch.no_grad()
def influence(model: SequentialModel, tokens: Tensor) -> float:
    """The largest change of a logit when the first token continues another state than 0."""
    state = torch.ones(len(tokens), config().emotion_dim)
    other = model(DariaInputs(tokens, emotion=state)).logits
    return float((other - model(TokenInputs(tokens)).logits).abs().max())


def tables(num_seeds: int) -> Iterator[Table]:
    """Both arms over seeds (of the model and its data, the source is one), beside the floors."""
    source = Source.random(0)
    test = held_out(source)
    whole, short = (source.floor(test, reach=reach) for reach in (LENGTH, REACH))
    rows = [
        (f"best possible with the last {REACH} tokens", f"{short:.4f}", "0 %", "", ""),
        ("best possible with the whole past", f"{whole:.4f}", "100 %", "", ""),
    ]
    for name, with_state in (("emotion state off", False), ("emotion state on", True)):
        results = [run(source, with_state=with_state, seed=seed) for seed in range(num_seeds)]
        closed = [100 * (short - r.loss) / (short - whole) for r in results]
        rows.append(
            (
                name,
                over_seeds([r.loss for r in results], digits=4),
                f"{over_seeds(closed, digits=0)} %",
                f"{max(r.influence for r in results):.2g}",
                f"{max(r.leak for r in results):g}",
            )
        )
    header = ("", "nats per token", "of the way", "influence of the first state", "leak")
    yield Table(f"Moods of {1 / (1 - STAY):.0f} tokens, windows that reach {REACH}", header, rows)
