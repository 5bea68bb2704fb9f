"""Settings of the published commands and classes, and their checks. No torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from models.agiformer.config import AgiformerConfig
from models.standalone.settings_file import checked_settings

# Settings whose published name is another one.
_PUBLISHED = {"hidden_size": "d_model", "num_layers": "n_layers"}


class CurriculumStage(NamedTuple):
    """`source`: the file is `source.txt`. `until`: the share of the steps at which it ends."""

    source: str
    until: float
    plasticity: float


CURRICULUM = (
    CurriculumStage("dictionary", 0.15, 0.10),
    CurriculumStage("stories", 0.40, 0.50),
    CurriculumStage("wiki", 1.0, 0.99),
)


def published_config(
    *, d_model: int, n_layers: int, patch_size: int = 4, **settings: Any
) -> AgiformerConfig:
    """The configuration of the published model of these sizes.

    `settings`: others of AgiformerConfig, some of which follow from the sizes where they are not
    given.

    Raises:
        ValueError: one of them is unknown or out of range, by its published name.
    """
    values = {
        "hidden_size": d_model,
        "intermediate_size": max(128, round(d_model * 8 / 3 / 128) * 128),
        "num_layers": n_layers,
        "patch_size": patch_size,
        "patch_kernel": patch_size + 2,
        "fusion": "triple",
        "head_hidden": min(512, 2 * d_model),
    }
    try:
        return checked_settings(AgiformerConfig, {**values, **settings})
    except ValueError as error:
        message = str(error)
        for name, published in _PUBLISHED.items():
            message = message.replace(name, published)
        raise ValueError(message) from None


def check_counts(**counts: int) -> None:
    """Raise ValueError if a number is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be 1 or more; raise it")


def stage_ends(max_steps: int) -> list[int]:
    """The number of steps after which every stage of the curriculum is over."""
    return [round(stage.until * max_steps) for stage in CURRICULUM]


def check_stages(max_steps: int) -> None:
    """Raise ValueError if a stage of the curriculum would have no step."""
    check_counts(max_steps=max_steps)
    if not _has_steps(stage_ends(max_steps)):
        least = next(n for n in itertools.count(max_steps) if _has_steps(stage_ends(n)))
        raise ValueError(
            f"max_steps={max_steps} leaves a stage of the curriculum without a step; use {least} "
            "or more"
        )


def _has_steps(ends: list[int]) -> bool:
    return all(begin < end for begin, end in itertools.pairwise((0, *ends)))


def check_text(path: Path) -> None:
    """Raise ValueError if there is no such file, or it has fewer than two bytes."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder and must be a file; put the text there")
    if not path.is_file():
        raise ValueError(f"{path} is missing; put the text there, nothing takes its place")
    if path.stat().st_size < 2:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; it needs 2 or more")


def check_row(seq_len: int, config: AgiformerConfig) -> None:
    """Raise ValueError if a row of so many bytes is not of whole patches."""
    check_counts(seq_len=seq_len)
    unit = config.patch_size
    if seq_len % unit:
        raise ValueError(
            f"--seq_len={seq_len} must be a multiple of the {unit} bytes of a patch; use "
            f"{max(1, seq_len // unit) * unit}"
        )


def check_output(folder: Path) -> None:
    """Raise ValueError if models cannot be written there because it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output={folder} is no folder; give one for the models and metrics")


def check_model_file(path: Path) -> None:
    """Raise ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; give one that train_scaled or train_curriculum wrote")
