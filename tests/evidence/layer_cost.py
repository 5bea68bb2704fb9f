"""What a layer with memory costs beside one without, and beside its FLOPs.

The last block of the 125m size, which reads four others, and the block of llama of these sizes,
alone. Times are quotients taken in turn (tests.benchmarks.timing) of CPU seconds; `per FLOP` is the
quotient of times over that of FLOPs, of which 1.15 is the goal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.amrpa.carry import AUX, AMRPACarry
from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY as AMRPA
from models.common.counter_rng import prefix_keys
from models.common.decoder import DecoderCarry
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import build_layers
from parallel.context import ParallelContext
from tests.benchmarks.timing import Table, interleaved, ratio

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_heads": 12,
    "num_kv_heads": 12,
    "max_position_embeddings": 2048,
}
NUM_LAYERS, WINDOW = 12, 4
LENGTH, DECODED, ROUNDS, WARMUP = 512, 8, 7, 1
BATCHES = (1, 8)  # rows that are continued together
PLAIN = "no memory"
KINDS = (("qk", 384), ("qk", 64), ("context", 384), ("context", 64))
# What a kernel is for -> the beginnings of its names.
_KERNELS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
}


class Block(NamedTuple):
    """The last block of a model, and the forward FLOPs per token at that number of keys."""

    module: nn.Module
    config: Any
    flops: Callable[[int], float]


def plain_block(sizes: dict[str, Any]) -> Block:
    return _block(LLAMA, LlamaConfig(**sizes, num_layers=NUM_LAYERS), sizes)


def memory_block(kind: Any, hidden: int, sizes: dict[str, Any]) -> Block:
    """`kind`: history_kind; `hidden`: alpha_mlp_hidden."""
    config = AMRPALlamaConfig(
        **sizes,
        num_layers=NUM_LAYERS,
        target_layers=[NUM_LAYERS - 1],
        history_kind=kind,
        alpha_mlp_hidden=hidden,
    )
    return _block(AMRPA, config, sizes)


def _block(family: Any, config: Any, sizes: dict[str, Any]) -> Block:
    spec = family.layer_specs(config)[NUM_LAYERS]
    (module,) = build_layers([spec], ParallelContext.single(), seed=0).values()
    outer = LlamaConfig(**sizes, num_layers=NUM_LAYERS - 1)

    def flops(keys: int) -> float:
        length = 2 * keys - 1  # whose queries see `keys` on average
        return float(family.flops(config, length) - LLAMA.flops(outer, length))

    return Block(module, config, flops)


def _history(block: Block, rows: int, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    """What four layers left."""
    heads, size = SIZES["num_heads"], block.config.head_size
    queries = torch.randn(rows, heads, num_queries, size)
    if block.config.history_kind == "context":
        return (queries,) * WINDOW
    return (queries, torch.randn(rows, heads, num_keys, size)) * WINDOW


def _carry(block: Block, hidden: Tensor, num_keys: int, *, noise: bool) -> Any:
    if isinstance(block.config, LlamaConfig):
        return DecoderCarry(hidden)
    num_queries, rows = hidden.shape[:2]
    keys = prefix_keys(torch.zeros(rows, num_queries, dtype=torch.long), None) if noise else None
    history = _history(block, rows, num_queries, num_keys)
    return AMRPACarry(hidden, torch.zeros(rows, len(AUX)), history, None, keys)


def training_step(block: Block, *, length: int) -> Callable[[], object]:
    """Forward and backward over a row, gradients of input and parameters."""
    block.module.train()
    hidden = torch.randn(length, 1, block.config.hidden_size, requires_grad=True)
    carry = _carry(block, hidden, length, noise=True)

    def call() -> None:
        output = block.module(carry)
        total = output.hidden.square().mean()
        if isinstance(output, AMRPACarry):
            total = total + output.aux.sum()
        total.backward()

    return call


def decoding(block: Block, *, length: int, rows: int) -> Callable[[], object]:
    """`DECODED` tokens of every row, one at a time, behind `length` others."""
    block.module.eval()
    cache = block.module.new_cache(rows, length + DECODED)  # type: ignore[operator]
    size = block.config.hidden_size
    with torch.inference_mode():
        block.module(_carry(block, torch.randn(length, rows, size), length, noise=False), cache)
        steps = [
            _carry(block, torch.randn(1, rows, size), length + i + 1, noise=False)
            for i in range(DECODED)
        ]

    @torch.inference_mode()
    def call() -> None:
        cache.rollback(length)
        for carry in steps:
            block.module(carry, cache)

    return call


def tables(
    num_seeds: int,
    *,
    sizes: dict[str, Any] = SIZES,
    length: int = LENGTH,
    rounds: int = ROUNDS,
    kinds: Sequence[tuple[str, int]] = KINDS,
) -> Iterator[Table]:
    """Training, where its time goes, decoding. Seeds do not matter here: nothing is trained."""
    blocks = {f"{kind}, hidden {e}": memory_block(kind, e, sizes) for kind, e in kinds}
    blocks = {PLAIN: plain_block(sizes)} | blocks
    yield _table(
        f"Forward and backward of a layer over a row of {length:,}",
        partial(training_step, length=length),
        (length + 1) // 2,
        blocks,
        rounds,
    )
    yield _where_table(blocks, length, rounds)
    for rows in BATCHES:
        yield _table(
            f"One token of {rows} row{'s' * (rows > 1)} behind {length:,} others",
            partial(decoding, length=length, rows=rows),
            length + DECODED // 2,
            blocks,
            rounds,
        )


def _table(
    title: str,
    contestant: Callable[[Block], Callable[[], object]],
    keys: int,
    blocks: Mapping[str, Block],
    rounds: int,
) -> Table:
    calls = {name: contestant(block) for name, block in blocks.items()}
    seconds = interleaved(calls, rounds=rounds, warmup=WARMUP, clock=process_time)
    plain = blocks[PLAIN]
    rows = []
    for name, block in blocks.items():
        if name == PLAIN:
            continue
        flops = block.flops(keys) / plain.flops(keys)
        scaled = {name: seconds[name], PLAIN: [flops * s for s in seconds[PLAIN]]}
        rows.append(
            (
                name,
                f"{flops:.3f}",
                f"{1 + _published_share(block, keys, plain):.3f}",
                ratio(seconds, PLAIN, name),
                ratio(scaled, PLAIN, name),
            )
        )
    header = ("", "FLOPs", "formula", "time", "time per FLOP")
    return Table(f"{title}, as multiples of a layer without memory (quartiles)", header, rows)


def _where_table(blocks: Mapping[str, Block], length: int, rounds: int) -> Table:
    """CPU time of training by kind of kernel, as shares of a layer without memory."""
    calls = {name: training_step(block, length=length) for name, block in blocks.items()}
    spent = {name: dict.fromkeys((*_KERNELS, "other"), 0.0) for name in calls}
    for number in range(WARMUP + rounds):
        for name, call in calls.items():
            with profile(activities=[ProfilerActivity.CPU]) as run:
                call()
            if number < WARMUP:
                continue
            for event in run.key_averages():
                found = (kind for kind, names in _KERNELS.items() if event.key.startswith(names))
                spent[name][next(found, "other")] += event.self_cpu_time_total
    whole = sum(spent[PLAIN].values())
    rows = [
        (name, *(f"{part / whole:.2f}" for part in (*parts.values(), sum(parts.values()))))
        for name, parts in spent.items()
    ]
    title = f"Where the time of training goes, of a layer without memory, mean of {rounds}"
    return Table(title, ("", *_KERNELS, "other", "sum"), rows)


def _published_share(block: Block, keys: int, plain: Block) -> float:
    """FLOPs of the memory over those of its block, with both halves of the first layer of the MLP
    applied to every layer that is read; here that of the query is applied once."""
    n, d = plain.config.num_heads, plain.config.head_size
    hidden = block.config.alpha_mlp_hidden
    extra = 2 * n * (2 + WINDOW) * d * d + 4 * n * hidden * WINDOW * d
    if block.config.history_kind == "qk":
        extra += 4 * n * d * WINDOW * keys
    return extra / plain.flops(keys)
