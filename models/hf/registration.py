"""Layers built while another library has replaced how modules register parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def declarations_kept() -> Iterator[None]:
    """Keep what parameters declare, such as their sharding, inside the block.

    accelerate's init_empty_weights registers a new parameter on the meta device in place of every
    one, and passes attributes that this one has already to its class, which takes none of them. A
    parameter that is on the meta device needs no other, and stays tied to its first owner.
    """
    outer: Callable[..., None] = nn.Module.register_parameter
    if outer.__module__ == nn.Module.__module__:  # torch's own
        yield
        return

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta:
            module._parameters[name] = parameter
            return
        declared: dict[str, Any] = dict(parameter.__dict__)
        parameter.__dict__.clear()
        outer(module, name, parameter)
        module.get_parameter(name).__dict__.update(declared)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = outer  # type: ignore[method-assign]
