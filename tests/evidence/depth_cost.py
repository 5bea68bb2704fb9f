"""What a model costs whose layers compute only some tokens: steps, generation and caches, beside a
llama of its width.

Times are quotients taken in turn (tests.benchmarks.timing), divided by the ratio of FLOPs: 1 would
mean that every FLOP costs what it costs in llama. Weights are untrained; the thresholds of
generation have seen one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from models.base import TokenInputs
from models.dynamic.config import DTFConfig, MoDConfig
from models.dynamic.model import DTF, MOD
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.layer_state import update_layer_states
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.evidence.cost import Model, flops_ratio, random_batch, step

LAYERS, VOCAB, LENGTH = 4, 4096, 1024
WIDTHS, GAMMAS, BATCHES = (512, 1024), (0.5, 0.25, 0.125), (1, 8, 32)
ROWS, ROUNDS, WARMUP = 2, 5, 1
PROMPT, NEW_TOKENS = 256, 16


def _sizes(hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_layers": LAYERS,
        "num_heads": hidden // 64,
        "num_kv_heads": hidden // 128,
        "max_position_embeddings": LENGTH,
        "qkv_bias": True,
        "tie_embeddings": True,
    }


def llama(hidden: int) -> Model:
    return Model(LLAMA, LlamaConfig(**_sizes(hidden)))


def routed(hidden: int, gamma: float) -> dict[str, Model]:
    sizes = _sizes(hidden) | {"capacity_gamma": gamma}
    return {"mod": Model(MOD, MoDConfig(**sizes)), "dtf": Model(DTF, DTFConfig(**sizes))}


def step_table(
    *,
    widths: tuple[int, ...] = WIDTHS,
    gammas: tuple[float, ...] = GAMMAS,
    length: int = LENGTH,
    rounds: int = ROUNDS,
) -> Table:
    rows = []
    for hidden in widths:
        dense = llama(hidden)
        batch = random_batch(ROWS, length)
        for gamma in gammas:
            models = routed(hidden, gamma)
            steps = {name: step(model, batch) for name, model in models.items()}
            seconds = interleaved({**steps, "llama": step(dense, batch)}, rounds=rounds, warmup=1)
            for name, model in models.items():
                flops = flops_ratio(model, dense, length)
                scaled = {**seconds, "llama": [flops * s for s in seconds["llama"]]}
                label = f"{name}, hidden {hidden}, gamma {gamma:g}"
                times = ratio(seconds, "llama", name), ratio(scaled, "llama", name)
                rows.append((label, times[0], f"{flops:.2f}", times[1]))
    header = ("", "time of a step", "FLOPs", "time per FLOP")
    title = f"Training step, {ROWS} rows of {length:,}, as multiples of llama's; target 1.15"
    return Table(title, header, rows)


def calibrated(model: Model) -> SequentialModel:
    """A model in evaluation whose thresholds follow one batch."""
    built = model.built().train()
    with torch.no_grad():
        built(TokenInputs(random_batch(4, PROMPT).tokens))
        update_layer_states(built, ctx=built.ctx)
    return built.eval()


@torch.inference_mode()
def _generation(built: SequentialModel, batch_size: int) -> Callable[[], object]:
    """NEW_TOKENS tokens, one after the other, behind a prompt that has been read."""
    tokens = random_batch(batch_size, PROMPT + NEW_TOKENS).tokens
    cache = built.new_cache(batch_size, PROMPT + NEW_TOKENS)
    built(TokenInputs(tokens[:, :PROMPT]), cache)

    @torch.inference_mode()
    def call() -> None:
        for i in range(PROMPT, PROMPT + NEW_TOKENS):
            built(TokenInputs(tokens[:, i : i + 1]), cache)
        for part in cache.values():
            part.rollback(PROMPT)

    return call


def decode_table(
    *,
    hidden: int = WIDTHS[-1],
    gammas: tuple[float, ...] = GAMMAS,
    batch_sizes: tuple[int, ...] = BATCHES,
    rounds: int = ROUNDS,
) -> Table:
    """Time of a token. A routed layer is skipped where no row of the batch computes it."""
    dense = calibrated(llama(hidden))
    rows = []
    for gamma in gammas:
        built = {name: calibrated(model) for name, model in routed(hidden, gamma).items()}
        cells: dict[str, list[str]] = {name: [] for name in built}
        for size in batch_sizes:
            calls = {name: _generation(each, size) for name, each in built.items()}
            seconds = interleaved(
                {**calls, "llama": _generation(dense, size)}, rounds=rounds, warmup=WARMUP
            )
            for name in built:
                cells[name].append(ratio(seconds, "llama", name))
        rows += [(f"{name}, gamma {gamma:g}", *found) for name, found in cells.items()]
        expected = (f"{(1 + 1 - (1 - gamma) ** size) / 2:.2f}" for size in batch_sizes)
        rows.append((f"expected of the layers, gamma {gamma:g}", *expected))
    header = ("", *(f"batch {size}" for size in batch_sizes))
    title = f"A token of a generation, hidden {hidden}, as multiples of llama's"
    return Table(title, header, rows)


@torch.inference_mode()
def cache_table(*, hidden: int = 256, length: int = LENGTH) -> Table:
    """Bytes of keys and values per token and layer after a text, reserved room included."""
    models: dict[str, Mapping[str, Model]] = {"": {"llama": llama(hidden)}}
    models |= {f", gamma {gamma:g}": routed(hidden, gamma) for gamma in GAMMAS}
    rows = []
    for suffix, group in models.items():
        for name, model in group.items():
            built = calibrated(model)
            cache = built.new_cache(1, length)
            for chunk in random_batch(1, length).tokens.split(256, dim=1):
                built(TokenInputs(chunk), cache)
            size = sum(part.num_bytes for part in cache.values()) / length / LAYERS
            rows.append((f"{name}{suffix}", f"{size:,.0f}"))
    return Table(f"Cache of {length:,} tokens, hidden {hidden} (fp32)", ("", "bytes"), rows)


def tables(num_seeds: int) -> Iterator[Table]:
    """Seeds do not matter here: nothing is trained."""
    yield step_table()
    yield decode_table()
    yield cache_table()
