"""Exported directories in a process that has transformers and not this project."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_SCRIPT = """
import sys
# The project is installed in editable form: take its finder away.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

inputs, new, *places = sys.argv[1:]
tokens = load_file(inputs)["tokens"]
options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
loading = {"trust_remote_code": True, "dtype": torch.float64}
for directory, outputs in zip(places[::2], places[1::2], strict=True):
    model = AutoModelForCausalLM.from_pretrained(directory, **loading)
    with torch.no_grad():
        result = {"logits": model(tokens).logits.contiguous()}
        result["loss"] = model(tokens, labels=tokens).loss
        result["greedy"] = model.generate(tokens, max_new_tokens=int(new), **options)
    model.save_pretrained(outputs + ".saved")
    again = AutoModelForCausalLM.from_pretrained(outputs + ".saved", **loading)
    with torch.no_grad():
        result["again"] = again(tokens).logits.contiguous()
    try:
        __import__("models")
    except ImportError:
        save_file(result, outputs)
"""


def computed_alone(
    directories: Sequence[Path], tokens: Tensor, *, new_tokens: int, folder: Path
) -> list[dict[str, Tensor]]:
    """What the model in each directory makes of tokens [b, s], in fp64.

    `logits` [b, s, V], `loss`, `greedy` [b, s + new_tokens], and `again`, the logits after the
    model was saved and loaded once more. The n-th saved directory is `folder`/n.saved.
    """
    save_file({"tokens": tokens}, folder / "tokens")
    outputs = [folder / str(number) for number in range(len(directories))]
    places = [path for pair in zip(directories, outputs, strict=True) for path in pair]
    arguments = [folder / "tokens", new_tokens, *places]
    run = subprocess.run(
        [sys.executable, "-I", "-c", _SCRIPT, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [load_file(output) for output in outputs]
