"""Rendezvous of the ranks of a run, with a timeout and a message that names missing ranks."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from pretrain.distributed.launcher_env import environment_number
from pretrain.errors import ConfigError, RendezvousError

_REPORT_INTERVAL = 60.0  # seconds between rank 0's reports of missing ranks
_FOREVER = timedelta(days=365)
_DRAIN_SECONDS = 1.0  # seconds that rank 0 keeps the store open for the others on failure
_MAX_LISTED = 16  # missing ranks listed in a message


class World(NamedTuple):
    """Rank, local rank and world size, as set by `deepspeed`, `torchrun` or `accelerate`."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def from_environment(cls) -> World:
        """RANK, LOCAL_RANK and WORLD_SIZE; one process when none of them is set.

        Raises:
            ConfigError: one of them is not a number.
        """
        return cls(
            rank=environment_number("RANK", 0),
            local_rank=environment_number("LOCAL_RANK", 0),
            size=environment_number("WORLD_SIZE", 1),
        )


def rendezvous(world: World, *, purpose: str, timeout: float | None) -> dist.Store:
    """Wait for all ranks; returns the store over which they set up their process groups.

    `purpose`, such as the run directory, tells apart runs that use one address by mistake.
    `timeout`: seconds; None: wait for ever. Under torchrun the store is that of its agent,
    elsewhere rank 0 owns it.

    Raises:
        ConfigError: the address is missing or in use, or ranks are missing at the timeout.
        RendezvousError: rank 0 is missing or has exited, or another run uses the address.
    """
    if "MASTER_ADDR" not in os.environ:
        if world.size > 1:
            raise ConfigError(
                f"WORLD_SIZE={world.size} without MASTER_ADDR and MASTER_PORT; "
                "start with deepspeed, torchrun or accelerate launch"
            )
        return dist.HashStore()
    began = time.monotonic()
    limit = _FOREVER if timeout is None else timedelta(seconds=timeout)
    store = _open(world, limit)
    _register(world, store, purpose)
    _wait_for_all(world, store, began=began, limit=limit.total_seconds())
    return store


def _open(world: World, limit: timedelta) -> dist.Store:
    port = os.environ.get("MASTER_PORT", "")
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT={port!r} must be a port from 1 to 65535; export a free one")
    # torchrun may restart ranks while its agent keeps the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_store_owner = world.rank == 0 and not of_agent
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(port),
            is_master=is_store_owner,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if is_store_owner:
            raise ConfigError(
                f"cannot open the rendezvous at {_address()} ({reason}); "
                "choose a free port with --master_port"
            ) from error
        raise RendezvousError(
            f"rank 0 does not answer at {_address()} ({reason}): it has not started, has ended, or "
            "MASTER_ADDR and MASTER_PORT are not its own"
        ) from error
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _register(world: World, store: dist.Store, purpose: str) -> None:
    """Register this rank in the store.

    Raises:
        RendezvousError: another run uses the address, or another process has this rank.
    """
    own = f"{world.size} ranks, {purpose}"
    first = store.compare_set("run", "", own).decode()
    if first != own:
        raise RendezvousError(
            f"two runs meet at {_address()}: one of {first} and this one of {own}; "
            "give one of them another port with --master_port"
        )
    here = f"process {os.getpid()} on {socket.gethostname()}"
    there = store.compare_set(f"rank_{world.rank}", "", here).decode()
    if there != here:
        raise RendezvousError(
            f"rank {world.rank} is taken at {_address()} by {there}: another job meets there; "
            "choose a free port with --master_port"
        )


def _wait_for_all(world: World, store: dist.Store, *, began: float, limit: float) -> None:
    # A process that uses one address twice, as tests do, may find its old store.
    if store.add("number", 1) % world.size == 0:
        store.set("complete", "")
    while True:
        waited = time.monotonic() - began
        remaining = limit - waited
        try:
            store.wait(
                ["complete"], timedelta(seconds=max(0.001, min(_REPORT_INTERVAL, remaining)))
            )
            return
        except dist.DistStoreError:
            waited = time.monotonic() - began
            if waited < limit and world.rank > 0:
                continue
            missing = _describe_missing(world, store, waited)
        except dist.DistError as error:
            raise RendezvousError(f"rank 0 has ended before all ranks met: {error}") from error
        if waited >= limit:
            if world.rank == 0:
                time.sleep(_DRAIN_SECONDS)
            raise ConfigError(f"{missing}; see their logs, or raise watchdog.timeout")
        sys.stderr.write(f"waiting: {missing}\n")


def _describe_missing(world: World, store: dist.Store, waited: float) -> str:
    missing = [rank for rank in range(world.size) if not store.check([f"rank_{rank}"])]
    names = ", ".join(map(str, missing[:_MAX_LISTED]))
    if len(missing) > _MAX_LISTED:
        names += ", ..."
    return (
        f"{world.size - len(missing)}/{world.size} ranks have joined at {_address()} after "
        f"{waited:.0f} s; missing: rank {names}"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
