from __future__ import annotations

import hashlib
import json

import pytest
import torch

from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.llama.model import FAMILY
from parallel.checkpoint.manifest import read_manifest, verify_content, verify_listing
from tests.models.checkpoints import config, edit_json, write_checkpoint
from tests.refusals import assert_refused

TOKENS = TokenInputs(torch.arange(40).view(2, 20))


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 2), (5, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_any_layout_loads_as_one_model(pipeline, tensor, tied, tmp_path):
    of = config(tie_embeddings=tied)
    whole = write_checkpoint(tmp_path / "step_0", of, pipeline=pipeline, tensor=tensor)
    stored = open_checkpoint(tmp_path / "step_0")
    assert (stored.family, stored.config, stored.tokenizer) == (FAMILY, of, "bytes")
    loaded = load_model(stored, device="cpu")
    assert torch.equal(loaded(TOKENS), whole(TOKENS))


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path):
    for step, layers in ((9, 2), (10, 3)):
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step}", config(num_layers=layers))
    assert open_checkpoint(tmp_path).config.num_layers == 3


def test_bf16_weights_are_loaded_as_they_are_stored(tmp_path):
    write_checkpoint(tmp_path, config(), dtype=torch.bfloat16)
    stored = open_checkpoint(tmp_path)
    model = load_model(stored, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS).dtype == torch.bfloat16
    assert load_model(stored, device="cpu", precision="fp32")(TOKENS).dtype == torch.float32


def test_what_is_written_is_a_checkpoint_for_training_too(tmp_path):
    directory = tmp_path / "step_0"
    write_checkpoint(directory, config())
    manifest = read_manifest(directory)
    assert verify_listing(directory, manifest) is None
    assert verify_content(directory, manifest, manifest.files) is None
    assert manifest.sharding["block_0.mlp.down.weight"] == (1, 48)


def test_damage_is_found(tmp_path):
    write_checkpoint(tmp_path, config())
    file = tmp_path / "weights" / "pp_00_tp_00.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    with assert_refused(file.name, value=digest, constraint="sha256", remedy="copy"):
        open_checkpoint(tmp_path)


def _model_section(tmp_path) -> dict:
    return json.loads((tmp_path / "manifest.json").read_text())["config"]["model"]


@pytest.mark.parametrize(
    ("change", "setting", "value", "constraint", "remedy"),
    [
        ({"num_layers": 4}, "weights", "block_3.attention.key.weight", "lacks", "one model"),
        ({"num_layers": 2}, "weights", "block_2.attention.key.weight", "unexpected", "one model"),
        ({"intermediate_size": 64}, "mlp.gate.weight", "[48, 32]", "[64, 32]", "one model"),
        ({"family": "lama"}, "model.family", "'lama'", "known", "did you mean 'llama'"),
    ],
)
def test_weights_of_another_configuration_are_refused(
    change, setting, value, constraint, remedy, tmp_path
):
    write_checkpoint(tmp_path, config())
    model = _model_section(tmp_path) | change
    edit_json(tmp_path / "manifest.json", config={"model": model, "data": {}})
    with assert_refused(setting, value=value, constraint=constraint, remedy=remedy):
        load_model(open_checkpoint(tmp_path), device="cpu")


def test_a_configuration_that_is_none_of_its_family_is_refused(tmp_path):
    write_checkpoint(tmp_path, config())
    model = _model_section(tmp_path) | {"num_heads": 5}
    edit_json(tmp_path / "manifest.json", config={"model": model, "data": {}})
    with pytest.raises(ValueError, match="num_heads=5") as caught:
        open_checkpoint(tmp_path)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_a_model_is_refused(tmp_path):
    write_checkpoint(tmp_path, config())
    (tmp_path / "manifest.json").write_text("[]")
    damaged = {"value": "damaged", "constraint": "JSON object", "remedy": "copy"}
    with assert_refused("manifest.json", **damaged):
        open_checkpoint(tmp_path)
    (tmp_path / "manifest.json").unlink()
    absent = {"value": "manifest.json", "constraint": "incomplete", "remedy": "copy"}
    with assert_refused(str(tmp_path), **absent):
        open_checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with assert_refused("weights", value=tmp_path, constraint="no weights", remedy="run directory"):
        open_checkpoint(tmp_path)
