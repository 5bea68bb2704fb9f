"""The rendezvous: its host name, its port, and the interfaces that variables name."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping

from pretrain.distributed.launcher_env import environment_number
from pretrain.doctor.findings import Finding

SECTION = "network"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def check_network(
    environment: Mapping[str, str], *, ranks: int, has_other_nodes: bool = False
) -> Iterator[Finding]:
    """Findings about where the ranks meet; nothing is sent."""
    for name in _INTERFACES:
        if environment.get(name):
            yield _interface(name, environment[name])
    if ranks == 1:
        yield Finding(SECTION, "ok", "one rank needs no network")
        return
    given = environment.get("MASTER_ADDR")
    host = given or socket.gethostname()
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        name = "MASTER_ADDR" if given else "the name of this machine"
        yield Finding(
            SECTION,
            "error",
            f"{name}={host} cannot be resolved ({error.strerror or error})",
            "set MASTER_ADDR to an address of the first node, or add the name to DNS or /etc/hosts",
        )
        return
    if has_other_nodes and str(address).startswith(("127.", "::1")):
        yield Finding(
            SECTION,
            "error",
            f"{host} is {address}, which other nodes cannot reach",
            "set MASTER_ADDR to an address of the first node, or correct /etc/hosts",
        )
        return
    yield Finding(SECTION, "ok", f"{host} is {address}")
    if "MASTER_PORT" in environment:
        port = environment_number("MASTER_PORT", environment=dict(environment))
        yield _port(str(address), port)


def _port(address: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
    except OverflowError:
        return Finding(
            SECTION, "error", f"MASTER_PORT={port} is no port", "set it to a number below 32768"
        )
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return Finding(SECTION, "ok", f"MASTER_PORT={port} is on another machine, {address}")
        return Finding(
            SECTION,
            "error",
            f"MASTER_PORT={port} cannot be used on {address} ({error.strerror})",
            "set MASTER_PORT to a free port, or end the process that listens there",
        )
    return Finding(SECTION, "ok", f"MASTER_PORT={port} is free")


def _interface(variable: str, value: str) -> Finding:
    """Both take a list of names; those of NCCL are prefixes, exact after = and excluded after ^."""
    here = [name for _, name in socket.if_nameindex()]
    excluded, names = value.startswith("^"), value.lstrip("^=").split(",")
    is_exact = value.lstrip("^").startswith("=") or variable.startswith("GLOO")
    found = [
        name
        for name in here
        if any(name == each or (not is_exact and name.startswith(each)) for each in names)
    ]
    usable = [name for name in here if name not in found] if excluded else found
    if usable:
        return Finding(SECTION, "ok", f"{variable}={value} is {', '.join(usable)}")
    return Finding(
        SECTION,
        "error",
        f"{variable}={value} names no interface of {socket.gethostname()}",
        f"set it to one of {', '.join(here)}",
    )
