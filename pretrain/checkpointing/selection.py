"""Selection of the checkpoint to resume from: the newest undamaged one, agreed on by all ranks."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from parallel.checkpoint.errors import CheckpointError, one_line
from parallel.checkpoint.manifest import (
    Layout,
    Manifest,
    TextRecord,
    read_manifest,
    verify_content,
    verify_listing,
)
from parallel.checkpoint.rollback_record import SkippedData
from pretrain.checkpointing.directory import LATEST_NAME, steps_in
from pretrain.checkpointing.index import FOLDER as OPTIMIZER_FOLDER
from pretrain.config import RunConfig, resolved
from pretrain.config.resume_rules import (
    Difference,
    batch_settings,
    config_differences,
    forbidden_changes,
    keep_batch,
    samples_per_step,
)
from pretrain.distributed.consensus import RankGroup

Resume = Literal["auto", "must", "never"]
TRAINER_NAME = "trainer.json"
logger = logging.getLogger(__name__)


class RunIdentity(NamedTuple):
    """Identity of a run, which a checkpoint must match to be resumed.

    `config`: the resolved configuration. `fingerprints`: of the files it names, by setting; they
    decide whether a file is the same, wherever it lies. `text`: how the text was tokenized.
    `layout_bound_by`: the setting that ties the run's checkpoints to the layout they were written
    at, if there is one.
    """

    layout: Layout
    config: dict[str, Any]
    fingerprints: dict[str, str]
    layout_bound_by: str | None = None
    text: TextRecord = TextRecord()


class Checkpoint(NamedTuple):
    """A verified checkpoint of this run, and the layout that wrote it.

    `any_layout`: its optimizer state is ours, in `optimizer/`; otherwise DeepSpeed's, in `engine/`.
    `differences`: settings that legitimately differ from the run that wrote it. `skipped`: data
    that the run skips since a rollback, perhaps a later one than the checkpoint.
    """

    path: Path
    step: int
    trainer: dict[str, Any]
    layout: Layout
    any_layout: bool
    differences: tuple[Difference, ...] = ()
    skipped: tuple[SkippedData, ...] = ()

    def rng_path(self, rank: int) -> Path:
        return self.path / "rng" / rng_file_name(rank)


def rng_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def find_checkpoint(
    run_dir: Path,
    resume: Resume,
    *,
    identity: RunIdentity,
    ranks: RankGroup,
    progress: Callable[[str], object],
    order: Callable[[list[int]], list[int]] = list,
) -> Checkpoint | None:
    """Find the newest undamaged checkpoint; None if the run has to start from the beginning.

    Collective. Every rank verifies the files that it wrote; a damaged checkpoint is skipped with
    one warning that names the file and its fault. `progress` is called with each file that this
    rank begins to verify. `order`: from the steps of all checkpoints, newest first, to those that
    are tried.

    Raises:
        CheckpointError: `must` and there is none; `never` and there is one; only damaged ones; the
            newest undamaged one is of another run, layout or data.
    """
    problems: list[str] = []
    for step in ranks.run_on_rank0(lambda: order(_candidates(run_dir, resume))):
        directory = run_dir / "checkpoints" / f"step_{step}"
        manifest, problem = _verify(directory, ranks, progress)
        if manifest is not None and problem is None:
            return ranks.run_on_rank0(partial(_checked, directory, manifest, identity))
        problems.append(str(problem))
        if ranks.is_rank0:
            logger.warning("checkpoint step_%d is not used: %s", step, problem)
    if problems:
        raise CheckpointError(
            f"no undamaged checkpoint in {str(run_dir / 'checkpoints')!r} ({len(problems)} tried), "
            f"the newest: {problems[0]}; restore one or start in another run_dir"
        )
    return None


def _candidates(run_dir: Path, resume: Resume) -> list[int]:
    directory = run_dir / "checkpoints"
    steps, latest = steps_in(directory), _read_latest(directory)
    if resume == "never" and (steps or latest is not None):
        raise CheckpointError(
            f"run_dir {str(run_dir)!r} already holds checkpoints and resume=never: "
            "choose another run_dir, or resume=auto to continue that run"
        )
    if not steps and resume == "must":
        raise CheckpointError(
            f"resume=must, but {str(directory.absolute())!r} holds no checkpoint: "
            "correct run_dir, or use resume=auto to start from the beginning"
        )
    if not steps and latest is not None:
        raise CheckpointError(
            f"{str(directory / LATEST_NAME)!r} names {latest!r}, but there is no such checkpoint: "
            "restore it, or delete that file to start from the beginning"
        )
    if steps and latest != f"step_{steps[0]}":
        logger.warning("latest names %r, the newest checkpoint is step_%d", latest, steps[0])
    return steps


def _read_latest(directory: Path) -> str | None:
    """Content of `latest`, for messages only; None if it is absent."""
    path = directory / LATEST_NAME
    if not os.path.lexists(path):
        return None
    try:
        with path.open("rb") as file:
            return file.read(100).decode("ascii", errors="replace").strip()
    except OSError as error:
        return f"({error.strerror})"


def _verify(
    directory: Path, ranks: RankGroup, progress: Callable[[str], object]
) -> tuple[Manifest | None, str | None]:
    """Verify a checkpoint; returns rank 0's manifest and the first problem found by any rank."""
    manifest: Manifest | None = None
    problem: str | None = None
    if ranks.is_rank0:
        try:
            manifest = read_manifest(directory)
            problem = verify_listing(directory, manifest)
        except (CheckpointError, OSError) as error:
            problem = one_line(error)
    manifest, problem = ranks.broadcast((manifest, problem))
    if manifest is None or problem is not None:
        return manifest, problem

    def reported(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            progress(f"{directory.name}/{name}")
            yield name

    mine = reported(n for n, e in manifest.files.items() if e.rank % ranks.size == ranks.rank)
    return manifest, ranks.first_error(verify_content(directory, manifest, mine))


def _checked(directory: Path, manifest: Manifest, identity: RunIdentity) -> Checkpoint:
    any_layout = any(name.startswith(f"{OPTIMIZER_FOLDER}/") for name in manifest.files)
    differences = config_differences(
        _with_defaults(manifest.config),
        identity.config,
        old_prints=manifest.fingerprints,
        new_prints=identity.fingerprints,
    )
    if forbidden := forbidden_changes(differences):
        raise CheckpointError(
            f"{str(directory)!r} is of another run ({'; '.join(forbidden)}): "
            "choose another run_dir or restore these values"
        )
    _refuse_other_document_tokens(directory, manifest, identity)
    trainer = _read_trainer(directory / TRAINER_NAME)
    _refuse_other_layout(directory, manifest, identity, any_layout=any_layout)
    _refuse_unintended_batch(directory, manifest, identity, trainer)
    # Consequences of the number of processes and of DeepSpeed's JSON.
    old, new = manifest.layout, identity.layout
    sizes = {"data ranks": (old.data, new.data), "ZeRO stage": (old.zero_stage, new.zero_stage)}
    differences += [Difference(k, a, b, "layout") for k, (a, b) in sizes.items() if a != b]
    return Checkpoint(directory, manifest.step, trainer, old, any_layout, tuple(differences))


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Complete the configuration of an earlier version with the defaults of newer settings."""
    try:
        return resolved(RunConfig.model_validate(config))
    except ValueError:
        return config


def _refuse_other_document_tokens(
    directory: Path, manifest: Manifest, identity: RunIdentity
) -> None:
    """Refuse documents that begin or end with other tokens than those the model has learnt."""
    before, now = manifest.text, identity.text
    for what, old, new in (
        ("end", before.eod_id, now.eod_id),
        ("begin", before.bos_ids, now.bos_ids),
    ):
        if old is not None and new is not None and old != new:
            ids = ["no token" if token == () else token for token in (old, new)]
            raise CheckpointError(
                f"{str(directory)!r} was trained on documents that {what} with {ids[0]}, those of "
                f"this run {what} with {ids[1]}: preprocess the new ones like the old, or start in "
                "another run_dir with training.init_from"
            )


def _read_trainer(path: Path) -> dict[str, Any]:
    try:
        trainer = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {one_line(error)}") from error
    if not isinstance(trainer, dict):
        raise CheckpointError(f"{str(path)!r} is not a JSON object: restore the checkpoint")
    return trainer


def _refuse_other_layout(
    directory: Path, manifest: Manifest, identity: RunIdentity, *, any_layout: bool
) -> None:
    """Refuse a change of layout for DeepSpeed's own files, and a change between the formats."""
    old, new, bound = manifest.layout, identity.layout, identity.layout_bound_by
    if any_layout and bound is not None:
        raise CheckpointError(
            f"{str(directory)!r} holds optimizer state for any layout, which a run with {bound} "
            "cannot take over: resume without that setting"
        )
    if not any_layout and old != new:
        why = f" ({bound})" if bound else ""
        raise CheckpointError(
            f"{str(directory)!r} was written at {old}; this run is at {new}: its optimizer state "
            f"is in DeepSpeed's own files, which fit only the layout that wrote them{why}; resume "
            "at the layout of the checkpoint"
        )


def _refuse_unintended_batch(
    directory: Path, manifest: Manifest, identity: RunIdentity, trainer: dict[str, Any]
) -> None:
    """Refuse a batch that changes only through the number of processes: probably unintended."""
    before = samples_per_step(manifest.config, data_size=manifest.layout.data)
    now = samples_per_step(identity.config, data_size=identity.layout.data)
    old, new = (batch_settings(config) for config in (manifest.config, identity.config))
    if before is None or now is None or before == now or old != new:
        return
    remedies = []
    if (kept := keep_batch(identity.config, before, data_size=identity.layout.data)) is not None:
        remedies.append(f"set {kept} to keep {before}")
    else:
        remedies.append(f"use a number of data ranks that divides {before} to keep it")
    tokens, per_round = trainer.get("tokens"), now // old[1]  # samples of a micro-batch everywhere
    if now > before and before % per_round == 0 and not old[2] and isinstance(tokens, int):
        ramp = f"[{{until_tokens: {tokens}, sequences_per_step: {before}}}]"
        remedies.append(f"training.batch_ramp={ramp} to go on with {now}")
    raise CheckpointError(
        f"{str(directory)!r} was trained on {before} samples a step by {manifest.layout.data} data "
        f"ranks, and {identity.layout.data} would take {now}: {', or '.join(remedies)}"
    )
