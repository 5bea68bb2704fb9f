#!/usr/bin/env bash
# DeepSpeed's pipeline without ZeRO clips by the norm of the first stage alone
#
# Seen with   deepspeed 0.19.8, torch 2.13.0 (CPU, gloo), Python 3.11
# Behaviour   in fp32 at ZeRO stage 0 the gradient norm that clipping uses leaves out every stage
#             but the first, so that a clipped step is longer than one process makes it. At ZeRO stage 1,
#             also with one data rank, it is that of one process.
# Output seen
#   RESULT one process: the stages move by 0.08226 and 0.05686
#   RESULT ZeRO-0:      the stages move by 0.10000 and 0.06912
#   RESULT ZeRO-1:      the stages move by 0.08226 and 0.05686
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check setuptools wheel packaging ninja torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""Gradient norm and clipping of a pipeline of 2 in fp32 without ZeRO and with ZeRO-1."""
import os
import sys

import deepspeed
import torch
import torch.multiprocessing as mp
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

WIDTH, BATCH, CLIP = 16, 4, 0.1


def initialise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def loss_of(output, target):
    return (output - target).square().mean()


def batch():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, BATCH, WIDTH, generator=generator)
    return x, y


def reference():
    """How far the two layers move in one clipped step of SGD with learning rate 1."""
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    for seed, layer in enumerate(layers):
        initialise(layer, seed)
    x, y = batch()
    loss_of(layers[1](layers[0](x)), y).backward()
    parameters = [p for layer in layers for p in layer.parameters()]
    nn.utils.clip_grad_norm_(parameters, CLIP)
    return [torch.stack([p.grad.norm() for p in layer.parameters()]).norm().item() for layer in layers]


def rank_main(rank, stage, results):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29583 + stage)}
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    specs = [LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(nn.Linear, WIDTH, WIDTH)]
    model = PipelineModule(specs, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    initialise(model, rank)
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    engine.train_batch(iter([batch()]))
    moved = [(b - p.detach()).norm() for b, p in zip(before, model.parameters())]
    results[rank] = torch.stack(moved).norm().item()


def moved(stage):
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(rank_main, (stage, results), nprocs=2)
    return [results[0], results[1]]


if __name__ == "__main__":
    expected = reference()
    print(f"RESULT one process: the stages move by {expected[0]:.5f} and {expected[1]:.5f}")
    found = {stage: moved(stage) for stage in (0, 1)}
    for stage, values in found.items():
        print(f"RESULT ZeRO-{stage}:      the stages move by {values[0]:.5f} and {values[1]:.5f}")
    off = {s: max(abs(a - b) / b for a, b in zip(v, expected)) for s, v in found.items()}
    sys.exit(not (off[1] < 1e-3 and off[0] > 0.05))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
