#!/usr/bin/env bash
# DeepSpeed's pipeline: an integer tensor between two floats corrupts gradients of middle stages
#
# Seen with   deepspeed 0.19.8, torch 2.13.0 (CPU, gloo), Python 3.11
# Behaviour   stages that hand on (float, float) give the gradients of one process; with an
#             int64 tensor between the two the loss is still right and gradients are wrong without an
#             error. A middle stage keeps one list of receive buffers for activations and for gradients,
#             compares their sizes only, and gradients have no entry for the integers, so that a float
#             gradient is received into an integer buffer. Pipelines of 2 have no middle stage.
# Output seen
#   RESULT carry (float, float): loss 3.695988, in one process 3.695988; gradients off by up to 0.0e+00
#   RESULT carry (float, int64, float): loss 3.695988, in one process 3.695988; gradients off by up to 1.3e+00
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check setuptools wheel packaging ninja torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""A pipeline of 4 whose stages hand on two floats, or two floats and integers; against one process."""
import os
import sys

import deepspeed
import torch
import torch.multiprocessing as mp
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

WIDTH, LENGTH, BATCH, VOCAB = 16, 8, 2, 32


def with_ids():
    return os.environ["CARRY"] == "float, int64, float"


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids):
        h = self.table(ids)
        extra = h.square().mean(dim=-1)
        return (h, ids, extra) if with_ids() else (h, extra)


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, carry):
        h, *ids, extra = carry
        h = h + torch.tanh(self.linear(h))
        extra = extra + h.square().mean(dim=-1)
        return (h, *ids, extra)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, carry):
        h, *_, extra = carry
        return self.head(h) + extra.unsqueeze(-1)


def loss_of(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def initialise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    return ids, ids.roll(-1, 1)


def reference():
    layers = [First(), Middle(), Middle(), Last()]
    for seed, layer in enumerate(layers):
        initialise(layer, seed)
    ids, labels = batch()
    x = ids
    for layer in layers:
        x = layer(x)
    loss = loss_of(x, labels)
    loss.backward()
    return loss.item(), [[p.grad.norm().item() for p in layer.parameters()] for layer in layers]


def rank_main(rank, results):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    specs = [LayerSpec(First), LayerSpec(Middle), LayerSpec(Middle), LayerSpec(Last)]
    model = PipelineModule(specs, num_stages=4, loss_fn=loss_of, partition_method="uniform")
    for layer in model.forward_funcs:
        initialise(layer, rank)
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    loss = engine.train_batch(iter([batch()]))
    moved = [(b - p.detach()).norm().item() for b, p in zip(before, model.parameters())]
    results[rank] = loss.item(), moved  # with SGD at lr 1 a weight moves by its gradient


def largest_difference(carry):
    os.environ["CARRY"] = carry
    expected_loss, expected = reference()
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(rank_main, (results,), nprocs=4)
    pairs = [p for rank in range(4) for p in zip(results[rank][1], expected[rank])]
    worst = max(abs(found - right) / right for found, right in pairs)
    print(f"RESULT carry ({carry}): loss {results[3][0]:.6f}, in one process {expected_loss:.6f}; "
          f"gradients off by up to {worst:.1e}")
    return worst


if __name__ == "__main__":
    exact = largest_difference("float, float") < 1e-4
    wrong = largest_difference("float, int64, float") > 0.1
    sys.exit(not (exact and wrong))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
