"""Hostile files at every place where a command reads one: nothing in them is ever run."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.distributed import run_ranks
from tests.hostile.commands import Outcome, fault_of_refusal
from tests.hostile.entries import Entry, entries, plant
from tests.hostile.payloads import payloads

# Payloads that each entry gets in an ordinary run; in the long one it gets all.
PER_ENTRY, PER_SLOW_ENTRY = 2, 1
# What is there before the payloads is no valid data set.
NEVER_VALID = {"preprocess hf:DIRECTORY: state.json"}


def _take_carelessly(file: Path, canary: Path) -> bool:
    """Read a file in the ways that this project never does; whether it ran."""
    data = file.read_bytes()
    ways = (
        lambda: pickle.loads(data),
        lambda: torch.load(file, weights_only=False),
        lambda: np.load(file, allow_pickle=True)["arr_0"],
        lambda: yaml.unsafe_load(data),
        lambda: pickle.loads(gzip.decompress(data)),
        lambda: pickle.loads(data[data.index(b"\x80") :]),
        lambda: exec(data),
    )
    for way in ways:
        with contextlib.suppress(Exception):
            way()
    time.sleep(0.05)  # one starts a process
    return canary.exists()


def _run_all_carelessly(folder: Path) -> list[str]:
    executed = []
    for name, data in payloads(folder / "canary").items():
        (folder / "payload").write_bytes(data)
        if _take_carelessly(folder / "payload", folder / "canary"):
            executed.append(name)
        (folder / "canary").unlink(missing_ok=True)
    return executed


def test_the_payloads_run_where_a_careless_reader_takes_them(tmp_path: Path) -> None:
    [executed] = run_ranks(_run_all_carelessly, 1, tmp_path, init=False)
    print(f"{len(executed)} of {len(payloads(tmp_path))} payloads run in a careless reader")
    harmless_so_far = set(payloads(tmp_path)) - set(executed)
    # What is dangerous in other readers: nested archives, jsonpickle, polyglots.
    assert len(harmless_so_far) <= 4, harmless_so_far


def _fault(outcome: Outcome) -> str | None:
    if outcome.crash or outcome.code == 2:
        return fault_of_refusal(outcome, alone=False)
    is_verdict = outcome.code == 3 and "DAMAGED" in outcome.out
    # Some payloads are valid text, or valid files with something behind: they may be read.
    return None if outcome.code == 0 or is_verdict else f"{outcome}"


def _attack(folder: Path, everything: bool) -> tuple[int, int, list[str]]:
    canary = folder / "canary"
    hostile = list(payloads(canary).items())
    places = entries(folder)
    faults = [f"{entry.name}: not valid before" for entry in places if not _is_valid(entry)]
    attempts = begin = 0
    for entry in places:
        count = PER_SLOW_ENTRY if entry.is_slow else PER_ENTRY
        count = len(hostile) if everything else count
        # Each entry goes on where the last one stopped, so that few for each are all in turn.
        for name, data in itertools.islice(itertools.cycle(hostile), begin, begin + count):
            attempts += 1
            if fault := _attempt(entry, data, canary):
                faults.append(f"{entry.name} <- {name}: {fault}")
        begin = (begin + count) % len(hostile)
    return len(places), attempts, faults


def _is_valid(entry: Entry) -> bool:
    """Whether its command takes what stands there, so that a refusal is one of the payload."""
    if not entry.file.exists() or entry.name in NEVER_VALID or entry.name.startswith("resume"):
        return True
    return entry.run().code == 0


def _attempt(entry: Entry, data: bytes, canary: Path) -> str | None:
    restore = plant(entry, data)
    try:
        outcome = entry.run()
    finally:
        restore()
    if canary.exists():
        canary.unlink()
        return "IT RAN"
    return _fault(outcome)


def _check(folder: Path, *, everything: bool) -> None:
    [(places, attempts, faults)] = run_ranks(
        _attack, 1, folder, everything, init=False, timeout=3000
    )
    executed = sum(fault.endswith("IT RAN") for fault in faults)
    print(
        f"{attempts} hostile files at {places} entry points: {executed} executions, "
        f"{len(faults) - executed} other faults"
    )
    assert faults == [], "\n".join(faults[:20])


def test_nothing_in_a_hostile_file_is_run(tmp_path: Path) -> None:
    _check(tmp_path, everything=False)


@pytest.mark.slow
def test_nothing_in_any_hostile_file_is_run_anywhere(tmp_path: Path) -> None:
    _check(tmp_path, everything=True)
