"""Ranks that do not meet report it, in time and in one line."""

from __future__ import annotations

import os
import re
import socket
import time
from functools import partial

import pytest
import torch.distributed as dist

from pretrain.distributed.rendezvous import World, rendezvous
from pretrain.errors import ConfigError, RendezvousError
from tests.distributed import free_port, run_ranks
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=ConfigError)

PURPOSE = "runs/a"


def _meet(
    come: set[int], timeout: float, purposes: dict[int, str] | None = None
) -> tuple[str, str, float]:
    """What `meet` raises on a rank that comes: type, text and seconds."""
    began, world = time.monotonic(), World.from_environment()
    if world.rank not in come:
        return "", "", 0.0
    try:
        store = rendezvous(
            world, purpose=(purposes or {}).get(world.rank, PURPOSE), timeout=timeout
        )
    except (ConfigError, RendezvousError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    store.set(f"done_{world.rank}", "")
    store.wait([f"done_{rank}" for rank in come])  # rank 0 keeps it for the others
    time.sleep(0.2 if world.rank == 0 else 0)
    return "met", "", time.monotonic() - began


def test_ranks_that_all_come_meet():
    assert [kind for kind, *_ in run_ranks(_meet, 3, {0, 1, 2}, 10.0, init=False)] == ["met"] * 3


def test_a_missing_rank_is_named_and_the_others_counted():
    (kind, said, waited), *others = run_ranks(_meet, 4, {0, 1, 3}, 5.0, init=False)
    assert kind == "ConfigError"
    assert re.fullmatch(
        r"3/4 ranks have joined at 127.0.0.1:\d+ after 5 s; missing: rank 2; see their logs, or "
        "raise watchdog.timeout",
        said,
    )
    assert waited < 60  # torch alone waits for half an hour
    assert {kind for kind, *_ in (others[0], others[2])} <= {"ConfigError", "RendezvousError"}


def test_a_missing_rank_0_is_named_by_the_others():
    _, (kind, said, waited) = run_ranks(_meet, 2, {1}, 1.0, init=False)
    assert kind == "RendezvousError"
    assert re.match(r"rank 0 does not answer at 127.0.0.1:\d+ .*MASTER_ADDR and MASTER_PORT", said)
    assert waited < 60


def test_two_runs_at_one_address_are_told_apart():
    results = run_ranks(_meet, 2, {0, 1}, 2.0, {0: "runs/a", 1: "runs/b"}, init=False)
    told = [said for kind, said, _ in results if kind == "RendezvousError"]
    assert any("two runs meet at 127.0.0.1:" in said and "another port" in said for said in told)


def _same_rank_twice() -> str:
    os.environ["WORLD_SIZE"] = "3"
    if dist_rank() == 1:
        time.sleep(0.3)
        os.environ["RANK"] = "0"
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # connect and do not listen
    try:
        rendezvous(World.from_environment(), purpose=PURPOSE, timeout=1.5)
    except (ConfigError, RendezvousError) as error:
        return str(error)
    return "met"


def dist_rank() -> int:
    return int(os.environ["RANK"])


def test_a_second_process_of_the_same_rank_is_refused():
    _, said = run_ranks(_same_rank_twice, 2, init=False)
    assert re.match(r"rank 0 is taken at 127.0.0.1:\d+ by process \d+ on ", said)


@pytest.mark.parametrize("port", ["", "0", "65536", "http"])
def test_a_port_that_is_none_is_refused(port, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with _refused("MASTER_PORT", value=repr(port), constraint="65535", remedy="export"):
        rendezvous(World(0, 0, 2), purpose=PURPOSE, timeout=1.0)


def test_a_port_in_use_is_named_with_the_remedy(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with _refused("127.0.0.1", value=port, constraint="rendezvous", remedy="free port"):
            rendezvous(World(0, 0, 2), purpose=PURPOSE, timeout=1.0)


def test_a_host_name_that_is_unknown_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with assert_refused(
        "rank",
        value=0,
        constraint="no-such-host.invalid",
        remedy=("MASTER_ADDR", "MASTER_PORT"),
        error=RendezvousError,
    ):
        rendezvous(World(1, 0, 2), purpose=PURPOSE, timeout=1.0)


def test_a_process_alone_needs_no_port(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert isinstance(rendezvous(World(0, 0, 1), purpose=PURPOSE, timeout=1.0), dist.Store)
