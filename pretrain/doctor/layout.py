"""The ranks of the job against the layout, and the launcher that would start them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pretrain.config import RunConfig
from pretrain.config.layout import RunLayout
from pretrain.distributed.launcher_env import launcher_name
from pretrain.doctor.findings import Finding
from pretrain.doctor.shared_folder import Task

SECTION = "launcher and layout"


def smallest_world(config: RunConfig) -> int:
    """The fewest ranks that the layout of a configuration needs."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.expert


def check_layout_of_job(
    layout: RunLayout,
    *,
    ranks: int | None,
    ranks_per_node: int | None,
    environment: Mapping[str, str],
) -> Iterator[Finding]:
    """Findings about a layout that `resolve_run` accepts. `ranks`: None if nobody has said."""
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    size = layout.tensor * layout.pipeline * layout.data
    if ranks is None and size > 1:
        yield Finding(
            SECTION,
            "warning",
            f"the number of ranks is not known; checked with the fewest, {size} ({sizes})",
            "pass --ranks N, the GPUs of the job, to check batch, steps and data for them",
        )
    else:
        yield Finding(SECTION, "ok", f"{sizes} on {size} {'rank' if size == 1 else 'ranks'}")
    if ranks_per_node is not None and (ranks or size) % ranks_per_node:
        yield Finding(
            SECTION,
            "error",
            f"{ranks or size} ranks are not whole nodes of {ranks_per_node}",
            "correct --ranks or --ranks-per-node",
        )
    if ranks_per_node is not None and ranks_per_node % layout.tensor:
        yield Finding(
            SECTION,
            "warning",
            f"parallel.tensor={layout.tensor} crosses nodes of {ranks_per_node} ranks, so that "
            "every layer waits for the network",
            f"set parallel.tensor to a divisor of {ranks_per_node}",
        )
    if Task.of(environment) is None:  # else srun has started the examination, and not the run
        yield _launcher(environment)


def _launcher(environment: Mapping[str, str]) -> Finding:
    name = launcher_name(environment)
    if name is not None:
        return Finding(SECTION, "ok", f"ranks take their environment from {name}")
    stray = [v for v in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if v in environment]
    if stray:
        return Finding(
            SECTION,
            "warning",
            f"{stray[0]}={environment[stray[0]]} is set here, but not all of RANK and WORLD_SIZE: "
            "training started from this shell would take it for a launcher's",
            f"unset {' '.join(stray)}",
        )
    return Finding(SECTION, "ok", "no launcher here: training started from this shell is one rank")
