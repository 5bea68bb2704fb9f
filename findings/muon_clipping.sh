#!/usr/bin/env bash
# DeepSpeed's Muon under ZeRO-1 in fp32 clips the orthogonalised update, not the gradient
#
# Seen with   deepspeed 0.19.8, torch 2.13.0 (CPU, gloo), Python 3.11
# Behaviour   a gradient whose norm is below gradient_clipping should not be touched; the update
#             shrinks nevertheless, because the norm is taken after Newton-Schulz has made the gradient
#             orthogonal.
# Output seen
#   RESULT gradient norm 0.594, to be clipped at 1.0; the update of the matrix has norm 0.0208 without clipping, 0.0100 with it (2.08 times smaller)
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check setuptools wheel packaging ninja torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""One step of DeepSpeed's Muon under ZeRO-1 in fp32, without and with a clipping that does not bite."""
import os
import sys

import deepspeed
import torch
from torch import nn

WIDTH, BATCH = 32, 4


def one_step(clip):
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    model.weight.use_muon, model.bias.use_muon = True, False
    torch.manual_seed(1)
    x = torch.randn(BATCH, WIDTH)
    gradient, _ = torch.autograd.grad(model(x).square().mean(), [model.weight, model.bias])
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Muon", "params": {"lr": 0.01, "muon_lr": 0.01, "adam_lr": 0.01}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    before = engine.module.weight.detach().clone()
    engine.backward(engine(x).square().mean())
    engine.step()
    return gradient.norm().item(), (engine.module.weight.detach() - before).norm().item()


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29591"}
    deepspeed.init_distributed("gloo", verbose=False)
    norm, free = one_step(0.0)
    _, clipped = one_step(1.0)
    print(f"RESULT gradient norm {norm:.3f}, to be clipped at 1.0; the update of the matrix has norm "
          f"{free:.4f} without clipping, {clipped:.4f} with it ({free / clipped:.2f} times smaller)")
    sys.exit(not (norm < 1.0 and clipped < 0.9 * free))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
