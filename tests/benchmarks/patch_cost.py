"""Cost of bytes in patches: training steps and generation over the length of the text, and a step
over what its FLOPs say, all beside a byte-level llama of the same width and depth.

Times are CPU seconds of this process on one thread: other work on the cores then changes them
little. Bytes for backward are the storages that autograd keeps, counted once each. llama stops at a
shorter length where its square would take minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY as AGIFORMER
from models.base import ModelFamily, TokenInputs
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.benchmarks.timing import Table, interleaved, ratio

VOCAB, OURS, THEIRS = 257, "agiformer", "llama"
LENGTHS = {OURS: (1024, 4096, 16_384, 65_536), THEIRS: (1024, 4096, 16_384)}
LONG_WIDTH, LONG_LAYERS, WINDOW, LONG_ROUNDS = 128, 2, 64, 2
STREAMS = {OURS: (1024, 65_536, 1_048_576), THEIRS: (1024, 65_536)}
STREAM_BYTES, STREAM_ROUNDS, PREFILL = 64, 5, 8192
STEP_WIDTHS, STEP_LAYERS, STEP_LENGTH, STEP_ROUNDS = (256, 512), 4, 1024, 5


class Model(NamedTuple):
    family: ModelFamily
    config: Any

    def built(self) -> SequentialModel:
        return SequentialModel(self.family.layer_specs(self.config), ParallelContext.single())


def models(width: int, layers: int, *, length: int) -> dict[str, Model]:
    """Both of one width, depth, feed-forward size and number of heads, for texts of a length."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_layers": layers,
        "num_heads": width // 32 if width < 256 else width // 64,
    }
    ours = AgiformerConfig(**shape, window_size=WINDOW, head_hidden=min(512, 2 * width))
    theirs = LlamaConfig(
        **shape,
        num_kv_heads=shape["num_heads"],
        max_position_embeddings=length,
        tie_embeddings=True,
    )
    return {OURS: Model(AGIFORMER, ours), THEIRS: Model(LLAMA, theirs)}


def random_text(length: int) -> Tensor:
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))


def step(model: Model, built: SequentialModel, length: int) -> Callable[[], object]:
    """One forward and backward pass of one row."""
    text = random_text(length + 1)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def call() -> None:
        output = built(TokenInputs(tokens))
        model.family.loss(output, labels, config=model.config, ctx=built.ctx).total.backward()
        built.zero_grad()

    return call


def kept_bytes(call: Callable[[], object], built: SequentialModel) -> int:
    """Bytes of the storages that a forward pass keeps for backward, without the weights'."""
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storages.values())


def long_steps(
    *, lengths: Mapping[str, Sequence[int]] = LENGTHS, rounds: int = LONG_ROUNDS
) -> Table:
    """Time and memory per byte of a training step, by length."""
    calls, kept = {}, {}
    for name in lengths:
        for length in lengths[name]:
            model = models(LONG_WIDTH, LONG_LAYERS, length=length)[name]
            built = model.built().train()
            calls[name, length] = step(model, built, length)
            kept[name, length] = kept_bytes(calls[name, length], built) / length
    named = {f"{name} {length}": call for (name, length), call in calls.items()}
    seconds = interleaved(named, rounds=rounds, warmup=0, clock=time.process_time)
    per_byte = {case: statistics.median(seconds["{} {}".format(*case)]) / case[1] for case in calls}
    rows = []
    for name, length in calls:
        shortest = name, lengths[name][0]
        rows.append(
            (
                f"{name}, {length:,}",
                f"{1e6 * per_byte[name, length]:.1f}",
                f"{per_byte[name, length] / per_byte[shortest]:.2f}",
                f"{kept[name, length]:,.0f}",
                f"{kept[name, length] / kept[shortest]:.2f}",
            )
        )
    title = f"Training step by bytes of the row, {LONG_LAYERS} layers of {LONG_WIDTH}"
    header = ("", "us per byte", "over the shortest", "bytes for backward per byte", "over")
    return Table(title, header, rows)


@torch.inference_mode()
def stream(model: Model, length: int, room: int) -> tuple[Callable[[], object], int]:
    """A call that feeds `STREAM_BYTES` bytes, one by one, to a text of `length`, and its cache.

    llama's cache is filled with random keys and values: their number is what a byte costs, and a
    prompt of 64K bytes would take minutes.
    """
    built = model.built().eval()
    cache = built.new_cache(1, room)
    if model.family is LLAMA:
        heads = model.config.num_heads
        size = model.config.hidden_size // heads
        for layer in cache.values():
            layer.append(*torch.randn(2, 1, heads, length, size))
    else:
        for chunk in random_text(length).split(PREFILL, dim=1):
            built(TokenInputs(chunk), cache)
    text = random_text(STREAM_BYTES)

    @torch.inference_mode()
    def call() -> None:
        for byte in text.split(1, dim=1):
            built(TokenInputs(byte), cache)

    call()  # so that every part has the room that it needs
    return call, _cache_bytes(cache)


def _cache_bytes(cache: Mapping[str, Any]) -> int:
    own = [part.num_bytes for part in cache.values() if hasattr(part, "num_bytes")]
    heads = [part.projected.num_bytes for part in cache.values() if hasattr(part, "projected")]
    return sum(own) + sum(heads)


def streams(
    *, lengths: Mapping[str, Sequence[int]] = STREAMS, rounds: int = STREAM_ROUNDS
) -> Table:
    """Time of a byte and size of the cache in generation, by what went before."""
    calls, sizes = {}, {}
    for name in lengths:
        for length in lengths[name]:
            room = length + STREAM_BYTES * (rounds + 3)
            model, case = models(LONG_WIDTH, LONG_LAYERS, length=room)[name], f"{name} {length}"
            calls[case], sizes[case] = stream(model, length, room)
    seconds = interleaved(calls, rounds=rounds, warmup=1, clock=time.process_time)
    rows = []
    for name in lengths:
        shortest, longest = (f"{name} {lengths[name][place]}" for place in (0, -1))
        common = f"{OURS} {lengths[THEIRS][-1]}"
        for length in lengths[name]:
            case = f"{name} {length}"
            rows.append(
                (
                    f"{name}, {length:,}",
                    f"{STREAM_BYTES / statistics.median(seconds[case]):,.0f}",
                    ratio(seconds, case, shortest),
                    f"{sizes[case]:,}",
                    ratio(seconds, common, case) if name == THEIRS and case == longest else "",
                )
            )
    title = f"Generation after so many bytes, one by one, {LONG_LAYERS} layers of {LONG_WIDTH}"
    header = ("", "bytes/s", "speed over the shortest", "cache bytes", f"{OURS} is faster by")
    return Table(title, header, rows)


def steps(*, widths: Sequence[int] = STEP_WIDTHS, rounds: int = STEP_ROUNDS) -> Table:
    """A step over llama's, beside the ratio of FLOPs."""
    rows = []
    for width in widths:
        pair = models(width, STEP_LAYERS, length=STEP_LENGTH)
        calls = {name: step(m, m.built().train(), STEP_LENGTH) for name, m in pair.items()}
        seconds = interleaved(calls, rounds=rounds, warmup=1, clock=time.process_time)
        flops = {name: m.family.flops(m.config, STEP_LENGTH) for name, m in pair.items()}
        share = flops[OURS] / flops[THEIRS]
        times = [a / b for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True)]
        taken = statistics.median(times)
        rows.append((f"{width} wide", f"{taken:.3f}", f"{share:.3f}", f"{taken / share:.2f}"))
    title = f"Step over llama's: {STEP_LAYERS} layers, one row of {STEP_LENGTH} bytes"
    return Table(title, ("", "time", "FLOPs", "time / FLOPs"), rows)


def tables() -> Iterator[Table]:
    """Steps over their FLOPs, steps by length, generation by length."""
    torch.set_num_threads(1)
    yield steps()
    yield long_steps()
    yield streams()
