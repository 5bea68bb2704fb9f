"""Initial weights keep the function they were trained for, or the difference must be declared."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.llama.config import LlamaConfig
from models.llama.model import FAMILY
from parallel.carry import SequentialModel
from parallel.checkpoint.manifest import encode_manifest
from parallel.context import ParallelContext
from pretrain.config import ConfigError, RunConfig, parse_config
from pretrain.config.compose import compose_config
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.initial_weights import initial_weights
from tests.models.checkpoints import write_checkpoint
from tests.pretrain.tiny_run import tiny_run
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=ConfigError)

SCALING = {
    "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
IMPORTED = {"rope_theta": 5e5, "rope_scaling": SCALING, "rms_norm_eps": 1e-6}


def _model(**changes: Any) -> dict[str, Any]:
    sizes = {
        "family": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 32,
    }
    return sizes | changes


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A converted model of another position encoding than the family's defaults."""
    config = LlamaConfig.model_validate(_model(**IMPORTED))
    write_checkpoint(tmp_path / "imported", config, tokenizer=None)
    return tmp_path / "imported"


def _take(data: Path, imported: Path, *, model: dict[str, Any], **changes: Any) -> None:
    config = tiny_run(data, model=model, training__init_from=str(imported), **changes)
    initial_weights(config, ParallelContext.single(device="meta"), RankGroup())


def _named(*names: str) -> dict[str, Any]:
    return {"training__init_from_changes": list(names)}


def test_settings_that_make_another_function_are_refused_by_name_with_both_values(data, imported):
    with pytest.raises(ValueError, match=r"model\.rms_norm_eps") as error:
        _take(data, imported, model=_model(rope_scaling=SCALING))
    message = str(error.value)
    assert "model.rms_norm_eps: 1e-06 there, 1e-05 here" in message
    assert "model.rope_theta: 500000.0 there, 10000.0 here" in message
    assert "rope_scaling" not in message
    assert message.endswith("training.init_from_changes=[rms_norm_eps, rope_theta]")


def test_changes_that_are_asked_for_are_taken_and_no_others(data, imported):
    model = _model(**IMPORTED | {"rope_theta": 1e6, "rms_norm_eps": 1e-5})
    _take(data, imported, model=model, **_named("rope_theta", "model.rms_norm_eps"))
    with assert_refused(
        "training.init_from",
        value=imported,
        constraint="model.rms_norm_eps",
        remedy="[rope_theta, rms_norm_eps]",
    ):
        _take(data, imported, model=model, **_named("rope_theta"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "rope_scaling",
            (
                "training.init_from_changes",
                "rope_scaling",
                ("different", "training.init_from="),
                "remove",
            ),
        ),
        (
            "rope_thetta",
            (
                "training.init_from_changes",
                "rope_thetta",
                ("different", "training.init_from="),
                "rope_theta",
            ),
        ),
        (
            "data.tokenizer",
            (
                "training.init_from_changes",
                "data.tokenizer",
                ("different", "training.init_from="),
                "remove",
            ),
        ),
    ],
)
def test_a_change_that_is_none_is_refused(name, parts, data, imported):
    model = _model(**IMPORTED | {"rope_theta": 1e6})
    with assert_refused(*parts):
        _take(data, imported, model=model, **_named("rope_theta", name))


def test_what_leaves_the_function_as_it_is_may_differ(data, imported):
    same = {"init_std": 0.5, "max_position_embeddings": 64, "head_dim": 8}
    _take(data, imported, model=_model(**IMPORTED | same))


def test_other_heads_of_the_same_shapes_are_another_function(data, imported):
    heads = {"num_heads": 2, "num_kv_heads": 1}
    with assert_refused(
        "training.init_from",
        value=imported,
        constraint="model.num_heads",
        remedy="[head_dim, num_heads, num_kv_heads]",
    ):
        _take(data, imported, model=_model(**IMPORTED | heads))


def test_changes_without_weights_to_begin_with_are_refused(data):
    with _refused(
        "training.init_from_changes",
        value="['rope_theta']",
        constraint="training.init_from",
        remedy="set",
    ):
        tiny_run(data, **_named("rope_theta"))


# Tokenizers. The corpus of these tests has a sidecar with the fingerprint ttt...


def _with_tokenizer(folder: Path, fingerprint: str | None, spec: str) -> Path:
    """A checkpoint of which the manifest names a tokenizer, and its fingerprint if it is known."""
    write_checkpoint(folder, LlamaConfig.model_validate(_model()), tokenizer=spec)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_bytes())
    del content["checksum"]
    content["fingerprints"] = {} if fingerprint is None else {"data.tokenizer": fingerprint}
    manifest.write_bytes(encode_manifest(content))
    return folder


def test_another_tokenizer_is_another_function_of_the_text(data, tmp_path):
    same = _with_tokenizer(tmp_path / "same", "t" * 64, "gone/tokenizer.json")
    _take(data, same, model=_model())
    other = _with_tokenizer(tmp_path / "other", "u" * 64, "gone/tokenizer.json")
    constraint = ("(uuuuuuuuuuuu)", "tttttttttttt")
    with assert_refused("data.tokenizer", "gone/tokenizer.json", constraint, "data.tokenizer"):
        _take(data, other, model=_model())
    _take(data, other, model=_model(), **_named("data.tokenizer"))


def test_a_tokenizer_that_was_moved_with_its_weights_is_found(data, tmp_path, caplog):
    folder = _with_tokenizer(tmp_path / "import", None, str(tmp_path / "before" / "tokenizer"))
    with caplog.at_level(logging.WARNING):
        _take(data, folder, model=_model())
    assert "no longer exists, so it cannot be compared" in caplog.text
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with assert_refused(
        "training.init_from",
        value="tttttttttttt",
        constraint="data.tokenizer",
        remedy="data.tokenizer",
    ):
        _take(data, folder, model=_model())


def test_a_checkpoint_that_is_published_meanwhile_changes_no_rank_s_weights(data, tmp_path):
    """All ranks take the weights that rank 0 has checked, whatever is newer when they read."""
    run, config = tmp_path / "other_run", LlamaConfig.model_validate(_model())
    checked = write_checkpoint(run / "checkpoints" / "step_1", config, tokenizer=None)
    newer = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single(), seed=1)

    class Publishing(RankGroup):
        def run_on_rank0(self, action):
            found = super().run_on_rank0(action)
            write_checkpoint(
                run / "checkpoints" / "step_2", config, tokenizer=None, whole=newer.eval()
            )
            return found

    settings = tiny_run(data, model=_model(), training__init_from=str(run))
    weights = initial_weights(settings, ParallelContext.single(), Publishing())
    assert weights is not None
    for spec, layer in zip(newer.specs, newer.layers, strict=True):
        weights.load(spec, layer)
    for name, parameter in checked.named_parameters():
        assert torch.equal(newer.get_parameter(name), parameter), name


# model=checkpoint


def _composed(folder: Path, run: dict[str, Any], *overrides: str) -> RunConfig:
    (folder / "mine.yaml").write_text(yaml.safe_dump(run))
    return compose_config("mine", config_dir=folder, overrides=overrides)


def _run_file(imported: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run_dir": "runs/mine",
        "data": {"train": "data/train", "sequence_length": 32},
        "training": {"max_steps": 1, "batch_size": 1, "lr": 1e-3, "init_from": str(imported)},
    } | sections


def test_the_model_of_a_checkpoint_is_one_line(data, imported, tmp_path):
    expected = LlamaConfig.model_validate(_model(**IMPORTED))
    assert _composed(tmp_path, _run_file(imported), "model=checkpoint").model == expected
    assert _composed(tmp_path, _run_file(imported, model="checkpoint")).model == expected
    in_defaults = _run_file(imported, defaults=[{"model": "checkpoint"}, "_self_"])
    assert _composed(tmp_path, in_defaults).model == expected
    _take(data, imported, model=expected.model_dump(mode="json"))


def test_settings_beside_it_replace_those_of_the_checkpoint(imported, tmp_path):
    longer = {"family": "checkpoint", "max_position_embeddings": 128}
    for found in (
        _composed(tmp_path, _run_file(imported, model=longer)),
        _composed(
            tmp_path, _run_file(imported), "model=checkpoint", "model.max_position_embeddings=128"
        ),
    ):
        assert found.model.max_position_embeddings == 128
        assert found.model.rope_theta == 5e5
    # A model in the run file is what differs from the checkpoint's.
    kept = _composed(tmp_path, _run_file(imported, model=_model()), "model=checkpoint")
    assert kept.model.rope_theta == 5e5


def test_the_newest_checkpoint_of_a_run_and_weights_alone_are_found(imported, tmp_path):
    run = tmp_path / "run" / "checkpoints" / "step_3"
    run.parent.mkdir(parents=True)
    imported.rename(run)
    for path in (tmp_path / "run", run, run / "weights"):
        assert _composed(tmp_path, _run_file(path, model="checkpoint")).model.rope_theta == 5e5


def _manifest(config: dict[str, Any]) -> bytes:
    rest = {name: {} for name in ("layout", "fingerprints", "versions", "sharding", "files")}
    return encode_manifest({"format_version": 1, "step": 0, "config": config, **rest})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"training.init_from='.*nowhere': .*nowhere"),
        ({"config": {}}, "training.init_from=.*model"),
        ({"config": {"model": 3}}, "training.init_from=.*model"),
        ({"config": {"model": {"family": "checkpoint"}}}, "model.family"),
        ("{", "damaged.*JSON"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(content, message, tmp_path):
    folder = tmp_path / "nowhere"
    if content is not None:
        folder.mkdir()
        raw = content.encode() if isinstance(content, str) else _manifest(**content)
        (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        _composed(tmp_path, _run_file(folder, model="checkpoint"))


def test_a_model_of_a_checkpoint_needs_one(tmp_path):
    run = _run_file(tmp_path, model="checkpoint")
    del run["training"]["init_from"]
    with _refused(
        "model", value="checkpoint", constraint="training.init_from", remedy="checkpoint"
    ):
        _composed(tmp_path, run)
    for training in (None, 3, {"init_from": 3}):
        with _refused(
            "model", value="checkpoint", constraint="training.init_from", remedy="checkpoint"
        ):
            parse_config({**run, "training": training})


def test_reading_it_imports_no_torch(imported, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(_run_file(imported, model="checkpoint")))
    code = (
        "import sys\nfrom pretrain.config.compose import compose_config\n"
        f"print(compose_config('mine', config_dir={str(tmp_path)!r}).model.rope_theta)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "500000.0\n", done.stderr
