from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from data_tools.config import DataConfig
from tests.refusals import assert_refused

# named.yaml is a catalogue, which the configuration of a run resolves: test_aliases.py.
_FOLDER = Path(__file__).parents[2] / "configs" / "data"
_EXAMPLES = sorted(path for path in _FOLDER.glob("*.yaml") if path.name != "named.yaml")


def test_a_path_stands_for_a_source_with_weight_one() -> None:
    short = DataConfig.model_validate({"train": "data/web", "sequence_length": 8})
    long = {"path": "data/web", "weight": 1, "name": "web"}
    assert short == DataConfig.model_validate({"train": [long], "sequence_length": 8})
    assert short == DataConfig.model_validate({"train": ["data/web"], "sequence_length": 8})


def test_null_is_no_held_out_text() -> None:
    none = DataConfig.model_validate({"train": "a", "validation": None, "sequence_length": 8})
    assert none == DataConfig.model_validate({"train": "a", "sequence_length": 8})


def test_configuration_survives_a_round_trip() -> None:
    config = DataConfig.model_validate(
        {"train": ["a", {"path": "b", "weight": 2}], "validation": "c", "sequence_length": 8}
    )
    assert DataConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.name)
def test_example_files_are_valid(path: Path) -> None:
    assert DataConfig.model_validate(yaml.safe_load(path.read_text())).train


def test_there_are_examples() -> None:
    assert {path.name for path in _EXAMPLES} >= {"demo.yaml", "bytes.yaml", "blend.yaml"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": ["x/a", "y/a"]}, ("data.train", "a", "two", "`name`")),
        ({"validation": ["x/a", "y/a"]}, ("data.validation", "a", "two", "`name`")),
        (
            {"validation": [{"path": "a", "weight": 2}]},
            ("data.validation", 2.0, ("source a", "weight"), "remove"),
        ),
        ({"documents": "file"}, ("data.documents", "file", "data.kind=tokens", "data.kind=bytes")),
        (
            {"kind": "bytes", "json_key": "a"},
            ("data.json_key", "a", "data.documents=jsonl", "data.documents=jsonl"),
        ),
        (
            {"kind": "bytes", "tokenizer": "t.model"},
            ("data.tokenizer", "t.model", "data.kind is bytes", "remove"),
        ),
    ],
)
def test_wrong_setting_is_refused(changes: dict[str, Any], parts: tuple) -> None:
    with assert_refused(*parts):
        DataConfig.model_validate({"train": "a", "sequence_length": 8, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequnce_length": 8}, "sequnce_length\n  Extra inputs are not permitted"),
        ({"train": [{"path": "a", "wieght": 1}]}, "wieght\n  Extra inputs are not permitted"),
        ({"train": []}, "at least 1 item"),
        ({"train": None}, "train\n  Input should be a valid tuple"),
        ({"train": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"train": [{"path": "a", "weight": True}]}, "valid number"),
        ({"train": [{"path": "a", "weight": float("nan")}]}, "finite number"),
        ({"sequence_length": 0}, "greater than 0"),
        ({"sequence_length": "8"}, "valid integer"),
        ({"num_workers": -1}, "greater than or equal to 0"),
        ({"kind": "parquet"}, "'tokens' or 'bytes'"),
        ({"kind": "bytes", "documents": "line"}, "'file', 'blank_line' or 'jsonl'"),
    ],
)
def test_value_of_the_wrong_type_or_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"train": "a", "sequence_length": 8, **changes})


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "preprocess",
        "train_tokenizer",
        "inspect_corpus",
        "demo_corpus",
        "sampling.token_dataset",
    ],
)
def test_importing_needs_no_torch(module: str) -> None:
    program = f"import sys, data_tools.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
