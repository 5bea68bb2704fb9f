"""The files as the package `gguf` reads them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import convert
from models.checkpoint import StoredModel, open_checkpoint
from models.gguf.export import to_gguf
from models.gguf.weights import DTYPES, gguf_name, in_pairs
from models.llama.hf import parameter_names
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.models.checkpoints import config, write_checkpoint
from tests.models.llama.test_config import SCALING
from tests.refusals import assert_refused

pytestmark = pytest.mark.ecosystem


def _read(path: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):
        import gguf
    return gguf.GGUFReader(path)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in _read(path).tensors:
        data = np.array(tensor.data)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.tensor_type.name == "BF16":
            found[tensor.name] = torch.from_numpy(data).view(torch.bfloat16).view(shape)
        else:
            found[tensor.name] = torch.from_numpy(data).view(shape)
    return found


def _values(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in _read(path).fields.items()}


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_tensors_are_ours_bit_for_bit(dtype, tmp_path):
    of = config(qkv_bias=True, rope_scaling=SCALING)
    whole = write_checkpoint(tmp_path / "step_1", of, pipeline=2, tensor=2)
    to_gguf(tmp_path / "step_1", tmp_path / "m.gguf", dtype=dtype)
    found = _tensors(tmp_path / "m.gguf")
    factors = found.pop("rope_freqs.weight")
    assert factors.shape == (4,)
    names = {ours: gguf_name(theirs) for ours, theirs in parameter_names(of).items()}
    assert set(found) == set(names.values())
    for ours, parameter in whole.named_parameters():
        expected = parameter.detach()
        if ".query." in ours or ".key." in ours:
            expected = in_pairs(expected, 4 if ".query." in ours else 2)
        if expected.dim() > 1:
            expected = expected.to(DTYPES[dtype or "f32"])
        assert found[names[ours]].dtype == expected.dtype
        assert torch.equal(found[names[ours]], expected), ours


def test_names_are_in_the_tables_of_the_package(tmp_path):
    gguf = _package()
    for settings in ({"qkv_bias": True}, {"qk_norm": True}, {"rope_scaling": SCALING}):
        write_checkpoint(tmp_path / "s", config(**settings), tokenizer=None)
        path = tmp_path / "m.gguf"
        to_gguf(tmp_path / "s", path)
        name = _values(path)["general.architecture"]
        (kind,) = (k for k, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
        templates = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
        for tensor in _tensors(path):
            stem = tensor.rpartition(".")[0]
            parts = ["{bid}" if part.isdigit() else part for part in stem.split(".")]
            assert ".".join(parts) in templates
        path.unlink()
        _remove(tmp_path / "s")


def _package() -> Any:
    with warnings.catch_warnings(action="ignore"):
        import gguf
    return gguf


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_weights_of_bf16_stay_so(tmp_path):
    write_checkpoint(tmp_path / "s", config(), dtype=torch.bfloat16, tokenizer=None)
    to_gguf(tmp_path / "s", tmp_path / "m.gguf")
    values, found = _values(tmp_path / "m.gguf"), _tensors(tmp_path / "m.gguf")
    assert values["general.file_type"] == _package().LlamaFileType.MOSTLY_BF16
    assert found["output.weight"].dtype == torch.bfloat16
    assert found["output_norm.weight"].dtype == torch.float32
    with ShardedWeightsReader(tmp_path / "s" / "weights") as reader:
        assert torch.equal(found["output.weight"], reader.full("head.output.weight"))


def test_weights_beyond_fp16_are_refused_and_nothing_is_left(tmp_path):
    whole = write_checkpoint(tmp_path / "unused", config())
    with torch.no_grad():
        whole.get_parameter("head.output.weight")[3, 5] = 7e4
    write_checkpoint(tmp_path / "s", config(), whole=whole)
    before = sorted(os.listdir(tmp_path))
    with assert_refused(
        "head.output.weight", value="7e+04", constraint="65504", remedy="bf16 or f32"
    ):
        to_gguf(tmp_path / "s", tmp_path / "m.gguf", dtype="f16")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_is_never_written_over(tmp_path, capsys):
    write_checkpoint(tmp_path / "s", config())
    line = ["to-gguf", "--checkpoint", str(tmp_path / "s"), "--output", str(tmp_path / "m.gguf")]
    assert convert.main([*line, "--no-tokenizer"]) == 0
    assert f"wrote {tmp_path / 'm.gguf'}" in capsys.readouterr().out
    assert convert.main(line) == 2
    assert "m.gguf exists" in capsys.readouterr().err


def test_the_run_names_the_model_and_its_tokenizer_the_rest(tmp_path):
    folder = byte_level(tmp_path / "t", ["<s>", "</s>"], begin="<s>")
    declare(folder, tokenizer_config={"eos_token": "</s>", "chat_template": "{{ messages }}"})
    checkpoint = tmp_path / "runs" / "a_run" / "checkpoints" / "step_7"
    write_checkpoint(checkpoint, config(vocab_size=303), tokenizer=str(folder))
    to_gguf(tmp_path / "runs" / "a_run", tmp_path / "m.gguf")
    values = _values(tmp_path / "m.gguf")
    assert values["general.name"] == "a_run"
    stored: StoredModel = open_checkpoint(checkpoint)
    assert values["llama.vocab_size"] == stored.config.vocab_size
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    assert values["tokenizer.ggml.add_bos_token"] is True
    begin, end = (values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    assert [values["tokenizer.ggml.tokens"][i] for i in (begin, end)] == ["<s>", "</s>"]
