"""The schema of a run, its one-line errors, and the changes that a resume may make."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any, get_args

import pytest
import yaml

from parallel.precision import FP8_BACKENDS, FP8_RECIPES
from pretrain.config import (
    RunConfig,
    TrainingConfig,
    parse_config,
    resolved,
    to_yaml,
)
from pretrain.config.errors import schema_paths
from pretrain.config.resume_rules import (
    MISSING,
    RULES,
    config_differences,
    forbidden_changes,
    keep_batch,
)
from pretrain.errors import ConfigError
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=ConfigError)

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def _error(**changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_config(run_values(**changes))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_importing_the_configuration_imports_no_torch() -> None:
    code = (
        "import sys, pretrain.config.compose, pretrain.config.deepspeed, pretrain.config.layout\n"
        "from tests.pretrain.run_values import run_values\n"
        "pretrain.config.parse_config(run_values())\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_yaml_of_a_configuration_reads_back_as_the_same_configuration() -> None:
    config = parse_config(
        run_values(
            training__lr=3e-5,
            training__max_tokens=10e9,
            training__lr_multipliers={"embedding": 0.5},
            logging__wandb={"mode": "offline", "project": "p"},
        )
    )
    assert parse_config(yaml.safe_load(to_yaml(config))) == config
    assert resolved(config)["training"]["max_tokens"] == 10_000_000_000


def test_the_family_brings_the_schema_of_the_model_section() -> None:
    config = parse_config(run_values())
    assert type(config.model).__name__ == "LlamaConfig"
    assert config.model.tensor_divisible()["num_kv_heads"] == 2


def test_a_configuration_is_frozen() -> None:
    config = parse_config(run_values())
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0


def test_a_whole_number_may_stand_for_a_float() -> None:
    assert parse_config(run_values(training__grad_clip=2)).training.grad_clip == 2.0


def test_fp8_recipes_and_backends_are_those_of_the_layers() -> None:
    annotation = TrainingConfig.model_fields["fp8_recipe"].annotation
    assert get_args(get_args(annotation)[0]) == FP8_RECIPES
    assert get_args(TrainingConfig.model_fields["fp8_backend"].annotation) == FP8_BACKENDS


TASKS = {"evaluation__tasks": ["arc_easy"], "data__tokenizer": "a.model"}
DELAYED = {"training__precision": "fp8", "training__fp8_recipe": "delayed"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"training__learning_rate": 0.1}, ["training.learning_rate=0.1", "mean training.lr?"]),
        ({"training__warmup_stpes": 3}, ["training.warmup_stpes=3", "mean training.warmup_steps?"]),
        ({"lr": 0.1}, ["unknown key lr=0.1", "training.lr"]),
        ({"trainign": {"lr": 1}}, ["unknown key trainign=", "did you mean training?"]),
        ({"training__zzz": 1}, ["unknown key training.zzz=1", "valid keys of training", "seed"]),
        ({"model__hidden": 3}, ["unknown key model.hidden=3", "model.hidden_size"]),
        ({"parallel__tp": 2}, ["unknown key parallel.tp=2", "parallel.tensor"]),
        (
            {"model__rope_scaling": _YARN | {"beta_fats": 3}},
            ["unknown key model.rope_scaling.beta_fats=3", "mean model.rope_scaling.beta_fast?"],
        ),
        ({"data__train": [{"path": "x", "wieght": 1.0}]}, ["data.train.0.wieght", "0.weight?"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(
    changes: dict[str, Any], parts: list[str]
) -> None:
    message = _error(**changes)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"training__lr": -1.0}, ["training.lr=-1.0", "greater than 0", "change training.lr"]),
        ({"training__lr": "fast"}, ["training.lr='fast'", "number"]),
        ({"training__lr": float("nan")}, ["training.lr=nan", "finite"]),
        ({"training__max_steps": True}, ["training.max_steps=True", "integer"]),
        ({"training__max_steps": 2.5}, ["training.max_steps=2.5", "integer"]),
        ({"training__max_tokens": 0.5}, ["training.max_tokens=0.5", "integer"]),
        ({"training__schedule": "cosin"}, ["training.schedule='cosin'", "'wsd'", "mean 'cosine'"]),
        ({"training__betas": [0.9]}, ["training.betas=[0.9]", "two numbers"]),
        ({"training__betas": [0.9, 1.0]}, ["training.betas=[0.9, 1.0]", "less than 1"]),
        ({"training__grad_clip": -1.0}, ["training.grad_clip=-1.0", "greater than or equal to 0"]),
        ({"training": 5}, ["training=5", "section"]),
        ({"model": "llama"}, ["model='llama'", "section"]),
        ({"model__family": "lama"}, ["model.family='lama'", "did you mean 'llama'?"]),
        (
            {"model__layer_types": ["full_atention"]},
            ["model.layer_types.0='full_atention'", "did you mean 'full_attention'?"],
        ),
        # A section of several kinds: names as they are typed, without pydantic's name of the kind.
        (
            {"model__rope_scaling": _YARN | {"factor": 1}},
            ["model.rope_scaling.factor=1", "greater than 1", "change model.rope_scaling.factor "],
        ),
        (
            {"model__rope_scaling": {"type": "yarn", "factor": 2}},
            ["model.rope_scaling.original_max_position_embeddings is missing"],
        ),
        (
            {"model__rope_scaling": {"factor": 2}},
            ["model.rope_scaling.type is missing", "linear, yarn or llama3"],
        ),
        (
            {"model__rope_scaling": {"type": "dynamic", "factor": 2}},
            ["model.rope_scaling.type='dynamic'", "linear, yarn or llama3"],
        ),
        ({"model__rope_scaling": "yarn"}, ["model.rope_scaling='yarn'", "a section of settings"]),
        ({"model__num_heads": 3}, ["num_heads=3", "num_kv_heads=2"]),
        ({"parallel__context": 2}, ["parallel.context=2", "reserved", "set parallel.context=1"]),
        ({"resume": "yes"}, ["resume='yes'", "'auto', 'must' or 'never'"]),
        ({"run_dir": ""}, ["run_dir=''", "empty"]),
    ],
)
def test_an_unusable_value_is_refused_with_key_value_and_constraint(
    changes: dict[str, Any], parts: list[str]
) -> None:
    message = _error(**changes)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"training__warmup_steps": 10}, ["training.warmup_steps=10", "training.max_steps=10"]),
        ({"training__max_steps": None}, ["no end", "training.max_tokens"]),
        ({"training__schedule": "wsd"}, ["training.decay_steps=0", "wsd"]),
        ({"training__decay_steps": 3}, ["training.decay_steps=3", "schedule=cosine"]),
        (
            {"training__schedule": "constant", "training__min_lr_ratio": 0.5},
            ["training.min_lr_ratio=0.5", "no effect"],
        ),
        ({"training__fp8_recipe": "mxfp8"}, ["training.fp8_recipe=mxfp8", "precision=fp32"]),
        ({"training__precision": "fp8"}, ["training.precision=fp8", "needs a recipe"]),
        (
            {"training__fp8_backend": "emulated"},
            ["training.fp8_backend=emulated", "no effect", "set training.precision=fp8"],
        ),
        (
            DELAYED | {"parallel__pipeline": 2},
            ["training.fp8_recipe=delayed", "parallel.pipeline=2", "use tensorwise"],
        ),
        (
            DELAYED | {"training__activation_recomputation": "full"},
            ["training.fp8_recipe=delayed", "activation_recomputation=full", "use tensorwise"],
        ),
        (
            DELAYED | {"training__fp8_backend": "torch"},
            ["training.fp8_backend=torch", "training.fp8_recipe=delayed", "tensorwise alone"],
        ),
        (
            DELAYED | {"training__fp8_backend": "emulated"},
            ["training.fp8_recipe=delayed", "training.fp8_backend=emulated", "use tensorwise"],
        ),
        ({"parallel__sequence_parallel": True}, ["no effect", "parallel.tensor=1"]),
        ({"logging__wandb": {"project": "p"}}, ["logging.wandb.project='p'", "no effect"]),
        ({"logging__wandb": {"mode": "online"}}, ["logging.wandb.mode=online", "project"]),
        (
            {"training__optimizer": "muon", "parallel__tensor": 2},
            ["training.optimizer=muon", "parallel.tensor=2"],
        ),
        ({"data__validation": [], "evaluation__interval": 5}, ["evaluation", "data.validation"]),
        (
            TASKS | {"data__validation": [], "evaluation__max_windows": 5},
            ["evaluation.max_windows=5", "no effect", "data.validation"],
        ),
        (
            TASKS
            | {"data__validation": [], "evaluation__interval": 5, "evaluation__task_interval": 6},
            ["evaluation.interval=5", "no effect", "evaluation.task_interval=6"],
        ),
        (TASKS | {"data__tokenizer": None}, ["['arc_easy']", "data.tokenizer=null", "set data"]),
        ({"evaluation__tasks": ["a", ""]}, ["evaluation.tasks=['a', '']", "empty"]),
        (TASKS | {"evaluation__task_limit": 1.5}, ["evaluation.task_limit=1.5", "round"]),
        *(
            ({f"evaluation__{key}": value}, [f"evaluation.{key}={value!r}", "evaluation.tasks"])
            for key, value in (
                ("task_interval", 5),
                ("task_limit", 5.0),
                ("num_fewshot", 0),
                ("include_path", "tasks"),
            )
        ),
    ],
)
def test_settings_that_contradict_each_other_or_have_no_effect_are_refused(
    changes: dict[str, Any], parts: list[str]
) -> None:
    message = _error(**changes)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("given", [["arc_easy", "piqa"], "arc_easy, piqa", ("arc_easy", "piqa")])
def test_tasks_are_a_list_or_names_with_commas(given: Any) -> None:
    changes = {"evaluation__tasks": given, "data__validation": [], "data__tokenizer": "a.model"}
    config = parse_config(run_values(**changes))
    assert config.evaluation.tasks == ("arc_easy", "piqa")
    assert config.evaluation.interval_of_tasks == config.evaluation.interval
    assert parse_config(resolved(config)) == config


@pytest.mark.parametrize("key", ["run_dir", "model", "data", "training"])
def test_a_missing_section_is_named(key: str) -> None:
    values = run_values()
    del values[key]
    with _refused(key, value="missing", constraint="missing", remedy="set"):
        parse_config(values)


def test_a_missing_family_is_named_with_the_known_ones() -> None:
    values = run_values()
    del values["model"]["family"]
    with _refused(
        "model.family", value="missing", constraint="missing", remedy=("llama", "model=FAMILY/SIZE")
    ):
        parse_config(values)


def test_several_errors_give_one_line_that_names_every_key() -> None:
    message = _error(training__lr=-1.0, training__seed="x")
    assert message.startswith("training.lr=-1.0")
    assert "and 1 more: training.seed" in message


def test_every_setting_has_exactly_one_rule_for_a_resume() -> None:
    paths = schema_paths(RunConfig)
    used = set()
    for path in paths:
        rules = [r for r in RULES if r in (path, f"{path}.*") or _covers(r, path)]
        assert len(rules) == 1, (path, rules)
        used.update(rules)
    assert used == RULES.keys()


def _covers(rule: str, path: str) -> bool:
    return rule.endswith(".*") and path.startswith(rule[:-1])


def test_only_settings_that_make_another_run_are_forbidden_at_a_resume() -> None:
    old = resolved(parse_config(run_values()))
    new = resolved(
        parse_config(
            run_values(
                run_dir="elsewhere",
                training__max_steps=20,
                training__seed=7,
                model__hidden_size=128,
                parallel__tensor=2,
                logging__tensorboard=True,
            )
        )
    )
    differences = config_differences(old, new)
    assert {each.key: each.change for each in differences} == {
        "run_dir": "free",
        "logging.tensorboard": "free",
        "training.max_steps": "training",
        "parallel.tensor": "layout",
        "training.seed": "fixed",
        "model.hidden_size": "fixed",
    }
    assert forbidden_changes(differences) == [
        "model.hidden_size: 64 in the checkpoint, 128 now",
        "training.seed: 1234 in the checkpoint, 7 now",
    ]


def test_equal_configurations_do_not_differ() -> None:
    values = resolved(parse_config(run_values()))
    assert config_differences(values, yaml.safe_load(yaml.safe_dump(values))) == []


def test_a_file_of_another_program_differs_in_every_fixed_setting() -> None:
    new = resolved(parse_config(run_values()))
    forbidden = forbidden_changes(config_differences({"weights": 3}, new))
    assert any(text.startswith("weights: 3") for text in forbidden)
    assert any(text.startswith("training.seed: '(absent)'") for text in forbidden)


def test_a_file_is_known_by_its_fingerprint_wherever_it_lies() -> None:
    def moved(folder: str) -> dict[str, Any]:
        sources = [{"path": f"{folder}/{name}", "name": name} for name in ("a", "b")]
        changes = {"data__train": sources, "data__tokenizer": f"{folder}/tokenizer.json"}
        return resolved(parse_config(run_values(**changes)))

    old, new = moved("here"), moved("there")
    keys = ("data.tokenizer", "data.train.a.path", "data.train.b.path")
    assert [each.key for each in config_differences(old, new)] == list(keys)
    prints = dict.fromkeys(keys, "0123456789abcdef")
    assert config_differences(old, new, old_prints=prints, new_prints=prints) == []
    (unknown,) = config_differences(
        old, new, old_prints=dict(list(prints.items())[1:]), new_prints=prints
    )
    assert unknown.key == "data.tokenizer"


def test_another_file_under_the_same_path_is_a_change() -> None:
    config = resolved(parse_config(run_values(data__tokenizer="tokenizer.json")))
    prints = {"data.tokenizer": "abcdef0123456789", "data.validation.validation.path": "old"}
    changed = {"data.tokenizer": "9876543210fedcba", "data.validation.validation.path": "new"}
    found = config_differences(config, config, old_prints=prints, new_prints=changed)
    assert [str(each) for each in found] == [
        "data.tokenizer: 'tokenizer.json (fingerprint abcdef012345)' in the checkpoint, "
        "'tokenizer.json (fingerprint 9876543210fe)' now",
        "data.validation.validation.path: 'data/validation (fingerprint old)' in the checkpoint, "
        "'data/validation (fingerprint new)' now",
    ]
    assert [each.change for each in found] == ["fixed", "free"]


def test_sources_are_compared_by_name_and_stages_by_place() -> None:
    def mixed(*weights: tuple[str, float], until: int) -> dict[str, Any]:
        changes = {
            "data__train": [{"path": name, "weight": weight} for name, weight in weights],
            "data__stages": [{"until_step": until}, {"sequence_length": 64}],
        }
        return resolved(parse_config(run_values(**changes)))

    old = mixed(("a", 1.0), ("b", 2.0), until=3)
    new = mixed(("b", 3.0), ("a", 1.0), ("c", 1.0), until=4)
    found = {each.key: (each.old, each.new) for each in config_differences(old, new)}
    assert found == {
        "data.stages.0.until_step": (3, 4),
        "data.train.b.weight": (2.0, 3.0),
        "data.train.c.path": (MISSING, "c"),
        "data.train.c.weight": (MISSING, 1.0),
    }


@pytest.mark.parametrize(
    ("samples", "data_size", "kept"),
    [
        (8, 1, "training.gradient_accumulation_steps=2"),
        (8, 2, "training.gradient_accumulation_steps=1"),
        (8, 4, "training.batch_size=2 training.gradient_accumulation_steps=1"),
        (12, 2, "training.batch_size=3 training.gradient_accumulation_steps=2"),
        (8, 3, None),
    ],
)
def test_settings_that_keep_the_batch_are_found_where_there_are_any(
    samples: int, data_size: int, kept: str | None
) -> None:
    assert keep_batch({"training": {"batch_size": 4}}, samples, data_size=data_size) == kept
