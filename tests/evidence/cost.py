"""Cost of a Daria-Former: steps beside a llama of its width, long contexts, and caches.

Times are quotients taken in turn (tests.benchmarks.timing), divided by the ratio of FLOPs: 1 would
mean that every FLOP costs what it costs in llama. Models have two blocks and untrained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from models.base import ModelFamily, TokenInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY as DARIA_FORMER
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.evidence.training import Batch, future_leak, optimizer_of, train_step

LAYERS, VOCAB = 2, 4096
STEP_SHAPES = ((512, 512), (512, 1024), (768, 512), (768, 1024))  # hidden size, tokens of a row
TOKENS_PER_STEP, ROUNDS, WARMUP = 1024, 7, 1
CONTEXTS, CONTEXT_HIDDEN, CONTEXT_WINDOW, CONTEXT_ROUNDS = (1024, 4096, 16_384), 256, 512, 3


class Model(NamedTuple):
    family: ModelFamily
    config: Any

    def built(self) -> SequentialModel:
        return SequentialModel(self.family.layer_specs(self.config), ParallelContext.single())


def daria(hidden: int, *, length: int, **changes: Any) -> Model:
    """The published `small()` at another width, with two blocks."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_dim": hidden,
        "num_layers": LAYERS,
        "num_heads": hidden // 64,
        "num_kv_heads": 4,
        "max_seq_len": length,
        "esv_sites": LAYERS,
    }
    return Model(DARIA_FORMER, DariaFormerConfig(**sizes | changes))


def llama_like(model: Model) -> Model:
    """The llama of the same width, depth, heads and FFN."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=model.config.hidden_dim,
        intermediate_size=model.config.ffn_size,
        num_layers=LAYERS,
        num_heads=model.config.num_heads,
        num_kv_heads=model.config.num_kv_heads,
        max_position_embeddings=model.config.max_seq_len,
        tie_embeddings=True,
    )
    return Model(LLAMA, config)


def random_batch(rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous())


def step(model: Model, batch: Batch) -> Callable[[], object]:
    """A training step: forward, backward, clipping, fused AdamW."""
    built = model.built().train()
    optimizer = optimizer_of(built, lr=1e-4)
    return lambda: train_step(model.family, model.config, built, optimizer, batch)


def step_table(*, shapes: tuple[tuple[int, int], ...] = STEP_SHAPES, rounds: int = ROUNDS) -> Table:
    rows = []
    for hidden, length in shapes:
        ours = daria(hidden, length=length)
        theirs = llama_like(ours)
        batch = random_batch(max(1, TOKENS_PER_STEP // length), length)
        contestants = {"daria": step(ours, batch), "llama": step(theirs, batch)}
        seconds = interleaved(contestants, rounds=rounds, warmup=WARMUP)
        flops = flops_ratio(ours, theirs, length)
        scaled = {"daria": seconds["daria"], "llama": [flops * s for s in seconds["llama"]]}
        leak = future_leak(ours.built().eval(), batch.tokens[:1], vocab_size=VOCAB, places=2)
        rows.append(
            (
                f"hidden {hidden}, {length} tokens",
                ratio(seconds, "llama", "daria"),
                f"{flops:.2f}",
                ratio(scaled, "llama", "daria"),
                f"{leak:g}",
            )
        )
    header = ("", "time of a step", "FLOPs", "time per FLOP", "leak")
    return Table("Training step, as multiples of llama's (quartiles); target 1.3", header, rows)


def flops_ratio(ours: Model, theirs: Model, length: int) -> float:
    a, b = (model.family.flops(model.config, length) for model in (ours, theirs))
    return a / b


def _context_models(length: int) -> dict[str, Model]:
    shape = {"sliding_window_size": CONTEXT_WINDOW, "length": length}
    whole = daria(CONTEXT_HIDDEN, **shape)
    without = daria(CONTEXT_HIDDEN, **shape, paths=("local", "memory", "persona"))
    return {"llama": llama_like(whole), "with long path": whole, "without": without}


def context_table(*, contexts: tuple[int, ...] = CONTEXTS, rounds: int = CONTEXT_ROUNDS) -> Table:
    """Microseconds per token of one forward pass over a row."""
    times: dict[str, list[str]] = {}
    for length in contexts:
        batch = random_batch(1, length)
        models = {name: (m.family, m.built().eval()) for name, m in _context_models(length).items()}
        calls = {name: _forward(built, batch) for name, (_, built) in models.items()}
        for name, seconds in interleaved(calls, rounds=rounds, warmup=1).items():
            times.setdefault(name, []).append(f"{1e6 * min(seconds) / length:.0f}")
    rows = [(name, *found) for name, found in times.items()]
    title = f"Forward pass, microseconds per token (best of {rounds}), hidden {CONTEXT_HIDDEN}"
    return Table(title, ("", *(f"{length:,} tokens" for length in contexts)), rows)


def _forward(model: SequentialModel, batch: Batch) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> object:
        return model(TokenInputs(batch.tokens))

    return call


@torch.inference_mode()
def cache_bytes(model: Model, length: int) -> int:
    """What the blocks keep of a row of `length` tokens, reserved room included."""
    built = model.built().eval()
    cache = built.new_cache(1, length)
    for chunk in random_batch(1, length).tokens.split(512, dim=1):
        built(TokenInputs(chunk), cache)
    return sum(part.num_bytes for name, part in cache.items() if name.startswith("block"))


def cache_table(*, contexts: tuple[int, ...] = CONTEXTS) -> Table:
    """The attention caches of a generation, per token and block."""
    columns = [_context_models(length) for length in contexts]
    rows = []
    for name in columns[0]:
        sizes = [
            cache_bytes(models[name], length) / length / LAYERS
            for models, length in zip(columns, contexts, strict=True)
        ]
        rows.append((name, *(f"{size:,.0f}" for size in sizes)))
    header = ("", *(f"{length:,} tokens" for length in contexts))
    return Table("Cache of a generation, bytes per token and block (fp32)", header, rows)


def tables(num_seeds: int) -> Iterator[Table]:
    """Seeds do not matter here: nothing is trained."""
    yield step_table()
    yield context_table()
    yield cache_table()
