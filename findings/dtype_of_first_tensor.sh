#!/usr/bin/env bash
# transformers loads a whole checkpoint in the dtype of the tensor whose name comes first
#
# Seen with   transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11
# Behaviour   where config.json names no dtype, from_pretrained takes that of one tensor, the first by
#             name. In a Llama that is the head: a checkpoint in fp32 whose head was stored in bf16 is
#             rounded to bf16 as a whole, without a word, and one in bf16 with a head in fp32 takes twice
#             the memory. A norm in another dtype changes nothing.
# Output seen
#   RESULT stored in torch.float32 but model.norm.weight in torch.bfloat16: loaded in {torch.float32}, model.layers.0.mlp.up_proj.weight off by 0e+00
#   RESULT stored in torch.float32 but lm_head.weight in torch.bfloat16: loaded in {torch.bfloat16}, model.layers.0.mlp.up_proj.weight off by 1e-04
#   RESULT stored in torch.bfloat16 but lm_head.weight in torch.float32: loaded in {torch.float32}, model.layers.0.mlp.up_proj.weight off by 0e+00
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""In which dtype a checkpoint of mixed dtypes comes back, and what that costs its fp32 matrices."""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2}
MATRIX = "model.layers.0.mlp.up_proj.weight"


def reloaded(stored, exception, other):
    """All tensors stored in one dtype, but one in another: the dtypes and the matrix that come back."""
    torch.manual_seed(0)
    folder = Path(f"{exception}-{other}")
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t.to(other if name == exception else stored) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(folder)
    off = (model.get_parameter(MATRIX).double() - tensors[MATRIX].double()).abs().max().item()
    dtypes = {p.dtype for p in model.parameters()}
    print(f"RESULT stored in {stored} but {exception} in {other}: loaded in {dtypes}, "
          f"{MATRIX} off by {off:.0e}")
    return dtypes, off


if __name__ == "__main__":
    fp32, bf16 = torch.float32, torch.bfloat16
    norm, _ = reloaded(fp32, "model.norm.weight", bf16)
    rounded, off = reloaded(fp32, "lm_head.weight", bf16)
    widened, _ = reloaded(bf16, "lm_head.weight", fp32)
    sys.exit(not (norm == {fp32} and rounded == {bf16} and off > 0 and widened == {fp32}))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
