"""A run file made small keeps its ratios and every feature."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from models.checkpoint import parameter_table
from models.registry import get_config_class, get_family
from pretrain.config import RunConfig, parse_config
from pretrain.config.compose import compose_config
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS
from pretrain.prove.machine import check_fits
from pretrain.prove.proof import SAVED, corpus_tokens
from pretrain.prove.sizes import halve
from pretrain.prove.small_run import STEPS, SmallRun, shrink
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused
from tests.tiers import tiered

MODELS = sorted(f"{path.parent.name}/{path.stem}" for path in (CONFIGS / "model").glob("*/*.yaml"))


def smallest_of_each_kind() -> list[str]:
    """Of the models of a family that differ in sizes alone, the one with the fewest layers."""
    kinds: dict[str, str] = {}
    given = {name: parsed_model(name) for name in MODELS}
    for name in sorted(MODELS, key=lambda name: given[name]["num_layers"]):
        switches = {
            key: (value == 0) if type(value) is int else value for key, value in given[name].items()
        }
        kinds.setdefault(json.dumps(switches, sort_keys=True), name)
    return sorted(kinds.values())


def parsed_model(name: str) -> dict[str, Any]:
    values = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    config: dict[str, Any] = (
        get_config_class(values["family"]).model_validate(values).model_dump(mode="json")
    )
    return config


def shrunk(*overrides: str, name: str = "demo", ds: str | None = None, ranks: int = 4) -> SmallRun:
    return shrink(compose_config(name, config_dir=None, overrides=overrides), ds, max_ranks=ranks)


def kinds_of_parameters(config: RunConfig) -> set[str]:
    table = parameter_table(get_family(config.model.family), config.model)
    return {re.sub(r"\d+", "*", name) for name in table}


@pytest.mark.parametrize("model", tiered(MODELS, smallest_of_each_kind()))
def test_a_small_model_keeps_switches_and_parameters(model):
    given = compose_config("demo", config_dir=None, overrides=[f"model={model}"])
    small = shrink(given, None, max_ranks=4).config
    before, after = (each.model.model_dump(mode="json") for each in (given, small))
    for name, value in before.items():
        if isinstance(value, bool | str | list) or value is None:
            assert after[name] == value, name
        elif isinstance(value, int):
            assert 0 < after[name] <= value or value == after[name] == 0, name
    assert kinds_of_parameters(small) == kinds_of_parameters(given)
    sizes = [value for value in after.values() if type(value) is int]
    assert max(sizes) < 400


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_a_small_run_has_the_axes_of_the_run(layout):
    tensor, pipeline = layout
    small = shrunk(
        f"parallel.tensor={4 if tensor == 2 else 1}",
        f"parallel.pipeline={pipeline}",
        "model=llama/7b",
    )
    assert (small.config.parallel.tensor, small.config.parallel.pipeline) == layout
    assert small.ranks == min(4, tensor * pipeline * 2)


@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (3, 3), (4, 4)])
def test_stages_between_the_first_and_the_last_stay_where_there_are_ranks(ranks, stages):
    small = shrunk("parallel.pipeline=8", "model=llama/7b", ranks=ranks)
    assert (small.config.parallel.pipeline, small.ranks) == (stages, stages)
    assert any("neither first nor last" in text for text in small.unproven) == (stages == 2)


def test_heads_keep_their_ratio_and_widths_divide():
    model = shrunk("model=llama/70b", "parallel.tensor=2").config.model
    assert model.num_heads == 8 * model.num_kv_heads
    assert model.hidden_size % model.num_heads == 0
    assert model.num_kv_heads % 2 == 0


def test_accumulation_ramp_and_schedule_stay():
    small = shrunk(
        "training.batch_size=4",
        "training.gradient_accumulation_steps=8",
        "training.batch_ramp=[{until_tokens: 20000, sequences_per_step: 8}]",
        "training.schedule=wsd",
        "training.decay_steps=100",
    )
    training = small.config.training
    assert training.gradient_accumulation_steps == 2
    (level,) = training.batch_ramp
    assert level.sequences_per_step == training.batch_size * 2
    assert (training.max_steps, training.decay_steps, training.warmup_steps) == (STEPS, 2, 1)


def test_stages_of_a_curriculum_all_get_steps():
    stages = "[{until_fraction: 0.01, sequence_length: 32}, {until_fraction: 0.02}, {}]"
    small = shrunk(f"data.stages={stages}")
    assert [stage.until_step for stage in small.config.data.stages] == [2, 3, None]
    assert small.config.data.stages[0].sequence_length < small.config.data.sequence_length


@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_step_that_is_compared_reads_no_sample_twice(data_size, factor):
    """Gradients of one sample and of the same again sum up in the bits of one."""
    config = shrunk("training.batch_size=1", "training.gradient_accumulation_steps=1").config
    epoch = corpus_tokens(config, data_size) // config.data.sequence_length
    before = SAVED * data_size  # samples of the steps before, some of them in the first epoch
    assert before // epoch == (before + factor * data_size - 1) // epoch == 1


def test_every_change_is_listed_old_and_new():
    small = shrunk("model=llama/7b", "training.compile=true")
    listed = {change.setting: (change.old, change.new) for change in small.changes}
    assert listed["model.num_layers"] == (32, small.config.model.num_layers)
    assert listed["training.compile"] == (True, False)
    assert any("torch.compile" in text for text in small.unproven)


@pytest.mark.parametrize("optimizer", ["muon", "te_adam"])
def test_an_optimizer_that_is_not_proven_is_named(optimizer):
    small = shrunk(f"training.optimizer={optimizer}")
    assert small.config.training.optimizer == "adamw"
    assert len(small.unproven) == 2


@pytest.mark.parametrize("backend", ["transformer_engine", "emulated"])
def test_fp8_is_not_proven_and_named(backend):
    changes = {"precision": "fp8", "fp8_recipe": "mxfp8", "fp8_backend": backend}
    small = shrunk(*(f"training.{name}={value}" for name, value in changes.items()))
    assert (small.config.training.precision, small.config.training.fp8_recipe) == ("bf16", None)
    assert any("FP8" in text for text in small.unproven)


def test_deepspeed_settings_of_the_file_stay_and_its_sizes_shrink():
    text = """{"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 3,
        "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8}}"""
    small = shrunk(ds=text)
    zero = small.ds_config_values["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert zero["reduce_bucket_size"] < 10_000


def test_a_whole_run_keeps_model_layout_and_batch():
    given = compose_config("llama_70b")
    small = shrink(given, None, max_ranks=512, whole=True)
    assert small.config.model == given.model
    assert small.config.parallel == given.parallel
    for name in ("batch_size", "gradient_accumulation_steps", "lr"):
        assert getattr(small.config.training, name) == getattr(given.training, name)
    assert small.config.training.max_steps == STEPS


def test_a_whole_run_that_takes_more_ranks_is_refused():
    with assert_refused("--ranks", 4, ("tensor 8", "ranks"), "--ranks"):
        shrink(compose_config("llama_70b"), None, max_ranks=4, whole=True)


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_a_whole_run_that_does_not_fit_is_refused(lacking):
    small = shrunk()
    check_fits(small, memory=2**40, disk=2**40)
    with assert_refused("--full", "parameters", (lacking, "0.0 GiB are free"), "--full"):
        check_fits(small, **{"memory": 2**40, "disk": 2**40, lacking: 1000})


def test_a_layout_that_needs_more_ranks_is_one_line():
    with pytest.raises(ConfigError, match=r"--ranks 2: tensor 2 x pipeline 2 .* needs 4 ranks"):
        shrunk("parallel.tensor=2", "parallel.pipeline=2", "model=llama/7b", ranks=2)


def test_a_run_file_that_cannot_be_used_is_refused_as_it_is():
    with pytest.raises(ConfigError, match=r"parallel.tensor=7 .* model\."):
        shrunk("parallel.tensor=7")


def test_halving_respects_what_the_settings_accept():
    values = run_values()
    values["model"] |= {"num_heads": 12, "num_kv_heads": 4, "hidden_size": 96}

    def accepts(changed) -> bool:
        try:
            parse_config(changed)
        except ValueError:
            return False
        return changed["model"]["intermediate_size"] % 3 == 0

    small = halve({**values, "model": {**values["model"], "intermediate_size": 384}}, accepts,
                  limits={})  # fmt: skip
    model = small["model"]
    assert model["num_heads"] == 3 * model["num_kv_heads"]
    assert model["intermediate_size"] == 48  # 24 is below the limit
