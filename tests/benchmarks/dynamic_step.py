"""Savings of routing: training steps and decoding of the dynamic families beside llama's.

All models have the same width, depth and vocabulary and run in this process in turn. A step is one
forward and backward pass. The aim is that a step takes at most 1.15 times what its FLOPs say.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from models.base import ModelFamily, TokenInputs
from models.registry import get_config_class, get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.layer_state import layer_state_owners, update_layer_states
from tests.benchmarks.timing import Table, interleaved

SEQ_LENGTH, VOCAB, NUM_LAYERS = 1024, 512, 4
WIDTHS, GAMMAS = (512, 1024), (0.5, 0.25, 0.125)
ROUNDS, WARMUP = 5, 1
PROMPT, NEW_TOKENS, BATCHES = 128, 32, (1, 8, 32)
BASELINE = "llama"


class Model(NamedTuple):
    """A model on the device and what belongs to it."""

    family: ModelFamily
    config: Any
    layers: SequentialModel

    @property
    def flops(self) -> float:
        return self.family.flops(self.config, SEQ_LENGTH)


def tables() -> Iterator[Table]:
    """Steps of both widths, then decoding of the narrow one."""
    for width in WIDTHS:
        yield _steps(width)
    yield _decoding(WIDTHS[0])


def models_of(width: int) -> dict[str, Model]:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_layers": NUM_LAYERS,
        "num_heads": width // 64,
        "num_kv_heads": width // 64,
        "max_position_embeddings": SEQ_LENGTH,
        "qkv_bias": True,
    }
    cases = {BASELINE: (BASELINE, {})} | {
        f"{name} {gamma}": (name, {"capacity_gamma": gamma})
        for name in ("mod", "dtf")
        for gamma in GAMMAS
    }
    models = {}
    for label, (name, changes) in cases.items():
        family, config = get_family(name), get_config_class(name)(**(shape | changes))
        layers = SequentialModel(family.layer_specs(config), ParallelContext.single())
        models[label] = Model(family, config, layers)
    return models


def _steps(width: int) -> Table:
    models = models_of(width)
    stream = torch.randint(VOCAB, (1, SEQ_LENGTH + 1), generator=torch.manual_seed(0))
    seconds = interleaved(
        {label: _step(model, stream) for label, model in models.items()},
        rounds=ROUNDS,
        warmup=WARMUP,
    )
    rows = []
    for label, model in models.items():
        pairs = zip(seconds[label], seconds[BASELINE], strict=True)
        time = statistics.median(own / other for own, other in pairs)
        flops = model.flops / models[BASELINE].flops
        rows.append([label, f"{time:.2f}", f"{flops:.2f}", f"{time / flops:.2f}"])
    title = f"Step over llama's: {NUM_LAYERS} layers of {width}, {SEQ_LENGTH} tokens, fp32"
    return Table(title, ["model", "time", "FLOPs", "time / FLOPs"], rows)


def _step(model: Model, stream: torch.Tensor) -> Callable[[], None]:
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    def step() -> None:
        output = model.layers(TokenInputs(tokens))
        ctx = model.layers.ctx
        model.family.loss(output, labels, config=model.config, ctx=ctx).total.backward()
        model.layers.zero_grad()

    return step


@torch.inference_mode()
def _decoding(width: int) -> Table:
    models = models_of(width)
    rows = []
    for model in models.values():
        calibrate(model)
    for batch in BATCHES:
        prompts = torch.randint(VOCAB, (batch, PROMPT), generator=torch.manual_seed(batch))
        seconds = interleaved(
            {label: _decode(model, prompts) for label, model in models.items()},
            rounds=3,
            warmup=1,
        )
        for label, model in models.items():
            pairs = zip(seconds[label], seconds[BASELINE], strict=True)
            time = statistics.median(own / other for own, other in pairs)
            gamma = getattr(model.config, "capacity_gamma", 1.0)
            computed = (1 + 1 - (1 - gamma) ** batch) / 2  # layers that some row chooses
            size = _cache_bytes(model, batch) / _cache_bytes(models[BASELINE], batch)
            rows.append([label, str(batch), f"{time:.2f}", f"{computed:.2f}", f"{size:.2f}"])
    title = (
        f"{NEW_TOKENS} tokens after {PROMPT}, over llama's: {NUM_LAYERS} layers of {width}, fp32"
    )
    header = ["model", "batch", "time", "layers computed", "cache bytes"]
    return Table(title, header, rows)


def calibrate(model: Model) -> None:
    """Thresholds of random text, which is what is decoded here."""
    tokens = torch.randint(VOCAB, (4, PROMPT + NEW_TOKENS), generator=torch.manual_seed(9))
    model.layers(TokenInputs(tokens))
    update_layer_states(layer_state_owners(model.layers), ctx=model.layers.ctx)
    model.layers.eval()


def _decode(model: Model, prompts: torch.Tensor) -> Callable[[], None]:
    """Feed random tokens one by one after the prompt, which is not timed apart."""
    new = torch.randint(VOCAB, (len(prompts), NEW_TOKENS), generator=torch.manual_seed(5))

    def decode() -> None:
        cache = model.layers.new_cache(len(prompts), PROMPT + NEW_TOKENS)
        model.layers(TokenInputs(prompts), cache)
        for token in new.split(1, dim=1):
            model.layers(TokenInputs(token), cache)

    return decode


@torch.no_grad()
def _cache_bytes(model: Model, batch: int) -> int:
    """Reserved for a sequence of SEQ_LENGTH; a short one is dominated by the least room."""
    cache = model.layers.new_cache(batch, SEQ_LENGTH)
    model.layers(TokenInputs(torch.zeros(batch, 64, dtype=torch.int64)), cache)
    return sum(layer.num_bytes for layer in cache.values())
