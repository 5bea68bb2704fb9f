"""Cost of bytes in patches: training steps and generation over the length of the text, and a step
over what its FLOPs say, all beside a byte-level llama of the same width and depth.

Times are CPU seconds of this process on one thread: other work on the cores then changes them
little. Freed memory is kept, as in a run. Steps of all lengths have equally many bytes, in more or
fewer rows, so that what a step costs whatever its size is the same share of each; a single short
row stands beside them. llama's steps have a quarter as many, but for the longest row, which takes
minutes and is measured once, without warm-up. Bytes for backward are the storages that autograd
keeps, counted once each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY as AGIFORMER
from models.base import ModelFamily, TokenInputs
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.cpu.compat import prepare_environment
from tests.benchmarks.timing import Table, interleaved, ratio

VOCAB, OURS, THEIRS = 257, "agiformer", "llama"
# Rows and their bytes; "over the first" refers to the first of a model.
CASES = {
    OURS: ((64, 1024), (16, 4096), (4, 16_384), (1, 65_536), (1, 1024)),
    THEIRS: ((16, 1024), (4, 4096), (1, 16_384), (1, 65_536)),
}
LONG_WIDTH, LONG_LAYERS, WINDOW, LONG_ROUNDS = 128, 2, 64, 2
KERNELS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product",),
}
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


def random_text(length: int, *, rows: int = 1) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0))


class Step(NamedTuple):
    """A forward and a backward pass over rows of random text."""

    model: Model
    built: SequentialModel
    text: Tensor

    @classmethod
    def of(cls, model: Model, length: int, *, rows: int = 1) -> Step:
        return cls(model, model.built().train(), random_text(length + 1, rows=rows))

    def loss(self) -> Tensor:
        tokens, labels = self.text[:, :-1].contiguous(), self.text[:, 1:].contiguous()
        output = self.built(TokenInputs(tokens))
        family, config = self.model.family, self.model.config
        return family.loss(output, labels, config=config, ctx=self.built.ctx).total

    def __call__(self) -> None:
        self.loss().backward()
        self.built.zero_grad()

    def kept_bytes(self) -> int:
        """Bytes of the storages that a forward pass keeps for backward, without the weights'."""
        weights = {p.untyped_storage().data_ptr() for p in self.built.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()  # holds the storages while they are counted
        del loss
        return sum(storages.values())


class Case(NamedTuple):
    """A step of so many rows of a length."""

    name: str
    rows: int
    length: int

    @property
    def num_bytes(self) -> int:
        return self.rows * self.length

    def step(self) -> Step:
        model = models(LONG_WIDTH, LONG_LAYERS, length=self.length)[self.name]
        return Step.of(model, self.length, rows=self.rows)


ONCE = Case(THEIRS, 1, 65_536)


def long_steps(
    *, cases: Mapping[str, Sequence[tuple[int, int]]] = CASES, rounds: int = LONG_ROUNDS
) -> Table:
    """Time and memory per byte of a training step, by length."""
    steps = {case: case.step() for name in cases for case in (Case(name, *c) for c in cases[name])}
    kept = {case: step.kept_bytes() / case.num_bytes for case, step in steps.items()}
    named = {str(case): step for case, step in steps.items() if case != ONCE}
    seconds = interleaved(named, rounds=rounds, warmup=1, clock=time.process_time)
    if ONCE in steps:
        begin = time.process_time()
        steps[ONCE]()
        seconds[str(ONCE)] = [time.process_time() - begin]
    per_byte = {case: statistics.median(seconds[str(case)]) / case.num_bytes for case in steps}
    rows = []
    for case in steps:
        first = Case(case.name, *cases[case.name][0])
        rows.append(
            (
                f"{case.name}, {case.rows} x {case.length:,}",
                f"{1e6 * per_byte[case]:.1f}",
                f"{per_byte[case] / per_byte[first]:.2f}",
                f"{kept[case]:,.0f}",
                f"{kept[case] / kept[first]:.2f}",
            )
        )
    title = f"Training step by rows and their bytes, {LONG_LAYERS} layers of {LONG_WIDTH}"
    header = ("", "us per byte", "over the first", "bytes for backward per byte", "over")
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


def steps(*, widths: Sequence[int] = STEP_WIDTHS, rounds: int = STEP_ROUNDS) -> Iterator[Table]:
    """A step over llama's, beside the ratio of FLOPs; and where the time of both goes."""
    rows, spent = [], []
    for width in widths:
        pair = models(width, STEP_LAYERS, length=STEP_LENGTH)
        calls = {name: Step.of(model, STEP_LENGTH) for name, model in pair.items()}
        seconds = interleaved(calls, rounds=rounds, warmup=1, clock=time.process_time)
        flops = {name: m.family.flops(m.config, STEP_LENGTH) for name, m in pair.items()}
        share = flops[OURS] / flops[THEIRS]
        times = [a / b for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True)]
        taken = statistics.median(times)
        rows.append((f"{width} wide", f"{taken:.3f}", f"{share:.3f}", f"{taken / share:.2f}"))
        parts = {name: _spent(calls[name], rounds) for name in (THEIRS, OURS)}
        whole = sum(parts[THEIRS].values())
        spent += [
            (f"{width} wide, {name}", f"{flops[name] / flops[THEIRS]:.2f}",
             *(f"{part / whole:.2f}" for part in (*own.values(), sum(own.values()))))
            for name, own in parts.items()
        ]  # fmt: skip
    title = f"Step over llama's: {STEP_LAYERS} layers, one row of {STEP_LENGTH} bytes"
    yield Table(title, ("", "time", "FLOPs", "time / FLOPs"), rows)
    title = "Where the time of a step goes, in shares of llama's step, beside its FLOPs"
    yield Table(title, ("", "FLOPs", *KERNELS, "other", "sum"), spent)


def _spent(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """CPU time by kind of kernel."""
    parts = dict.fromkeys((*KERNELS, "other"), 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(rounds):
            call()
    for event in run.key_averages():
        found = (kind for kind, names in KERNELS.items() if event.key.startswith(names))
        parts[next(found, "other")] += event.self_cpu_time_total
    return parts


def tables() -> Iterator[Table]:
    """Steps over their FLOPs, steps by length, generation by length."""
    prepare_environment()  # as a run does
    torch.set_num_threads(1)
    yield from steps()
    yield long_steps()
    yield streams()
