"""Training step of a small llama in the engine of a run, beside transformers, litgpt and OLMo-core.

All run in this process on the same tokens, from the same weights, step by step in turn. The losses
of every step must agree, or the comparison is void. "transformers" is a plain loop as anyone writes
it; a run of ours also tells glibc to keep freed memory, which the second row gives that loop too.
With one thread (OMP_NUM_THREADS=1), seconds are CPU seconds, which other work on the cores changes
little.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import torch

from models.registry import get_family
from parallel.cpu.compat import keep_freed_memory
from pretrain.config import RunConfig
from pretrain.distributed.process_groups import process_group
from pretrain.metrics.flops import training_flops_per_token
from pretrain.metrics.profile import Phases
from tests.benchmarks import peers
from tests.benchmarks.operators import (
    ADAMW,
    ATTENTION,
    COMMUNICATION,
    PRODUCTS,
    Operators,
    Spent,
    of_compiled,
    total,
)
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.benchmarks.training import (
    OurStep,
    TheirStep,
    copy_weights,
    hf_weights,
    no_phase,
    random_batch,
    run_config,
    start_engine,
    transformers_model,
)

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "num_kv_heads": 2,
    "max_position_embeddings": 2048,
    "tie_embeddings": True,
}
TOKENS = 2048  # a step
ROUNDS, WARMUP, SPLIT_STEPS = 5, 1, 2
OURS, THEIRS, KEPT = "manyformer", "transformers", "transformers, freed memory kept"
PHASES = ("forward", "backward", "optimizer", "data")
Step = Any  # called with a batch, has `phase`


class Case(NamedTuple):
    precision: str
    sequence_length: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.precision}, {self.sequence_length}{', compiled' if self.compiled else ''}"


CASES = tuple(
    Case(precision, length, compiled)
    for precision in ("fp32", "bf16")
    for length in (512, 2048)
    for compiled in (False, True)
)


class Measured(NamedTuple):
    seconds: dict[str, list[float]]
    split: dict[str, dict[str, float]]
    operators: dict[str, dict[str, Spent]]  # by kind
    peak_bytes: dict[str, int]  # of eager steps


def tables(cases: tuple[Case, ...] = CASES) -> Iterator[Table]:
    """Of every case: speed and split, then of eager steps FLOPs, bytes and memory, then time by
    kind of kernel."""
    if missing := peers.missing():
        names = " and ".join(missing)
        yield Table(f"Not compared with {names}: get them with make ecosystem", (), ())
    for case in cases:
        measured = _in_a_new_process(case)
        yield _speed(case, measured)
        if not case.compiled:
            yield _work(case, measured)
        yield _kinds(case, measured)


def clock() -> Callable[[], float]:
    """CPU seconds with one thread, otherwise wall-clock time."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _in_a_new_process(case: Case) -> Measured:
    """DeepSpeed starts once in a process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, case).result()


def _measure(case: Case) -> Measured:
    config = run_config(
        SHAPE,
        seq_length=case.sequence_length,
        batch_size=TOKENS // case.sequence_length,
        precision=case.precision,
        compile=case.compiled,
    )
    others = _peers(config, case)  # before torch.distributed is initialised
    with process_group() as device, contextlib.redirect_stdout(io.StringIO()):
        engine = start_engine(config, device=device)
        model = transformers_model(config, device=device, dtype=torch.float32)
        copy_weights(config, engine.module, model)
        for other in others.values():
            weights = hf_weights(config, engine.module)
            other.load(weights, num_layers=config.model.num_layers)
        if case.compiled:
            model.compile(dynamic=False)
        theirs = TheirStep(model, autocast=case.precision == "bf16")
        steps: dict[str, Step] = {OURS: OurStep(engine), THEIRS: theirs, KEPT: theirs} | others
        return _run(case, config, steps)


def _peers(config: RunConfig, case: Case) -> dict[str, Step]:
    kinds: dict[str, Any] = {peers.LITGPT: peers.LitgptStep, peers.OLMO: peers.OlmoStep}
    return {
        name: kind(config, compiled=case.compiled)
        for name, kind in kinds.items()
        if name not in peers.missing()
    }


def _run(case: Case, config: RunConfig, steps: dict[str, Step]) -> Measured:
    losses: dict[int, list[float]] = {id(step): [] for step in steps.values()}

    def turn(name: str, step: Step) -> Callable[[], None]:
        own = losses[id(step)]

        def take() -> None:
            (_return_large_blocks if name not in (OURS, KEPT) else keep_freed_memory)()
            own.append(step(random_batch(config, seed=len(own))).item())

        return take

    turns = {name: turn(name, step) for name, step in steps.items()}
    seconds = interleaved(turns, rounds=ROUNDS, warmup=WARMUP, clock=clock())
    _check(case, {name: losses[id(step)] for name, step in steps.items()})
    split: dict[str, dict[str, float]] = {}
    operators: dict[str, dict[str, Spent]] = {}
    peaks: dict[str, int] = {}
    for name, step in steps.items():
        phases = _CpuPhases() if clock() is time.process_time else Phases(torch.device("cpu"))
        step.phase = phases
        for _ in range(SPLIT_STEPS):
            turns[name]()
        step.phase = None if name == OURS else no_phase
        split[name] = {key: each / SPLIT_STEPS for key, each in phases.seconds().items()}
        if case.compiled:
            operators[name] = of_compiled(turns[name])
        else:
            with Operators(clock()) as counted:
                turns[name]()
            operators[name] = dict(counted.by_kind)
            peaks[name] = _peak_bytes(turns[name])
    return Measured(seconds, split, operators, peaks)


def _check(case: Case, losses: dict[str, list[float]]) -> None:
    """Raise RuntimeError if a first loss, of equal weights, or any later one differs."""
    first = 1e-4 if case.precision == "fp32" else 0.02
    for name, theirs in losses.items():
        apart = [abs(a - b) for a, b in zip(losses[OURS], theirs, strict=False)]
        if apart[0] > first or max(apart) > 0.05:
            raise RuntimeError(f"{case}: losses of {name} differ by {apart}: no comparison")


class _CpuPhases(Phases):
    """The same in CPU seconds."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def _now(self) -> float:
        return time.process_time()


def _return_large_blocks() -> None:
    """Let glibc map and unmap large blocks again, as it does for a program that says nothing.

    It raises its threshold to 32 MB at most, once such blocks are freed (mallopt(3)). Smaller ones
    come from memory that stays with the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in {-3: 32 << 20, -4: 65_536}.items():  # M_MMAP_THRESHOLD, M_MMAP_MAX
            mallopt(option, value)


def _peak_bytes(step: Callable[[], None]) -> int:
    """The most that a step has allocated at a time beyond what is held between steps."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _speed(case: Case, measured: Measured) -> Table:
    rows = []
    for name, seconds in measured.seconds.items():
        split = measured.split[name]
        milliseconds = [f"{1e3 * split.get(phase, 0.0):.0f}" for phase in PHASES]
        communication = (
            "" if case.compiled else _milliseconds(measured.operators[name], COMMUNICATION)
        )
        over = "" if name == OURS else ratio(measured.seconds, OURS, name)
        rows.append((name, f"{TOKENS / median(seconds):,.0f}", over, *milliseconds, communication))
    title = (
        f"{case}: llama of {_num_parameters() / 1e6:.0f}M parameters, {TOKENS:,} tokens a step, "
        f"{torch.get_num_threads()} threads, medians of {ROUNDS}"
    )
    header = ("", "tokens/s", f"{OURS} is faster by", *(f"{phase} ms" for phase in PHASES))
    return Table(title, (*header, "communication ms"), rows)


def _work(case: Case, measured: Measured) -> Table:
    family = get_family("llama")
    config = family.config_cls.model_validate(SHAPE)
    flops = TOKENS * training_flops_per_token(family, config, case.sequence_length)
    rows = []
    for name, by_kind in measured.operators.items():
        all_of_it, floor = total(by_kind), total(by_kind, (PRODUCTS, ATTENTION, ADAMW))
        rows.append(
            (
                name,
                f"{measured.peak_bytes[name] / 1e6:,.0f}",
                f"{flops / 1e9:.0f}",
                f"{all_of_it.flops / 1e9:.0f}",
                f"{all_of_it.num_bytes / 1e9:.1f}",
                f"{all_of_it.num_bytes / floor.num_bytes:.2f}",
            )
        )
    title = (
        f"{case}: work of a step. The floor of the bytes are those of products, attention and "
        "AdamW, as if all else were fused into them"
    )
    header = ("", "MB allocated at a time", "GFLOPs of the model", "executed", "GB", "over floor")
    return Table(title, header, rows)


def _kinds(case: Case, measured: Measured) -> Table:
    kinds = sorted({kind for by_kind in measured.operators.values() for kind in by_kind})
    rows = [
        (name, *(_milliseconds(by_kind, kind) for kind in kinds))
        for name, by_kind in measured.operators.items()
    ]
    return Table(f"{case}: milliseconds of a step by kind of operator", ("", *kinds), rows)


def _milliseconds(by_kind: Mapping[str, Spent], kind: str) -> str:
    return f"{1e3 * by_kind.get(kind, Spent()).seconds:.0f}"


def _num_parameters() -> int:
    family = get_family("llama")
    return family.num_parameters(family.config_cls.model_validate(SHAPE))
