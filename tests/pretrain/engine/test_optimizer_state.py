"""Checkpoints that fit any layout or only their own, and the rest of a restored state."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import Layout
from pretrain.checkpointing.rng_state import seed_rng
from pretrain.config.deepspeed import layout_bound_by, resolve_ds_config
from pretrain.config.resume_rules import samples_per_step
from pretrain.errors import ConfigError
from tests.pretrain.checkpointing.fixtures import contents, identity, open_store
from tests.pretrain.tiny_run import tiny_run
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)


def bound(directory: Path, zero: dict[str, Any] | None = None, **changes: Any) -> str | None:
    config = tiny_run(directory, **changes)
    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero} if zero else {}))
    return layout_bound_by(config, resolve_ds_config(path, config, data_size=1))


def test_adamw_at_any_stage_fits_any_layout(tmp_path) -> None:
    assert bound(tmp_path) is None
    for stage in range(4):
        assert bound(tmp_path, {"stage": stage}) is None
    assert bound(tmp_path, {"stage": 2, "offload_optimizer": {"device": "cpu"}}) is None


def test_what_deepspeed_keeps_elsewhere_is_bound_to_its_layout(tmp_path) -> None:
    zero = {"stage": 1, "round_robin_gradients": True}
    assert bound(tmp_path, zero) == "round_robin_gradients"


def test_what_only_deepspeed_can_write_is_not_saved_in_the_background(tmp_path) -> None:
    asynchronous = {"checkpoint__asynchronous": True}
    assert bound(tmp_path, {"stage": 3}, **asynchronous) is None
    refused = r"checkpoint.asynchronous=true with {}: .*; set checkpoint.asynchronous=false"
    with pytest.raises(ConfigError, match=refused.format("training.optimizer=te_adam")):
        bound(tmp_path, training__optimizer="te_adam", **asynchronous)
    with pytest.raises(ConfigError, match=refused.format("round_robin_gradients")):
        bound(tmp_path, {"stage": 1, "round_robin_gradients": True}, **asynchronous)


def test_other_optimizers_and_a_history_of_fp8_are_bound_to_their_layout(tmp_path) -> None:
    found = bound(tmp_path, training__optimizer="muon", training__grad_clip=0.0)
    assert found == "training.optimizer=muon"
    assert bound(tmp_path, training__optimizer="te_adam") == "training.optimizer=te_adam"
    fp8 = {"training__precision": "fp8"}
    history = fp8 | {"training__fp8_recipe": "delayed"}
    assert bound(tmp_path, {"stage": 1}, **history) == "training.fp8_recipe=delayed"
    assert bound(tmp_path, {"stage": 1}, **fp8, training__fp8_recipe="tensorwise") is None


def save(run_dir: Path, *, folder: str, config: dict[str, Any]) -> None:
    def write_engine(directory: Path) -> list[Path]:
        path = directory / folder / "rank_0.x"
        path.parent.mkdir()
        path.write_text("")
        return [path]

    store = open_store(run_dir, run=identity(config=config))
    store.save(contents(1, write_engine=write_engine))
    store.close()


CONFIG = {"training": {"batch_size": 4, "gradient_accumulation_steps": 2}}
HALF = {"training": {"batch_size": 2, "gradient_accumulation_steps": 2}}


def test_a_checkpoint_says_which_form_it_holds_and_which_layout_wrote_it(tmp_path) -> None:
    for folder, any_layout in (("optimizer", True), ("engine", False)):
        save(tmp_path / folder, folder=folder, config=CONFIG)
        found = open_store(tmp_path / folder, run=identity(config=CONFIG)).find("must")
        assert found is not None
        assert found.any_layout is any_layout
        assert found.layout == Layout()


def test_only_our_form_goes_on_at_another_layout_with_the_same_global_batch(tmp_path) -> None:
    two = Layout(data=2, zero_stage=1)
    save(tmp_path / "ours", folder="optimizer", config=CONFIG)
    found = open_store(tmp_path / "ours", run=identity(layout=two, config=HALF)).find("must")
    assert found is not None
    save(tmp_path / "deepspeed", folder="engine", config=CONFIG)
    muon = identity(layout=two, config=HALF)._replace(layout_bound_by="training.optimizer=muon")
    with _refused(
        "step_", value="training.optimizer=muon", constraint="own files", remedy="resume"
    ):
        open_store(tmp_path / "deepspeed", run=muon).find("must")


def test_a_batch_that_only_the_number_of_ranks_changes_is_refused(tmp_path) -> None:
    save(tmp_path, folder="optimizer", config=CONFIG)
    for data, remedy in (
        (2, r"training.gradient_accumulation_steps=1 to keep 8"),
        (8, r"training.batch_size=1 training.gradient_accumulation_steps=1 to keep 8"),
        (3, r"data ranks .* 8 "),
    ):
        run = identity(layout=Layout(data=data), config=CONFIG)
        with pytest.raises(CheckpointError, match=f"take {8 * data}: .*{remedy}") as error:
            open_store(tmp_path, run=run).find("must")
        ramp = "training.batch_ramp=[{until_tokens: 100, sequences_per_step: 8}]"
        assert (f"or {ramp} to go on with 16" in str(error.value)) == (data == 2)


@pytest.mark.parametrize("data", [1, 2])
def test_a_batch_that_a_setting_changes_goes_on(data, tmp_path) -> None:
    save(tmp_path, folder="optimizer", config=CONFIG)
    other = {"training": {"batch_size": 4, "gradient_accumulation_steps": 3}}
    run = identity(layout=Layout(data=data), config=other)
    found = open_store(tmp_path, run=run).find("must")
    assert found is not None
    changes = [each[:3] for each in found.differences]
    more = [("data ranks", 1, 2)] if data == 2 else []
    assert changes == [("training.gradient_accumulation_steps", 2, 3), *more]


def test_a_run_that_cannot_take_our_form_over_says_so(tmp_path) -> None:
    save(tmp_path, folder="optimizer", config=CONFIG)
    run = identity(config=CONFIG)._replace(layout_bound_by="round_robin_gradients")
    with _refused("step_", value="round_robin_gradients", constraint="any layout", remedy="resume"):
        open_store(tmp_path, run=run).find("must")


def test_samples_per_step_counts_all_data_ranks() -> None:
    assert samples_per_step(CONFIG, data_size=3) == 24
    assert samples_per_step({"training": {"batch_size": 4}}, data_size=3) is None
    assert samples_per_step({}, data_size=3) is None


def test_generators_seeded_anew_depend_on_seed_step_and_rank_alone() -> None:
    def drawn(**place: int) -> tuple[Any, ...]:
        seed_rng(**place)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    first = drawn(seed=1, step=4, rank=0)
    assert drawn(seed=1, step=4, rank=0) == first
    for other in ({"seed": 2}, {"step": 5}, {"rank": 1}):
        found = drawn(**{"seed": 1, "step": 4, "rank": 0, **other})
        assert not set(found) & set(first)
