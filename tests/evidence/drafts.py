"""Savings of drafts of the diffusion stream in decoding, at a size where a forward pass dominates.

First the passes, of models that are not trained: a cycle of speculative decoding is one pass that
drafts a block and one that verifies it, so that it pays from `even` bytes a cycle on. Then models
trained for a few steps, on two texts: lines of a log, most of which the next bytes can be told of,
and the source of `language`. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.dart.config import DARTConfig
from models.dart.generation import Generated, Stream
from models.dart.layers import BlockInputs
from models.dart.model import FAMILY
from models.dart.modes import Request, continue_rows
from models.dart.sampling import Sampling
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.evidence.language import VOCAB, Arm, Corpus, bits_per_byte
from tests.evidence.training import Batch, Trained, over_seeds, train

STEPS, LR, ROWS, LENGTH = 60, 4e-3, 4, 128
PROMPT, TOTAL, ROUNDS, TEST_ROWS = 64, 128, 5, 8
SIZES = ((256, 4), (512, 8), (768, 12))  # width, layers of both streams
TRAINED_SIZE = (384, 6)
BLOCK_SIZES = (4, 8, 16)
TRAINED_BLOCK = 8
_NAMES = ("index", "backup", "report", "mirror", "cleanup", "archive", "billing", "mail")


def config_of(size: tuple[int, int], *, block_size: int = TRAINED_BLOCK) -> DARTConfig:
    width, num_layers = size
    return DARTConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_layers=num_layers,
        num_heads=max(1, width // 64),
        num_kv_heads=max(1, width // 64),
        max_position_embeddings=256,
        diffusion_steps=64,
        block_size=block_size,
    )


def log_lines(num_bytes: int, *, seed: int) -> Tensor:
    """Bytes uint8 of lines with a fixed form, a random name, worker, time and result."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    text = bytearray()
    while len(text) < num_bytes:
        name, result = _NAMES[below(len(_NAMES))], ("succeeded", "was skipped")[below(2)]
        text += f"INFO worker-{below(8)}: job {name} {result} after {below(60)} s\n".encode()
    return torch.frombuffer(text, dtype=torch.uint8)[:num_bytes]


def texts() -> dict[str, Corpus]:
    made = [log_lines(200_000, seed=seed) for seed in range(3)]
    return {"lines of a log": Corpus(*made), "Python source": Corpus.of_the_library()}


def fit(config: DARTConfig, corpus: Corpus, *, seed: int, steps: int) -> Trained:
    def source() -> Iterator[Batch]:
        generator, text = torch.Generator().manual_seed(seed), corpus.train
        while True:
            starts = torch.randint(len(text) - LENGTH, (ROWS, 1), generator=generator)
            rows = text[starts + torch.arange(LENGTH + 1)].long()
            yield Batch(rows[:, :-1], rows[:, 1:])

    return train(FAMILY, config, source(), steps=steps, lr=LR, seed=seed)


@torch.no_grad()
def pass_times(config: DARTConfig, *, rounds: int = ROUNDS) -> dict[str, float]:
    """CPU seconds of a step of ar, a drafting pass and a verifying one behind `PROMPT` bytes."""
    size = config.block_size
    start = PROMPT // size * size
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single(), seed=0).eval()
    stream = Stream(model, config, 1, 256)
    tokens = torch.zeros(1, 256, dtype=torch.long)
    stream.advance(tokens[:, :start])
    hidden = torch.ones(1, size, dtype=torch.bool)
    levels = torch.tensor([config.diffusion_steps])
    inputs = BlockInputs(tokens[:, :1], tokens[:, :size], hidden, levels)

    def advanced(count: int) -> None:
        stream.advance(tokens[:, :count])
        stream.rollback(start)

    calls: dict[str, Callable[[], object]] = {
        "ar": functools.partial(advanced, 1),
        "draft": functools.partial(stream.denoise, start, inputs),
        "check": functools.partial(advanced, size + 1),
    }
    seconds = interleaved(calls, rounds=rounds, warmup=2, clock=time.process_time)
    return {name: statistics.median(each) for name, each in seconds.items()}


def written(
    trained: Trained, config: DARTConfig, row: Tensor, mode: Any, temperature: float
) -> Generated:
    """`row` [1, PROMPT] continued to `TOTAL` bytes from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature, None, None, generator=generator)
    return continue_rows(trained.model, config, row, Request(mode, TOTAL, sampling))


def saved(
    trained: Trained, config: DARTConfig, prompts: Tensor, temperature: float, *, rounds: int
) -> tuple[str, ...]:
    """Bytes per cycle, bytes per sequential pass, CPU time of ar over that of speculation."""
    ours = [written(trained, config, row, "speculative", temperature) for row in prompts.split(1)]
    new, passes = len(prompts) * (TOTAL - PROMPT), sum(each.num_passes for each in ours)

    def all_rows(mode: str) -> list[Generated]:
        return [written(trained, config, row, mode, temperature) for row in prompts.split(1)]

    calls: dict[str, Callable[[], object]] = {
        mode: functools.partial(all_rows, mode) for mode in ("speculative", "ar")
    }
    seconds = interleaved(calls, rounds=rounds, warmup=0, clock=time.process_time)
    return f"{2 * new / passes:.2f}", f"{new / passes:.2f}", ratio(seconds, "speculative", "ar")


def tables(
    num_seeds: int,
    *,
    steps: int = STEPS,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    trained_size: tuple[int, int] = TRAINED_SIZE,
    rounds: int = ROUNDS,
) -> Iterator[Table]:
    """Times of passes by size and block, then decoding with trained models."""
    rows: list[tuple[str, ...]] = []
    for size in sizes:
        for block_size in BLOCK_SIZES:
            config = config_of(size, block_size=block_size)
            found = pass_times(config, rounds=rounds)
            even = (found["draft"] + found["check"]) / found["ar"]
            rows.append(
                (
                    f"{size[0]} wide, {size[1]} layers, blocks of {block_size}",
                    f"{FAMILY.num_parameters(config) / 1e6:.1f}M",
                    f"{1000 * found['ar']:.1f}",
                    f"{found['draft'] / found['ar']:.2f}",
                    f"{found['check'] / found['ar']:.2f}",
                    f"{even:.2f}",
                )
            )
    header = ("", "parameters", "step of ar, ms", "draft / step", "check / step", "even")
    yield Table("Passes at batch 1, without training", header, rows)
    config, rows = config_of(trained_size), []
    for name, corpus in texts().items():
        fitted = [fit(config, corpus, seed=seed, steps=steps) for seed in range(num_seeds)]
        arm = Arm(FAMILY, config)
        bits = [bits_per_byte(each, arm, corpus.test, rows=TEST_ROWS) for each in fitted]
        starts = torch.tensor([1000, 50_000]).clamp(max=len(corpus.test) - PROMPT).unsqueeze(1)
        prompts = corpus.test[starts + torch.arange(PROMPT)].long()
        for temperature in (1.0, 0.0):
            found = saved(fitted[0], config, prompts, temperature, rounds=rounds)
            rows.append((f"{name}, temperature {temperature:g}", over_seeds(bits), *found))
            print(rows[-1], flush=True)
    header = (
        "", "bits per byte", "bytes per cycle", "bytes per pass", "time of ar over speculation",
    )  # fmt: skip
    yield Table(f"Speculative decoding after {steps} steps, seed 0", header, rows)
