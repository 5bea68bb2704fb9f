#!/usr/bin/env bash
# DeepSpeed's Muon tells embeddings and heads from hidden matrices by substrings of their names
#
# Seen with   deepspeed 0.19.8, torch 2.13.0 (CPU, gloo), Python 3.11
# Behaviour   deepspeed.initialize gives Muon every matrix whose name has neither "embed" nor "lm_head"
#             in it. The embeddings of a model in GPT-2's names and a head called "output" are
#             orthogonalised like hidden layers; a hidden layer called "embed_proj" goes to Adam.
# Output seen
#   RESULT token and position embedding, hidden layer, head ('embed_tokens', 'embed_positions', 'mlp', 'lm_head'): Muon steps ['mlp']
#   RESULT token and position embedding, hidden layer, head ('wte', 'wpe', 'embed_proj', 'output'): Muon steps ['wte', 'wpe', 'output']
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check setuptools wheel packaging ninja torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""Which matrices of two small language models DeepSpeed hands to Muon."""
import os
import sys

import deepspeed
from torch import nn

VOCAB, WIDTH = 32, 8


def model(tokens, positions, hidden, head):
    return nn.ModuleDict({
        tokens: nn.Embedding(VOCAB, WIDTH),
        positions: nn.Embedding(VOCAB, WIDTH),
        hidden: nn.Linear(WIDTH, WIDTH, bias=False),
        head: nn.Linear(WIDTH, VOCAB, bias=False),
    })


def given_to_muon(*names):
    parameters = {"lr": 0.01, "torch_adam": True}  # DeepSpeed's own Adam would be compiled for minutes
    config = {"train_batch_size": 1, "optimizer": {"type": "Muon", "params": parameters}}
    net = model(*names)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    groups = engine.optimizer.param_groups
    muon = {id(p) for group in groups if group["use_muon"] for p in group["params"]}
    return [name for name in names if id(net[name].weight) in muon]


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29593"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled, too
    deepspeed.init_distributed("gloo", verbose=False)
    cases = {
        ("embed_tokens", "embed_positions", "mlp", "lm_head"): ["mlp"],
        ("wte", "wpe", "embed_proj", "output"): ["wte", "wpe", "output"],
    }
    found = {names: given_to_muon(*names) for names in cases}
    for names, muon in found.items():
        print(f"RESULT token and position embedding, hidden layer, head {names}: Muon steps {muon}")
    sys.exit(found != cases)
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
