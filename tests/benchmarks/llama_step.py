"""Training step of the llama family beside transformers' LlamaForCausalLM of the same shape.

    python -m tests.benchmarks.llama_step [--steps 20] [--threads 2] [--profile]

Both run in this process on the CPU: a plain loop of forward, backward, clipping and fused AdamW on
the same tokens, from the same weights, step by step in turn so that a busy machine slows both
alike. Prints tokens/s and the ratio for fp32 and bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.base import ModelFamily, TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.precision import Precision

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_layers": 6,
    "num_heads": 8,
    "num_kv_heads": 4,
    "max_position_embeddings": 512,
    "tie_embeddings": True,
}
BATCH_SIZE = 4
SEQ_LENGTH = 512
WARMUP_STEPS = 2


class Contestant(NamedTuple):
    name: str
    step: Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for precision in ("fp32", "bf16"):
        contestants = build(precision)
        seconds = measure(contestants, arguments.steps)
        report(precision, seconds)
        if arguments.profile:
            for contestant in contestants:
                print_profile(contestant)


def build(precision: str) -> list[Contestant]:
    """Ours and theirs with equal weights."""
    family = get_family("llama")
    config = family.config_cls.model_validate(SHAPE)
    ctx = ParallelContext.single(precision=Precision(precision))
    ours = SequentialModel(family.layer_specs(config), ctx).to(ctx.precision.dtype)
    theirs = transformers_model(family, config, ours).to(ctx.precision.dtype)
    objective = partial(family.loss, config=config, ctx=ctx)
    return [
        Contestant(
            "manyformer", trainer(ours, lambda x, y: objective(ours(TokenInputs(x)), y).total)
        ),
        Contestant(
            "transformers",
            # shift_labels: labels that are already shifted, as ours are
            trainer(theirs, lambda x, y: theirs(input_ids=x, labels=y, shift_labels=y).loss),
        ),
    ]


def transformers_model(family: ModelFamily, config: object, ours: nn.Module) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = family.hf.names(config)
    state = {names[name]: p.detach().clone() for name, p in ours.named_parameters()}
    contents = family.hf.to_config(config) | {"use_cache": False}
    model = LlamaForCausalLM._from_config(
        LlamaConfig.from_dict(contents), attn_implementation="sdpa"
    )
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def trainer(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(tokens: Tensor) -> Tensor:
        value = loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def batch() -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (BATCH_SIZE, SEQ_LENGTH + 1))


def measure(contestants: list[Contestant], steps: int) -> dict[str, list[float]]:
    """Seconds of every timed step; the losses must agree, or the comparison is void."""
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    for number in range(WARMUP_STEPS + steps):
        tokens = batch()
        losses = []
        for name, step in contestants if number % 2 == 0 else contestants[::-1]:
            begin = time.perf_counter()
            losses.append(step(tokens).item())
            if number >= WARMUP_STEPS:
                seconds[name].append(time.perf_counter() - begin)
        if abs(losses[0] - losses[1]) > 0.05:
            raise RuntimeError(f"the two models compute different losses: {losses}")
    return seconds


def report(precision: str, seconds: dict[str, list[float]]) -> None:
    """Rates of the median step; the ratio is the median over pairs of neighbouring steps."""
    tokens = BATCH_SIZE * SEQ_LENGTH
    for name, times in seconds.items():
        print(f"{precision} {name:13s} {tokens / statistics.median(times):9.0f} tokens/s")
    pairs = zip(seconds["manyformer"], seconds["transformers"], strict=True)
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"{precision} ratio         {ratio:9.3f}")


def print_profile(contestant: Contestant) -> None:
    tokens = batch()
    with torch.profiler.profile() as profile:
        for _ in range(3):
            contestant.step(tokens)
    print(contestant.name)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
