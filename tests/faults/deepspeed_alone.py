"""The faults of this folder on two ranks of DeepSpeed alone.

Every function makes a run of its own below `folder` and says in a few words what came out.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from torch import nn

from parallel.cpu.compat import prepare_deepspeed
from tests.distributed import run_ranks
from tests.faults.damage import damages

WIDTH = 64
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1},
}
STOPPED_BOUND = 45  # seconds that a stopped rank is waited for
GRACE = 5.0  # seconds that run_ranks gives the other ranks once one has ended


class Place(NamedTuple):
    """The point at which a save is cut short: rank, file, and how much of the file is written."""

    rank: int
    file: int
    half: bool


def build(timeout: float | None = None) -> Any:
    """An engine on the ranks that `run_ranks` has started."""
    prepare_deepspeed()
    limit = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, **limit)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]


def step(engine: Any, *, factor: float = 1.0) -> float:
    """One step on data that depends on the number of the step and the rank."""
    generator = torch.Generator().manual_seed(100 * engine.global_steps + engine.global_rank)
    x = torch.randn(4, WIDTH, generator=generator)
    loss = (engine(x) - x.flip(-1)).square().mean() * factor
    engine.backward(loss)
    engine.step()
    return loss.item()


def begun(folder: Path) -> None:
    """A checkpoint after the first step."""
    run_ranks(_save, 2, folder, init=False)


def _save(folder: Path) -> int:
    engine = build()
    step(engine)
    engine.save_checkpoint(str(folder))
    return 0


def _resume(folder: Path, tag: str | None = None) -> tuple[int, list[float]]:
    engine = build()
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    begun_at = engine.global_steps if path is not None else 0
    return begun_at, [step(engine) for _ in range(2)]


def resumed(folder: Path, tag: str | None = None) -> str:
    """The outcome of a restart: `step N`, `an error`, or `a silent start from the beginning`."""
    try:
        ((number, _), _) = run_ranks(_resume, 2, folder, tag, init=False)
    except AssertionError as error:
        return f"an error ({kinds_of_error(str(error))})"
    return f"step {number}" if number else "a silent start from the beginning"


def kinds_of_error(report: str) -> str:
    """The classes of the errors with which ranks have ended."""
    names = re.findall(r"^(?:E? *)?(?:\w+\.)*(\w+(?:Error|Exception))\b", report, re.MULTILINE)
    return ", ".join(dict.fromkeys(names)) or "no message"


def clean_resume(folder: Path) -> str:
    """A run that is stopped between two steps."""
    begun(folder)

    def undisturbed() -> list[float]:
        engine = build()
        return [step(engine) for _ in range(3)][1:]

    expected = run_ranks(undisturbed, 2, init=False)
    found = [losses for _, losses in run_ranks(_resume, 2, folder, init=False)]
    return "the same losses, bit for bit" if found == expected else "other losses"


def killed_in_a_save(folder: Path) -> str:
    """SIGKILL before and in the middle of every file of a save, on the rank that writes it."""
    begun(folder / "whole")
    counts = run_ranks(_second_save, 2, folder / "whole", None, init=False)
    places = [
        Place(rank, file, half)
        for rank in (0, 1)
        for file in range(counts[rank])
        for half in (0, 1)
    ]
    ends = Counter[str]()
    for number, place in enumerate(places):
        run = folder / str(number)
        begun(run)
        with pytest.raises(AssertionError, match=f"rank {place.rank}: exit -9"):
            run_ranks(_second_save, 2, run, place, init=False)
        ends[re.sub(r" \(.*", "", resumed(run))] += 1
    return f"{len(places)} kills: " + ", ".join(f"{n} x {end}" for end, n in sorted(ends.items()))


def _second_save(folder: Path, place: Place | None) -> int:
    """Files that this rank writes in the save after the second step; `place` kills its rank."""
    engine = build()
    engine.load_checkpoint(str(folder))
    step(engine)
    mine = place if place is not None and place.rank == engine.global_rank else None
    count = 0

    def reached(write_half: Callable[[], object]) -> None:
        nonlocal count
        if mine is not None and count == mine.file:
            if mine.half:
                write_half()
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    _observe_writes(reached)
    engine.save_checkpoint(str(folder))
    return count


def _observe_writes(reached: Callable[[Callable[[], object]], None]) -> None:
    """Tell of every file before it is written, with what writes half of it."""
    save, open_file = torch.save, builtins.open

    def observed_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        def write_half() -> None:
            buffer = io.BytesIO()
            save(content, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])

        reached(write_half)
        save(content, path, *args, **kwargs)

    def observed_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("latest") and "w" in mode:
            reached(lambda: open_file(path, mode).close())
        return open_file(path, mode, *args, **kwargs)

    torch.save, builtins.open = observed_save, observed_open


def full_disk(folder: Path) -> str:
    """Rank 1 cannot write more than 16 KiB to a file in the second save."""
    begun(folder)

    def save() -> None:
        engine = build()
        engine.load_checkpoint(str(folder))
        step(engine)
        with small_files() if engine.global_rank == 1 else nullcontext():
            engine.save_checkpoint(str(folder))

    try:
        run_ranks(save, 2, init=False)
        said = "no error"
    except AssertionError:
        said = "an error on the rank"
    latest = (folder / "latest").read_text()
    by_hand = resumed(folder, "global_step1")
    return (
        f"{said}; `latest` names {latest}; restart: {resumed(folder)}, with the old tag: {by_hand}"
    )


@contextmanager
def small_files(num_bytes: int = 1 << 14) -> Iterator[None]:
    """This process can write no file that is larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def latest_missing(folder: Path) -> str:
    begun(folder)
    (folder / "latest").unlink()
    return resumed(folder)


def latest_empty(folder: Path) -> str:
    begun(folder)
    (folder / "latest").write_text("")
    return resumed(folder)


def damaged(folder: Path, *, count: int = 100) -> str:
    """Bit flips and truncations of the files of weights and of optimizer states, half of each."""
    run_ranks(_save, 1, folder, init=False)
    (ends,) = run_ranks(_load_damaged, 1, folder, count, init=False, timeout=300.0)
    flipped = ", ".join(
        f"{ends[f'flip {end}']} {end}" for end in ("refused", "without effect", "wrong")
    )
    cut = sum(n for end, n in ends.items() if end.startswith("cut"))
    return f"bit flips: {flipped}; truncations: {ends['cut refused']} of {cut} refused"


def _load_damaged(folder: Path, count: int) -> Counter[str]:
    engine = build()
    engine.load_checkpoint(str(folder))
    expected, ends = _state(engine), Counter[str]()
    for path in sorted(folder.glob("global_step1/*.pt")):
        content = path.read_bytes()
        for what, damage in damages(content, count // 2, random.Random(1)):
            path.write_bytes(damage)
            kind = "flip" if "flipped" in what else "cut"
            try:
                engine.load_checkpoint(str(folder))
                same = all(map(torch.equal, expected, _state(engine)))
                ends[f"{kind} {'without effect' if same else 'wrong'}"] += 1
            except Exception:  # whatever it is, the file was refused
                ends[f"{kind} refused"] += 1
        path.write_bytes(content)
    return ends


def _state(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer.optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [
        state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    return [t.detach().clone() for t in (*engine.module.parameters(), *masters, *moments)]


class Canary:
    """An object whose unpickling creates a file, and nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def pickled_code(folder: Path) -> str:
    """An object in the file of the weights that makes a file when it is unpickled."""
    begun(folder)
    (path,) = folder.glob("global_step1/mp_rank_00_model_states.pt")
    content = torch.load(path, weights_only=False)
    torch.save(content | {"note": Canary(folder / "canary")}, path)
    end = resumed(folder)
    return f"{'executed' if (folder / 'canary').exists() else 'not executed'}, restart: {end}"


def stopped_rank(folder: Path) -> str:
    """SIGSTOP of rank 1, with a timeout of 10 s for all collectives."""

    def train() -> None:
        engine = build(timeout=10.0)
        for _ in range(3):
            step(engine)
        if engine.global_rank == 1:
            stop_here(folder)
        step(engine)

    folder.mkdir()
    return ended_after(lambda: run_ranks(train, 2, init=False, timeout=STOPPED_BOUND), folder)


def stop_here(folder: Path) -> None:
    (folder / "stopped").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGSTOP)


def ended_after(run: Callable[[], object], folder: Path) -> str:
    """When rank 0 has ended after `stop_here`."""
    try:
        run()
    except AssertionError as error:
        if "rank 0: not finished" in str(error):
            return f"not found in {STOPPED_BOUND} s"
    seconds = time.monotonic() - float((folder / "stopped").read_text()) - GRACE
    return f"ended after {seconds:.0f} s"


def modes(folder: Path) -> str:
    """Permissions of what a save leaves, under the usual umask of 022."""
    before = os.umask(0o022)
    try:
        begun(folder)
    finally:
        os.umask(before)
    return describe_modes(folder)


def describe_modes(folder: Path) -> str:
    found = {"folders": set[str](), "files": set[str](), "programs": set[str]()}
    for path in (folder, *folder.rglob("*")):
        mode = path.stat().st_mode & 0o777
        kind = "folders" if path.is_dir() else "programs" if mode & 0o111 else "files"
        found[kind].add(f"{mode:04o}")
    return ", ".join(f"{kind} {'/'.join(sorted(each))}" for kind, each in found.items() if each)


def not_a_number(folder: Path) -> str:
    """The loss of rank 1 becomes NaN in the second of three steps."""

    def train() -> tuple[list[float], int, bool]:
        engine = build()
        losses = [
            step(engine, factor=float("nan") if i == 1 and engine.global_rank == 1 else 1.0)
            for i in range(3)
        ]
        finite = all(bool(p.isfinite().all()) for p in engine.module.parameters())
        return losses, engine.skipped_steps, finite

    del folder
    (losses, skipped, finite), _ = run_ranks(train, 2, init=False)
    shown = "shows finite losses" if all(map(_is_finite, losses)) else "shows the NaN"
    return (
        f"{skipped} step skipped on all ranks, weights {'finite' if finite else 'not finite'}; "
        f"rank 0 {shown}"
    )


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")
