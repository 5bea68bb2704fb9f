"""How far runs in bf16 on 2 and 4 ranks are from one process, with either precision of the sums.

The other side of each is one process with the same ZeRO stage and micro-batches, so that a rank of
data or of a pipeline multiplies the same shapes: only sums over ranks can differ. Yardsticks are
one process that cuts the same batch otherwise, one at ZeRO-3 and one in fp32. Gradients are those
of the first step, before clipping; losses and norms also those of the steps after it, whose weights
differ. Every figure is the largest of all families and seeds (`--seeds` takes others).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.context import ParallelContext
from pretrain.config import RunConfig
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.distributed.process_groups import process_group
from pretrain.engine.build import build_engine
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision
from pretrain.run_data import open_training_data
from tests.benchmarks.timing import Table, machine
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.first_step import captured_gradients
from tests.pretrain.tiny_run import tiny_run, write_data

FAMILIES = ("llama", "daria_former", "mod", "agiformer")
MODELS = {name: CASES[name].config.model_dump() for name in FAMILIES}
MODELS["daria_former"]["weight_tying"] = False  # a pipeline names both copies of a tied matrix
SEEDS = (1, 2, 3, 4, 5)
SEQUENCES, STEPS, LEARNING_RATE = 8, 4, 1e-3
SUMS = ("fp32", "bf16")


class Layout(NamedTuple):
    """Its micro-batches are of `rows` sequences, all of them together `SEQUENCES` a step."""

    rows: int
    data: int = 1
    stage: int = 1
    pipeline: int = 1
    tensor: int = 1
    precision: str = "bf16"

    @property
    def ranks(self) -> int:
        return self.data * self.pipeline * self.tensor

    def config(self, folder: Path, family: str, seed: int) -> RunConfig:
        return tiny_run(
            folder,
            model=MODELS[family],
            parallel__pipeline=self.pipeline,
            parallel__tensor=self.tensor,
            training__batch_size=self.rows,
            training__gradient_accumulation_steps=SEQUENCES // self.rows // self.data,
            training__precision=self.precision,
            training__seed=seed,
        )


ALONE = (Layout(2), Layout(4), Layout(4, stage=3))
LAYOUTS = {
    "data 2": Layout(4, data=2),
    "data 2, ZeRO-3": Layout(4, data=2, stage=3),
    "data 4": Layout(2, data=4),
    "pipeline 2 x data 2": Layout(2, pipeline=2, data=2),
    "tensor 2": Layout(4, tensor=2),
    "tensor 2 x data 2": Layout(4, tensor=2, data=2),
}
YARDSTICKS = {
    "one process, one micro-batch": Layout(8),
    "one process, ZeRO-3": ALONE[-1],
    "one process in fp32": Layout(4, precision="fp32"),
}


class Trained(NamedTuple):
    """Losses and norms of the steps, and gradients of the first, whole, by name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]


class Deviation(NamedTuple):
    """The largest differences, relative: of a gradient to its norm, and of all to that of all."""

    loss: float = 0.0
    norm: float = 0.0
    all_gradients: float = 0.0
    gradient: float = 0.0
    later_loss: float = 0.0
    later_norm: float = 0.0


Key = tuple[str, int]  # family and seed


def tables(seeds: Sequence[int] = SEEDS) -> Iterator[Table]:
    """One table a precision of the sums; a row a layout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        alone = {layout: _trained(folder, layout, "fp32", seeds) for layout in ALONE}
        for sums in SUMS:
            rows = []
            for title, layout in LAYOUTS.items():
                if sums == "fp32" or layout.data > 1:
                    other = Layout(layout.rows, stage=layout.stage)
                    rows.append(_row(title, _trained(folder, layout, sums, seeds), alone[other]))
            if sums == "fp32":
                for title, layout in YARDSTICKS.items():
                    found = alone.get(layout) or _trained(folder, layout, sums, seeds)
                    rows.append(_row(title, found, alone[Layout(4)]))
            yield Table(
                f"Sums over data ranks in {sums}: largest of {len(FAMILIES)} families "
                f"({', '.join(FAMILIES)}) and seeds {', '.join(map(str, seeds))}",
                (
                    "",
                    "loss",
                    "norm",
                    "all gradients",
                    "one gradient",
                    f"loss, steps 2 to {STEPS}",
                    f"norm, steps 2 to {STEPS}",
                ),
                rows,
            )


def _row(title: str, found: Mapping[Key, Trained], alone: Mapping[Key, Trained]) -> Sequence[str]:
    most = _most(found, alone)
    return (title, *("equal" if value == 0 else f"{value:.1e}" for value in most))


def _trained(folder: Path, layout: Layout, sums: str, seeds: Sequence[int]) -> dict[Key, Trained]:
    """Every family and seed at a layout."""
    arguments = (folder, layout, sums, seeds)
    print(f"{layout}, sums in {sums}", file=sys.stderr, flush=True)
    merged: dict[Key, Trained] = {}
    for own in run_ranks(_train_each, layout.ranks, *arguments, init=False, timeout=900):
        for key, trained in own.items():
            merged.setdefault(key, trained).gradients.update(trained.gradients)
    return merged


def _train_each(
    folder: Path, layout: Layout, sums: str, seeds: Sequence[int]
) -> dict[Key, Trained]:
    found = {}
    with process_group(tensor_size=layout.tensor) as device:
        ctx = None
        for family in FAMILIES:
            for seed in seeds:
                config = layout.config(folder, family, seed)
                ctx = ctx or build_context(config, precision=build_precision(config), device=device)
                found[family, seed] = _train(config, layout, sums, ctx)
                gc.collect()
    return found


def _train(config: RunConfig, layout: Layout, sums: str, ctx: ParallelContext) -> Trained:
    values: dict[str, Any] = {"zero_optimization": {"stage": layout.stage}}
    path = Path(config.run_dir).with_name(f"{sums}_{dist.get_rank()}.json")
    path.write_text(json.dumps({**values, "communication_data_type": sums}))
    engine = build_engine(
        TrainSpec.of(config, resolve_ds_config(path, config, data_size=ctx.data.size), ctx)
    )
    gradients = captured_gradients(engine, ctx, stage=layout.stage)
    first: dict[str, torch.Tensor] = {}
    losses, norms = [], []
    with open_training_data(config, ctx.data) as loader:
        for _ in range(STEPS):
            result = engine.train_step(loader, learning_rate=LEARNING_RATE)
            losses.append(float(result.loss))
            norms.append(float(result.grad_norm))
            first = first or dict(gradients)
    return Trained(losses, norms, first)


def _most(found: Mapping[Key, Trained], alone: Mapping[Key, Trained]) -> Deviation:
    most: dict[str, float] = defaultdict(float)
    for key, expected in alone.items():
        for name, value in _deviation(found[key], expected)._asdict().items():
            most[name] = max(most[name], value)
    return Deviation(**most)


def _deviation(found: Trained, expected: Trained) -> Deviation:
    assert found.gradients.keys() == expected.gradients.keys()
    losses = _relative(found.losses, expected.losses)
    norms = _relative(found.norms, expected.norms)
    errors = {n: (found.gradients[n] - g).norm() for n, g in expected.gradients.items()}
    sizes = {name: gradient.norm() for name, gradient in expected.gradients.items()}
    size = torch.stack(list(sizes.values())).norm()
    # What cancels, as the gradient of a key's bias, is the rounding of its terms alone.
    kept = [name for name in sizes if sizes[name] > 1e-2 * size]
    return Deviation(
        loss=losses[0],
        norm=norms[0],
        all_gradients=float(torch.stack(list(errors.values())).norm() / size),
        gradient=max(float(errors[name] / sizes[name]) for name in kept),
        later_loss=max(losses[1:]),
        later_norm=max(norms[1:]),
    )


def _relative(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(found, expected, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.runs.bf16_layouts")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    print(f"## bf16_layouts\n\n{machine()}\n", flush=True)
    for table in tables(parser.parse_args().seeds):
        print(f"{table}\n", flush=True)
