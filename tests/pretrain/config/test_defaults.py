"""The `defaults` list: the files of a run file, and the precedence of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pretrain.config.defaults import DefaultsTree
from pretrain.config.search_path import SearchPath
from pretrain.errors import ConfigError

FILES = {
    "plain": "training: {lr: 1, eps: 1}",
    "first": "defaults: [plain, _self_]\ntraining: {lr: 2}",
    "silent": "defaults: [plain]\ntraining: {lr: 2}",
    "last": "defaults: [_self_, plain]\ntraining: {lr: 2}",
    "chosen": "defaults: [{parallel: a}, {experiment: x}]",
    "replaced": "defaults: [chosen, override parallel: b]",
    "none": "defaults: [{parallel: null}, _self_]\nparallel: {tensor: 9}",
    "late": "defaults: [{parallel: a}, {experiment: replaces}, _self_]",
    "both": "defaults: [late, override parallel: a]",
    "parallel/a": "tensor: 1\npipeline: 1",
    "parallel/b": "tensor: 2",
    "parallel/deep/c": "defaults: [d, /parallel/a, _self_]\ntensor: 3",
    "parallel/deep/d": "expert: 4",
    "experiment/x": "training: {lr: 5}",
    "experiment/replaces": "defaults: [override /parallel: b]\ntraining: {lr: 6}",
    # What is wrong.
    "circle": "defaults: [round]",
    "round": "defaults: [circle]",
    "twice": "defaults: [{parallel: a}, {parallel: b}]",
    "never": "defaults: [override parallel: a]",
    "missing": "defaults: [nothing]",
    "text": "defaults: plain",
    "odd": "defaults: [{a: b, c: d}]",
    "optional": "defaults: [{optional parallel: a}]",
    "number": "defaults: [3]",
    "parallel/chooses": "defaults: [{experiment: x}]",
    "bad_option": "defaults: [{parallel: aa}]",
    "list": "- 1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def _compose(folder: Path, name: str, **choices: str | None) -> dict[str, Any]:
    search = SearchPath(folder)
    tree = DefaultsTree(search.run_file(name), choices, search)
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(*tree.parts))
    return values


def test_the_file_itself_is_where_self_stands_and_at_the_end_without(folder: Path) -> None:
    assert _compose(folder, "first") == {"training": {"lr": 2, "eps": 1}}
    assert _compose(folder, "silent") == {"training": {"lr": 2, "eps": 1}}
    assert _compose(folder, "last") == {"training": {"lr": 1, "eps": 1}}


def test_a_group_named_like_a_section_fills_it_and_another_holds_sections(folder: Path) -> None:
    a = {"tensor": 1, "pipeline": 1}
    assert _compose(folder, "chosen") == {"parallel": a, "training": {"lr": 5}}


def test_an_override_replaces_an_option_in_a_file_before_or_after_it(folder: Path) -> None:
    assert _compose(folder, "replaced") == {"parallel": {"tensor": 2}, "training": {"lr": 5}}
    assert _compose(folder, "late") == {"parallel": {"tensor": 2}, "training": {"lr": 6}}


def test_the_outermost_override_counts_and_the_command_line_more(folder: Path) -> None:
    assert _compose(folder, "both")["parallel"] == {"tensor": 1, "pipeline": 1}
    assert _compose(folder, "both", parallel="b")["parallel"] == {"tensor": 2}


def test_an_option_of_the_command_line_is_where_the_file_has_one_and_else_last(
    folder: Path,
) -> None:
    assert _compose(folder, "none", parallel="a")["parallel"] == {"tensor": 9, "pipeline": 1}
    assert _compose(folder, "first", experiment="x")["training"]["lr"] == 5
    late = _compose(folder, "chosen", experiment="replaces")
    assert late == {"parallel": {"tensor": 2}, "training": {"lr": 6}}


def test_a_removed_group_leaves_what_the_file_itself_says(folder: Path) -> None:
    assert _compose(folder, "chosen", parallel=None) == {"training": {"lr": 5}}


def test_names_are_relative_to_the_folder_of_the_file(folder: Path) -> None:
    found = _compose(folder, "plain", parallel="deep/c")["parallel"]
    assert found == {"expert": 4, "tensor": 3, "pipeline": 1}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("circle", ["circle.yaml", "leads back to this file", "remove"]),
        ("twice", ["twice.yaml", "parallel", "chosen before", "`override parallel: b`"]),
        ("never", ["never.yaml", "`override parallel`", "write `parallel: a`"]),
        ("missing", ["missing.yaml", "'nothing'", "correct the entry"]),
        ("text", ["text.yaml", "defaults='plain'", "must be a list"]),
        ("odd", ["odd.yaml", "{'a': 'b', 'c': 'd'}", "`group: option`"]),
        ("optional", ["optional.yaml", "{'optional parallel': 'a'}", "`group: option`"]),
        ("number", ["number.yaml", "entry 3;"]),
        ("bad_option", ["bad_option.yaml: parallel=aa", "did you mean parallel=a?"]),
        ("list", ["list.yaml is a list", "write sections"]),
    ],
)
def test_a_list_that_cannot_be_followed_is_one_line(
    folder: Path, name: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        _compose(folder, name)
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_of_a_section_chooses_no_options(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"chooses\.yaml: .*`group: option`"):
        _compose(folder, "plain", parallel="chooses")
