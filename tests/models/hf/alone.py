"""An exported directory in a process that has transformers and not this project."""

from __future__ import annotations

import os
import subprocess
import sys
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

directory, inputs, outputs, new = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, dtype=torch.float64
)
tokens = load_file(inputs)["tokens"]
options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
with torch.no_grad():
    result = {"logits": model(tokens).logits.contiguous()}
    result["loss"] = model(tokens, labels=tokens).loss
    result["greedy"] = model.generate(tokens, max_new_tokens=int(new), **options)
model.save_pretrained(outputs + ".saved")
again = AutoModelForCausalLM.from_pretrained(
    outputs + ".saved", trust_remote_code=True, dtype=torch.float64
)
with torch.no_grad():
    result["again"] = again(tokens).logits.contiguous()
try:
    __import__("models")
except ImportError:
    save_file(result, outputs)
"""


def computed_alone(
    directory: Path, tokens: Tensor, *, new_tokens: int, folder: Path
) -> dict[str, Tensor]:
    """What the model in `directory` makes of tokens [b, s], in fp64.

    `logits` [b, s, V], `loss`, `greedy` [b, s + new_tokens], and `again`, the logits after the
    model was saved and loaded once more. The saved directory is `folder`/out.saved.
    """
    save_file({"tokens": tokens}, folder / "tokens")
    arguments = [directory, folder / "tokens", folder / "out", new_tokens]
    run = subprocess.run(
        [sys.executable, "-I", "-c", _SCRIPT, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return load_file(folder / "out")
