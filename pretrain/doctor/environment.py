"""Installed packages: the pinned versions, and what the settings need."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from models.evaluate import INSTALL
from pretrain.config import RunConfig
from pretrain.doctor.findings import Finding

SECTION = "environment"

# Without these nothing trains, whatever the settings.
_REQUIRED = ("torch", "deepspeed", "megatron-core", "numpy", "pydantic", "omegaconf", "safetensors")
_MOST_LISTED = 6


def check_pins(constraints: Path) -> Iterator[Finding]:
    """Compare installed packages with the pins; others than pinned were not tested together."""
    missing = [name for name in _REQUIRED if _version(name) is None]
    if missing:
        yield Finding(
            SECTION,
            "error",
            f"not installed: {', '.join(missing)}",
            "install the project: pip install -e . -c constraints.txt",
        )
    if not constraints.is_file():
        yield Finding(SECTION, "ok", "no constraints.txt beside the packages: no pins to compare")
        return
    pins = _pins(constraints)
    differing = [
        f"{name} {found} ({pin} pinned)"
        for name, pin in pins.items()
        if (found := _version(name)) is not None and found.partition("+")[0] != pin
    ]
    if not differing:
        yield Finding(SECTION, "ok", f"installed packages have the {len(pins)} pinned versions")
        return
    more = len(differing) - _MOST_LISTED
    yield Finding(
        SECTION,
        "warning",
        f"other versions than pinned: {', '.join(differing[:_MOST_LISTED])}"
        + (f" and {more} more" if more > 0 else ""),
        f"pip install -c {constraints} PACKAGE, or run the tests with these versions",
    )


def check_needed_packages(
    config: RunConfig, *, launcher: str | None, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Optional packages that the settings or the launcher need."""
    training, logging = config.training, config.logging
    needs = {
        "transformer_engine": (
            f"training.precision={training.precision}"
            if training.precision == "fp8" and training.fp8_backend == "transformer_engine"
            else f"training.optimizer={training.optimizer}"
            if training.optimizer == "te_adam"
            else None,
            "pip install --no-build-isolation -e '.[fp8]'",
        ),
        "apex.optimizers": (
            "training.optimizer=apex_adam" if training.optimizer == "apex_adam" else None,
            "build NVIDIA apex from its source (the apex on PyPI is another project)",
        ),
        "mpi4py": (
            f"{launcher} without MASTER_ADDR"
            if launcher in ("Open MPI", "MPICH", "MVAPICH") and "MASTER_ADDR" not in environment
            else None,
            "pip install -e '.[mpi]', or pass MASTER_ADDR and MASTER_PORT",
        ),
        "wandb": (
            f"logging.wandb.mode={logging.wandb.mode}"
            if logging.wandb.mode != "disabled"
            else None,
            "pip install wandb, or set logging.wandb.mode=disabled",
        ),
        "tensorboard": (
            "logging.tensorboard=true" if logging.tensorboard else None,
            "pip install tensorboard, or set logging.tensorboard=false",
        ),
        "lm_eval": (
            "evaluation.tasks" if config.evaluation.tasks else None,
            f"{INSTALL}, or set evaluation.tasks=[]",
        ),
    }
    for package, (reason, remedy) in needs.items():
        if reason is not None and not _is_importable(package):
            yield Finding(SECTION, "error", f"{reason} needs {package}, not installed", remedy)


def _pins(constraints: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", constraints.read_text("ascii"), re.MULTILINE)
    return dict(found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package around it
        return False
