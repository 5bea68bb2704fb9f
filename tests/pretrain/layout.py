"""A layout to try: how a run is spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SEQUENCES = 4  # of all data ranks in a micro-batch


class Layout(NamedTuple):
    """Sizes of the axes, ZeRO stage and what is offloaded. The global batch is the same at each."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    stage: int = 1
    sequence_parallel: bool = False
    offload: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def changes(self) -> dict[str, Any]:
        return {
            "parallel__tensor": self.tensor,
            "parallel__pipeline": self.pipeline,
            "parallel__expert": self.expert,
            "parallel__sequence_parallel": self.sequence_parallel,
            "training__batch_size": SEQUENCES // self.data,
        }

    def file(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON of this layout with `settings`, dotted key -> value."""
        offload = {f"zero_optimization.{name}": {"device": "cpu"} for name in self.offload}
        values: dict[str, Any] = {}
        for key, value in {
            "zero_optimization.stage": self.stage, **offload, **settings
        }.items():  # fmt: skip
            *parents, name = key.split(".")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[name] = value
        return values
