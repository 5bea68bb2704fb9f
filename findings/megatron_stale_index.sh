#!/usr/bin/env bash
# Megatron-Core's GPTDataset reads a corpus that was tokenised anew through the index of the old one
#
# Seen with   megatron-core 0.16.1, torch 2.13.0 (CPU), Python 3.11
# Behaviour   the indices in the cache folder beside a corpus are found again by its path, seed, length
#             and split; neither sizes nor contents are compared. Of a corpus written anew to the same
#             prefix, documents that were added are never read, and documents that have become longer
#             are cut where the old ones ended: samples of another length than asked for, or tokens left
#             out, without an error.
# Output seen
#   RESULT added: old corpus [[14, 15, 16, 17, 18], [30, 31, 32, 33, 34], [35, 10, 11, 12, 13]]
#   RESULT added: new corpus [[14, 15, 16, 17, 18], [30, 31, 32, 33, 34], [35, 10, 11, 12, 13]], without the old cache [[14, 15, 16, 17, 18], [30, 31, 32, 33, 34], [35, 10, 11, 12, 13], [50, 51, 52, 53, 54], [55, 56, 57, 58, 59]]
#   RESULT longer: old corpus [[14, 15, 16, 17, 18], [30, 31, 32, 33, 34], [35, 10, 11, 12, 13]]
#   RESULT longer: new corpus [[14, 15, 16, 17, 18], [30, 31, 32, 33, 34], [35, 36, 37, 38, 39, 40, 41, 10, 11, 12, 13]], without the old cache [[13, 14, 15, 16, 17], [30, 31, 32, 33, 34], [35, 36, 37, 38, 39], [40, 41, 10, 11, 12]]
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.16.1
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""Samples of GPTDataset after its corpus was replaced, with the old cache and without it."""
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

LENGTH, VOCAB = 5, 100
TOKENIZER = SimpleNamespace(vocab_size=VOCAB, eod=0, pad=-1, unique_identifiers={"name": "numbers"})


def write(name, documents):
    builder = IndexedDatasetBuilder(f"{name}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{name}.idx")


def samples(name):
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        blend=([name], None),
        split="1,0,0",
        tokenizer=TOKENIZER,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config).build()
    return sorted(train[i]["tokens"].tolist() for i in range(len(train)))


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    first, second = list(range(10, 22)), list(range(30, 36))
    new = {
        "added": [first, second, list(range(50, 60))],
        "longer": [first, second + list(range(36, 42))],
    }
    found = {}
    for name, documents in new.items():
        write(name, [first, second])
        print(f"RESULT {name}: old corpus {samples(name)}")
        write(name, documents)
        stale = samples(name)
        shutil.rmtree(f"{name}/cache")
        found[name] = stale, samples(name)
        print(f"RESULT {name}: new corpus {stale}, without the old cache {found[name][1]}")
    whole = all({len(sample) for sample in fresh} == {LENGTH} for _, fresh in found.values())
    missed = len(found["added"][0]) < len(found["added"][1])
    torn = {len(sample) for sample in found["longer"][0]} != {LENGTH}
    sys.exit(not (whole and missed and torn))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
