"""Cost of a Daria-Former block: training steps over their FLOPs, operations and bytes beside a
llama of the same width, depth, heads and feed-forward size, and where the time goes.

Times are CPU seconds of this process on one thread: other work on the cores then changes them
little. A step is a forward and a backward pass over one row. An operation is one call of torch that
computes something, which is a kernel on CUDA; bytes are those of the tensors that it is given and
makes. Those of a block are the difference between a model of two and one of four blocks.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.base import LossOutput, ModelFamily, TokenInputs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.model import FAMILY as DARIA_FORMER
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.cpu.compat import prepare_environment
from pretrain.engine.build import compile_layers
from tests.benchmarks.operators import ATTENTION, PRODUCTS, Operators, total
from tests.benchmarks.timing import Table, interleaved
from tests.gpu.checks import Operations

OURS, THEIRS, COMPILED = "daria_former", "llama", ", compiled"
VOCAB, LENGTH, WIDTHS, ROUNDS = 4096, 1024, (512, 768), 7
TIMED_BLOCKS, COUNTED_BLOCKS = 4, (2, 4)
KINDS = (PRODUCTS, ATTENTION)


class Model(NamedTuple):
    family: ModelFamily
    config: Any

    @property
    def flops(self) -> float:
        return self.family.flops(self.config, LENGTH)


def models(width: int, blocks: int) -> dict[str, Model]:
    """The published `small()` at another width and depth, an update site in every block, and the
    llama of its sizes."""
    ours = DariaFormerConfig(
        vocab_size=VOCAB,
        hidden_dim=width,
        num_layers=blocks,
        num_heads=width // 64,
        num_kv_heads=4,
        max_seq_len=LENGTH,
        esv_sites=blocks,
    )
    theirs = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=ours.ffn_size,
        num_layers=blocks,
        num_heads=ours.num_heads,
        num_kv_heads=ours.num_kv_heads,
        max_position_embeddings=LENGTH,
        tie_embeddings=True,
    )
    return {OURS: Model(DARIA_FORMER, ours), THEIRS: Model(LLAMA, theirs)}


class Step:
    """A forward and a backward pass over a row of random tokens."""

    def __init__(self, model: Model) -> None:
        self.model = model
        specs = model.family.layer_specs(model.config)
        self.built = SequentialModel(specs, ParallelContext.single()).train()
        stream = torch.randint(VOCAB, (1, LENGTH + 1), generator=torch.manual_seed(0))
        self.tokens, self.labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    def loss(self) -> Tensor:
        output = self.built(TokenInputs(self.tokens))
        family, config = self.model.family, self.model.config
        found: LossOutput = family.loss(output, self.labels, config=config, ctx=self.built.ctx)
        return found.total

    def __call__(self) -> None:
        self.loss().backward()
        self.built.zero_grad()


class Count(NamedTuple):
    """Operations and bytes, forward and backward."""

    forward: int
    backward: int
    bytes: int


def counted(step: Step) -> Count:
    """Of a second step: the first makes tables that are kept."""
    step()
    with Operations() as forward:
        loss = step.loss()
    with Operations() as backward:
        loss.backward()
    step.built.zero_grad()
    return Count(forward.names.total(), backward.names.total(), forward.bytes + backward.bytes)


def per_block(name: str, width: int) -> Count:
    fewer, more = (counted(Step(models(width, blocks)[name])) for blocks in COUNTED_BLOCKS)
    blocks = COUNTED_BLOCKS[1] - COUNTED_BLOCKS[0]
    return Count(*((b - a) // blocks for a, b in zip(fewer, more, strict=True)))


def count_table(widths: Sequence[int] = WIDTHS) -> Table:
    """Operations and bytes of a block."""
    rows = []
    for width in widths:
        found = {name: per_block(name, width) for name in (THEIRS, OURS)}
        for name, count in found.items():
            over = count.bytes / found[THEIRS].bytes
            rows.append(
                (
                    f"{width} wide, {name}",
                    str(count.forward),
                    str(count.backward),
                    f"{count.bytes / 1e6:.0f}",
                    f"{over:.2f}",
                )
            )
    header = ("", "operations forward", "backward", "MB", "over llama's")
    return Table(f"A block, one row of {LENGTH} tokens, fp32", header, rows)


def step_tables(widths: Sequence[int] = WIDTHS, rounds: int = ROUNDS) -> Iterator[Table]:
    """Steps over their FLOPs, eager and with compiled layers, and where the time of both goes."""
    rows, spent = [], []
    for width in widths:
        pair = models(width, TIMED_BLOCKS)
        calls: dict[str, Callable[[], None]] = {name: Step(m) for name, m in pair.items()}
        for name, model in pair.items():
            calls[name + COMPILED] = compiled = Step(model)
            compile_layers(compiled.built, num_lengths=1)
        seconds = interleaved(
            calls, rounds=rounds, warmup=2, clock=time.process_time, before=gc.collect
        )
        flops = pair[OURS].flops / pair[THEIRS].flops
        for form in ("", COMPILED):
            both = zip(seconds[OURS + form], seconds[THEIRS + form], strict=True)
            low, middle, high = statistics.quantiles([a / b for a, b in both], n=4)
            per_flop = f"{middle / flops:.2f} ({low / flops:.2f} to {high / flops:.2f})"
            best = min(seconds[OURS + form]) / min(seconds[THEIRS + form]) / flops
            rows.append(
                (f"{width} wide{form}", f"{middle:.2f}", f"{flops:.3f}", per_flop, f"{best:.2f}")
            )
        parts = {name: spent_by_kind(calls[name]) for name in (THEIRS, OURS)}
        whole = sum(parts[THEIRS].values())
        spent += [
            (f"{width} wide, {name}", f"{pair[name].flops / pair[THEIRS].flops:.2f}",
             *(f"{part / whole:.2f}" for part in (*own.values(), sum(own.values()))))
            for name, own in parts.items()
        ]  # fmt: skip
    title = f"Step over llama's: {TIMED_BLOCKS} blocks, one row of {LENGTH} tokens, fp32"
    yield Table(title, ("", "time", "FLOPs", "time / FLOPs (quartiles)", "of the best"), rows)
    title = "Where the time of a step goes, in shares of llama's step, beside its FLOPs"
    yield Table(title, ("", "FLOPs", *KINDS, "other", "sum"), spent)


def spent_by_kind(call: Callable[[], None]) -> dict[str, float]:
    """CPU seconds of a step by kind of operator."""
    with Operators(time.process_time) as found:
        call()
    parts = {kind: found.by_kind[kind].seconds for kind in KINDS}
    return parts | {"other": total(found.by_kind).seconds - sum(parts.values())}


def tables() -> Iterator[Table]:
    """Operations and bytes, then times."""
    prepare_environment()  # as a run does
    torch.set_num_threads(1)
    yield count_table()
    yield from step_tables()
