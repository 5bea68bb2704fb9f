"""Other spellings of settings resolve to their owners, and contradictions are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.llama.config import LlamaConfig
from models.registry import family_names, get_config_class
from pretrain.config import parse_config, resolved
from pretrain.config.compat.aliases import aliases_of
from pretrain.config.compat.spellings import ALIASES
from pretrain.config.compose import compose_config
from pretrain.config.errors import schema_paths
from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused

CORPORA = {"a": {"train": "data/a", "validation": "data/a_val"}, "b": {"train": "data/b"}}


def _values(**data: Any) -> dict[str, Any]:
    values = run_values()
    values["data"] = {"sequence_length": 128, "corpora": CORPORA, **data}
    return values


def test_every_owner_is_a_setting_of_the_schema_and_no_alias_is() -> None:
    known = {*schema_paths(RunConfig), *(f"model.{name}" for name in LlamaConfig.model_fields)}
    assert {alias.owner for alias in ALIASES.values()} <= known
    assert not ALIASES.keys() & known


@pytest.mark.parametrize("family", family_names())
def test_the_aliases_of_a_family_stand_for_settings_of_it(family: str) -> None:
    settings = {f"model.{name}" for name in get_config_class(family).model_fields}
    own = {k: v for k, v in aliases_of(family).items() if k not in ALIASES}
    assert {alias.owner for alias in own.values()} <= settings
    assert not own.keys() & settings


def test_a_family_brings_aliases_that_others_do_not_have() -> None:
    overrides = ["model.m_cu_init=2.0", "model.o_ce_init=1.5", "model.capacity=0.25"]
    model = compose_config("base", overrides=overrides).model.model_dump(mode="json")
    assert model["cu_detection_multiplier_init"] == 2.0
    assert model["ce_criterion_offset_init"] == 1.5
    assert model["capacity_gamma"] == 0.25  # which base.yaml sets to 0.5 under this name
    with assert_refused(
        "model.m_cu_init", value=2.0, constraint="unknown", remedy="num_layers", error=ConfigError
    ):
        compose_config("base", overrides=["model_type=mod", "model.m_cu_init=2.0"])


def test_the_command_line_wins_over_another_spelling_in_a_file(tmp_path: Path) -> None:
    text = "defaults: [/demo, override data: own, _self_]\ndata: {max_length: 64}\n"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.yaml").write_text("train: a/b\nvalidation: a/c\n")
    for spelling in ("sequence_length", "block_size", "max_length"):
        config = compose_config("mine", config_dir=tmp_path, overrides=[f"data.{spelling}=32"])
        assert config.data.sequence_length == 32


def test_an_alias_stands_for_its_owner() -> None:
    values = run_values(data__max_length=64)
    del values["data"]["sequence_length"]
    assert parse_config(values).data.sequence_length == 64
    assert "max_length" not in resolved(parse_config(values))["data"]


def test_alias_and_owner_may_agree_and_must_not_differ() -> None:
    assert parse_config(run_values(data__block_size=128)).data.sequence_length == 128
    constraint = ("data.sequence_length", "128")
    with assert_refused("data.max_length", 64, constraint, "remove", error=ConfigError):
        parse_config(run_values(data__max_length=64))


def test_other_spellings_of_training_and_model() -> None:
    changes = {
        "training__compile_model": True,
        "training__gradient_checkpointing": True,
        "training__mixed_precision": "bf16",
        "training__use_flash_attention": True,
        "training__lr_multipliers": {"base_model": 0.5, "router": 10.0},
        "training__warmup_ratio": 0.2,
        "model__num_hidden_layers": 6,
        "model__num_attention_heads": 8,
        "model__num_key_value_heads": 4,
    }
    values = run_values(**changes)
    del values["training"]["precision"]
    for key in ("num_layers", "num_heads", "num_kv_heads"):
        del values["model"][key]
    config = parse_config(values)
    training, model = config.training, config.model
    assert (training.compile, training.activation_recomputation) == (True, "full")
    assert (training.precision, training.warmup_steps) == ("bf16", 2)
    assert training.lr_multipliers == {"": 0.5, "router": 10.0}
    assert (model.num_layers, model.num_heads, model.num_kv_heads) == (6, 8, 4)  # type: ignore[attr-defined]
    assert parse_config(resolved(config)) == config
    system = {"mixed_precision": "no", "compile": True}
    config = parse_config(run_values(system=system))
    assert (config.training.precision, config.training.compile) == ("fp32", True)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"training__mixed_precision": "fp16"},
         ("training.mixed_precision", "'fp16'", "'bf16', 'fp8', 'no'", "choose")),
        ({"training__use_flash_attention": False},
         ("training.use_flash_attention", False, "fused", "training.use_flash_attention=true")),
        ({"training__gradient_checkpointing": True, "training__activation_recomputation": "none"},
         ("training.gradient_checkpointing", True, "training.activation_recomputation", "remove")),
        ({"training__warmup_ratio": 2},
         ("training.warmup_ratio", 2, "0 to 1", "training.warmup_steps")),
        ({"training__warmup_ratio": 0.2, "training__warmup_steps": 3},
         ("training.warmup_ratio", 0.2, ("training.warmup_steps", "3"), "remove")),
        ({"system__seed": 3}, ("system", "{'seed': 3}", "unknown", "training")),
    ],
)  # fmt: skip
def test_a_spelling_without_an_equal_is_refused(changes: dict[str, Any], parts: tuple) -> None:
    with assert_refused(*parts, error=ConfigError):
        parse_config(run_values(**changes))


@pytest.mark.parametrize("mixed", [{}, {"mixed": False}])
def test_a_dataset_is_chosen_by_name(mixed: dict[str, Any]) -> None:
    data = parse_config(_values(dataset_name="a", **mixed)).data
    assert [(s.name, s.path, s.weight) for s in data.train] == [("a", "data/a", 1.0)]
    assert [(s.name, s.path) for s in data.validation] == [("a", "data/a_val")]


@pytest.mark.parametrize("mixed", [{}, {"mixed": True}])
def test_datasets_are_mixed_by_weight(mixed: dict[str, Any]) -> None:
    choice = {"dataset_names": ["a", "b"], "dataset_weights": [0.7, 0.3], **mixed}
    config = parse_config(_values(**choice))
    assert [(s.name, s.weight) for s in config.data.train] == [("a", 0.7), ("b", 0.3)]
    assert [s.name for s in config.data.validation] == ["a"]
    assert parse_config(resolved(config)) == config
    equal = parse_config(_values(dataset_names=["a", "b"])).data
    assert [s.weight for s in equal.train] == [1.0, 1.0]


@pytest.mark.parametrize(("mixed", "names"), [(True, ["a", "b"]), (False, ["b"])])
def test_the_switch_says_which_of_two_choices_counts(mixed: bool, names: list[str]) -> None:
    choices = {"dataset_name": "b", "dataset_names": ["a", "b"], "dataset_weights": [0.7, 0.3]}
    assert [s.name for s in parse_config(_values(**choices, mixed=mixed)).data.train] == names


def test_the_spelling_works_on_the_command_line() -> None:
    overrides = [
        "data=named",
        "data.mixed=true",
        'data.dataset_names=["wikitext","openwebtext","pile-subset"]',
        "data.dataset_weights=[0.2,0.5,0.3]",
        "data.corpora.wikitext.train=/corpora/wikitext",
        "~data.sequence_length",
        "data.max_length=256",
    ]
    data = compose_config("demo", overrides=overrides).data
    assert [(s.name, s.weight) for s in data.train] == [
        ("wikitext", 0.2), ("openwebtext", 0.5), ("pile-subset", 0.3),
    ]  # fmt: skip
    assert data.train[0].path == "/corpora/wikitext"
    assert data.sequence_length == 256


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({}, ("data.dataset_name", "data.corpora", "a, b", "data.corpora")),
        ({"mixed": True}, ("data.dataset_names", "data.corpora", "a, b", "data.corpora")),
        (
            {"dataset_name": "A"},
            ("dataset", "'A'", ("data.corpora", "a, b"), "data.corpora.A.train=PATH"),
        ),
        (
            {"dataset_name": "web", "corpora": {}},
            ("dataset", "'web'", "data.corpora", "data.corpora.web.train=PATH"),
        ),
        (
            {"dataset_name": "a", "dataset_names": ["b"]},
            ("data.dataset_name", "'a'", "data.dataset_names", "data.mixed"),
        ),
        (
            {"dataset_name": "a", "dataset_weights": [1.0]},
            ("data.dataset_weights", [1.0], "data.dataset_name", "data.mixed"),
        ),
        ({"dataset_names": "a"}, ("data.dataset_names", "'a'", "list", "correct")),
        (
            {"dataset_names": ["a", "b"], "dataset_weights": [1.0]},
            ("data.dataset_weights", [1.0], ("2 numbers", "data.dataset_names"), "correct"),
        ),
        (
            {"dataset_names": ["a"], "dataset_weights": ["x"]},
            ("data.train.0.weight", "'x'", "number", "data.train.0.weight"),
        ),
        (
            {"dataset_names": ["a"], "dataset_weights": [-1.0]},
            ("data.train.0.weight", -1.0, "0", "data.train.0.weight"),
        ),
        ({"dataset_names": ["a", "a"]}, ("data.train", "a", "two", "`name`")),
        ({"dataset_name": "a", "train": "c"}, ("data.train", "'c'", "data.dataset_name", "remove")),
        (
            {"dataset_name": "a", "mixed": "yes"},
            ("data.mixed", "'yes'", "true or false", "correct"),
        ),
        ({"corpora": ["a"]}, ("data.corpora", ["a"], "names", "correct")),
        (
            {"dataset_name": "a", "corpora": {"a": "data/a"}},
            ("data.corpora.a", "'data/a'", "`train`", "correct"),
        ),
        (
            {"corpora": {"a": {"train": "x", "test": "y"}}},
            ("data.corpora.a", "'test'", "`validation`", "correct"),
        ),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(data: dict[str, Any], parts: tuple) -> None:
    with assert_refused(*parts, error=ConfigError):
        parse_config(_values(**data))
