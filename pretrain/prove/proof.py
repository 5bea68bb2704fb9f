"""The proof of one run: its legs through the program, the truth, and the rows of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.config import DataConfig
from models.registry import get_family
from pretrain.config import RunConfig, parse_config, resolved
from pretrain.errors import ConfigError
from pretrain.prove.bounds import Bound, Bounds
from pretrain.prove.choices import Choices
from pretrain.prove.comparison import (
    Row,
    choice_rows,
    gradient_row,
    initial_row,
    number_rows,
    state_rows,
    sum_rows,
    untrained_row,
    update_row,
)
from pretrain.prove.complete import exported_row, without_trace
from pretrain.prove.corpus import make_corpus
from pretrain.prove.outputs import read_checkpoint, read_metrics
from pretrain.prove.program import Leg, choices_of, train_leg
from pretrain.prove.ranks import Forks
from pretrain.prove.small_run import SKIPPED, STEPS, SmallRun, resolve_text
from pretrain.prove.truth.oracle import OneProcess, State, planned_steps
from pretrain.prove.truth.reader import Step

SAVED = 3  # the step after which the run goes on elsewhere
TIMEOUT = 300.0  # seconds, of each start of the program and of the truth
_NEVER_REACHED = 1e6
_TAKEN = Bound(0.0, "equal bits: weights that were saved")


class Depth(Enum):
    """The extent of a proof: in fp32 the first step and one resume; the same in the run's own
    precision; or everything, in fp32 and in its own precision."""

    QUICK = "quick"
    OWN = "own"
    FULL = "full"


class Case(NamedTuple):
    """One precision of the proof: the run as it is laid out, and elsewhere."""

    here: Leg
    there: Leg
    timeout: float


class Section(NamedTuple):
    """Rows of one leg, under a title."""

    title: str
    rows: list[Row]


def prove(
    small: SmallRun, folder: Path, *, depth: Depth, timeout: float = TIMEOUT
) -> list[Section]:
    """Prove a run below `folder`; `timeout`: seconds of each start of the program and of the truth.

    Raises:
        RunFailedError: a rank of the program, or the truth, failed.
    """
    config = small.config
    tokens = corpus_tokens(config, small.data_size)
    data = make_corpus(
        config.data, folder / "data", vocab_size=config.model.vocab_size, num_tokens=tokens
    )
    sections: list[Section] = []
    quick = depth is not Depth.FULL
    with Forks() as forks:
        for precision in _precisions(config, depth):
            case = _case(small, data, precision, timeout, quick=quick)
            place = folder / precision
            place.mkdir()
            sections += _prove_case(case, place, forks, quick=quick)
    return sections


def _precisions(config: RunConfig, depth: Depth) -> list[str]:
    own = config.training.precision
    if depth is Depth.OWN:
        return [own]
    return ["fp32"] if depth is Depth.QUICK or own == "fp32" else ["fp32", own]


def _prove_case(case: Case, place: Path, forks: Forks, *, quick: bool) -> list[Section]:
    """Here from the beginning, there from a checkpoint, and (unless `quick`) here again."""
    here, there, timeout = case
    run_here = train_leg(here, place, forks, timeout=timeout)
    run_there = train_leg(
        there, place, forks, timeout=timeout, resume_from=_checkpoint(run_here, SAVED)
    )
    precision = here.config.training.precision
    first, last = SKIPPED + 1, SAVED + 1
    plan = planned_steps(here.config, batches={1: full_batch(here)})
    changed = planned_steps(here.config, batches={1: full_batch(here), last: full_batch(there)})
    legs = [
        _Checked(f"{precision}, {here.layout}", here, run_here, range(first, last - quick), plan),
        _Checked(_resumed(case), there, run_there, range(last, last + 1), changed),
    ]
    if not quick:
        again = here._replace(name="back")
        back = train_leg(
            again, place, forks, timeout=timeout, resume_from=_checkpoint(run_there, last)
        )
        title = f"{precision}, resumed after step {last} at {here.layout}"
        batches = {1: full_batch(here), last: full_batch(there), last + 1: full_batch(here)}
        returned = planned_steps(here.config, batches=batches)
        legs.append(_Checked(title, again, back, range(last + 1, last + 2), returned))
        legs.append(_begun(case, run_here, place, forks))
    check = partial(_check, case, legs)
    sections = forks.call("the run in one process", check, place / "oracle", timeout=timeout)
    return sections if quick else [*sections, _complete(case, run_here, place, forks)]


def _complete(case: Case, run_dir: Path, place: Path, forks: Forks) -> Section:
    """The checks of a complete proof that need no truth: traces of evaluations, and the export."""
    config, last, rows = case.here.config, _checkpoint(run_dir, STEPS), []
    if config.data.validation:
        silent = train_leg(_unevaluated(case.here), place, forks, timeout=case.timeout)
        rows.append(without_trace(last, _checkpoint(silent, STEPS)))
    if get_family(config.model.family).hf is not None and config.training.precision == "fp32":
        export = partial(exported_row, last, config, place, batch=full_batch(case.here))
        rows.append(forks.call("the export", export, place / "export", timeout=case.timeout))
    return Section(f"{config.training.precision}, {case.here.layout}, after step {STEPS}", rows)


def _unevaluated(leg: Leg) -> Leg:
    """The same run without held-out text."""
    values = resolved(leg.config)
    values["data"]["validation"] = []
    del values["evaluation"]
    return leg._replace(name="unevaluated", config=parse_config(values))


class _Checked(NamedTuple):
    """The steps of a leg that are compared, each with the truth from the checkpoint before it.

    `plan`: what each step of the run reads. `weights`: the checkpoint that it takes its initial
    weights from; None: they are drawn.
    """

    title: str
    leg: Leg
    run_dir: Path
    steps: range
    plan: list[Step]
    weights: Path | None = None


def _begun(case: Case, run_here: Path, place: Path, forks: Forks) -> _Checked:
    """Train a run from its beginning, with the weights of a checkpoint of another."""
    here, weights = case.here, _checkpoint(run_here, SAVED)
    values = resolved(here.config)
    values["training"]["init_from"] = str(weights)
    leg = here._replace(name="begun", config=parse_config(values))
    run_dir = train_leg(leg, place, forks, timeout=case.timeout)
    title = f"{here.config.training.precision}, begun with the weights of step {SAVED}"
    plan = planned_steps(here.config, batches={1: full_batch(here)})
    return _Checked(title, leg, run_dir, range(SKIPPED + 1, SKIPPED + 2), plan, weights)


def _resumed(case: Case) -> str:
    here, there, _ = case
    title = f"{here.config.training.precision}, resumed after step {SAVED} at {there.layout}"
    factor = full_batch(there) // full_batch(here)
    title += f" with {factor} times the batch" * (factor > 1)
    return title if there.layout != here.layout else f"{title} (no other layout fits)"


def _taken_over(checkpoint: Path) -> State:
    """The initial state of a run that begins with the weights of a checkpoint."""
    run_dir, step = checkpoint.parents[1], int(checkpoint.name.removeprefix("step_"))
    saved = read_checkpoint(run_dir, step)
    return State({name: saved.weights[name] for name in saved.masters}, {}, {}, {}, 0)


def _check(case: Case, legs: list[_Checked]) -> list[Section]:
    """Compare every leg with the run in one process, by induction over its steps."""
    config = case.here.config
    oracle = OneProcess(config)
    untrained, precision = oracle.untrained(), config.training.precision
    bounds = Bounds.of(precision, roundings=oracle.roundings() if precision == "bf16" else 0)
    sections = []
    for leg in legs:
        rows = []
        if leg.steps.start == SKIPPED + 1:
            saved = read_checkpoint(leg.run_dir, SKIPPED)
            if leg.weights is None:
                rows.append(initial_row(saved, oracle.initial()))
            else:
                rows.append(initial_row(saved, _taken_over(leg.weights))._replace(bound=_TAKEN))
        metrics = read_metrics(leg.run_dir)
        choices = _choices(leg)
        oracle.read(leg.plan)
        per_round = leg.leg.config.training.batch_size * leg.leg.data_size
        for step in leg.steps:
            before, after = (read_checkpoint(leg.run_dir, n) for n in (step - 1, step))
            clip = leg.leg.config.training.grad_clip
            truth = oracle.step(step, before.state(), grad_clip=clip, choices=choices[step])
            found = choice_rows(truth, bounds)
            found += number_rows(step, metrics, truth, bounds)
            found.append(gradient_row(after, truth, before.state(), config.training, bounds))
            found += state_rows(after, truth, config.training, bounds)
            rounds = leg.plan[step - 1].sequences // per_round
            found += sum_rows(after, truth, before.state(), config.training, rounds)
            found.append(update_row(after, truth, before.state(), config.training))
            if untrained and leg.weights is None:
                found.append(untrained_row(after, untrained))
            rows += [each._replace(check=f"step {step}: {each.check}") for each in found]
        sections.append(Section(leg.title, rows))
    return sections


def _choices(leg: _Checked) -> dict[int, list[Choices]]:
    """The choices of the layers in every step that the leg has trained."""
    trained = range(leg.steps.start, (leg.leg.last_step or STEPS) + 1)
    return choices_of(leg.run_dir, leg.leg, {n: leg.plan[n - 1].sequences for n in trained})


def _checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def corpus_tokens(config: RunConfig, data_size: int) -> int:
    """Tokens of all sources: half of what the run reads, so that step 4 is in a second epoch, and
    in no third one if its batch is doubled: no step that is compared reads a sample twice."""
    training = config.training
    sequences = training.batch_size * training.gradient_accumulation_steps * data_size
    return math.ceil(sequences * STEPS / 2) * config.data.sequence_length


def _case(
    small: SmallRun, data: DataConfig, precision: str, timeout: float, *, quick: bool
) -> Case:
    """The run as it is laid out, and its continuation."""
    values = resolved(small.config.model_copy(update={"data": data}))
    values["training"]["precision"] = precision
    if quick and values["data"]["validation"]:
        values["evaluation"]["interval"] = 2  # after the two steps that are compared
    here = Leg("here", parse_config(values), ds_for(small.ds_config_values, precision), small.ranks)
    there = elsewhere(here, max_ranks=small.max_ranks, batch_factor=small.resume_batch)
    if quick:  # what follows is not compared
        here, there = here._replace(last_step=SAVED), there._replace(last_step=SAVED + 1)
    return Case(here, there, timeout)


def ds_for(ds_config_values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The DeepSpeed file of a run in another precision."""
    values = {k: v for k, v in ds_config_values.items() if k != "bf16"}
    if precision == "fp32" and values.get("communication_data_type") == "bf16":
        del values["communication_data_type"]
    return values


def elsewhere(here: Leg, *, max_ranks: int, batch_factor: int = 1) -> Leg:
    """Another layout of the same batch, or of a multiple of it, without cuts if there are some,
    else with one; the same layout if no other fits. Gradients are not clipped there, where the
    first leg clips them.
    """
    here = _unclipped(here)
    values = resolved(here.config)
    parallel, training = values["parallel"], values["training"]
    samples = batch_factor * full_batch(here)
    stage = here.ds_config_values.get("zero_optimization", {}).get("stage", 0)
    plain = {"tensor": 1, "pipeline": 1, "sequence_parallel": False}
    candidates: list[dict[str, Any]] = [plain, {**plain, "tensor": 2}, {**plain, "pipeline": 2}]
    if parallel["tensor"] * parallel["pipeline"] == 1:
        candidates = candidates[1:]
    for cut in candidates:
        # Beside a cut one data rank: another number than the first leg has, and fewer ranks.
        for data_size in (2, 1) if cut is plain else (1, 2):
            if samples % data_size or parallel["expert"] not in (1, data_size):
                continue
            own = samples // data_size
            batch_size = min(training["batch_size"], own)
            if own % batch_size:
                continue
            values["parallel"] = {**parallel, **cut}
            batch = {"batch_size": batch_size, "gradient_accumulation_steps": own // batch_size}
            values["training"] = {**training, **batch}
            if batch_factor > 1 and values["training"] == training:
                continue  # a batch that changes through the number of ranks alone is refused
            ranks = data_size * cut["tensor"] * cut["pipeline"]
            if ranks > max_ranks:
                continue
            ds_config_values = here.ds_config_values
            if cut["pipeline"] > 1 and stage != 1:
                ds_config_values = {"zero_optimization": {"stage": 1}}
            leg = Leg("there", parse_config(values), dict(ds_config_values), ranks)
            if leg.layout != here.layout and _resolves(leg):
                return leg
    accumulation = batch_factor * training["gradient_accumulation_steps"]
    values["parallel"] = parallel
    values["training"] = {**training, "gradient_accumulation_steps": accumulation}
    return here._replace(name="there", config=parse_config(values))


def full_batch(leg: Leg) -> int:
    """Sequences of a step, where no ramp makes it smaller."""
    training = leg.config.training
    return training.batch_size * training.gradient_accumulation_steps * leg.data_size


def _unclipped(leg: Leg) -> Leg:
    """The same leg with a limit that no gradient reaches, if it has one."""
    values = resolved(leg.config)
    if values["training"]["grad_clip"] > 0:
        values["training"]["grad_clip"] = _NEVER_REACHED
    return leg._replace(config=parse_config(values))


def _resolves(leg: Leg) -> bool:
    try:
        resolve_text(leg.config, leg.ds_config_values, leg.ranks)
    except ConfigError:
        return False
    return True
