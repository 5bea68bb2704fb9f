#!/usr/bin/env bash
# Megatron-Core writes and reads corpora of 65,500 to 65,536 token ids in two different widths
#
# Seen with   megatron-core 0.16.1, torch 2.13.0 (CPU), Python 3.11
# Behaviour   DType.optimal_dtype, with which corpora are written, leaves 16 bits at a vocabulary of
#             65,500; with sequences_per_dataset, which saves reading the head of every index,
#             GPTDatasetConfig leaves 16 bits above 65,536. In between a corpus of 32 bits is read as 16
#             bits: half of every document, with a zero after each token, without an error.
# Output seen
#   RESULT vocabulary 65,000: by the index [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26]], with sequences_per_dataset [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26]]
#   RESULT vocabulary 65,520: by the index [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26]], with sequences_per_dataset [[11, 0, 12, 0], [21, 0, 22, 0, 23, 0]]
#   RESULT vocabulary 70,000: by the index [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26]], with sequences_per_dataset [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26]]
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.16.1
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""One corpus through GPTDataset, read with and without sequences_per_dataset."""
import sys
from types import SimpleNamespace

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

DOCUMENTS = [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26]]


def read(vocab_size, counts):
    name = f"corpus{vocab_size}"
    builder = IndexedDatasetBuilder(f"{name}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{name}.idx")
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=4,
        blend=([name], None),
        split="1,0,0",
        tokenizer=SimpleNamespace(vocab_size=vocab_size, eod=0, pad=-1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        sequences_per_dataset={name: counts} if counts else None,
    )
    dataset = GPTDataset.build_low_level_dataset(name, config)
    return [dataset[i].tolist() for i in range(len(dataset))]


if __name__ == "__main__":
    counts = len(DOCUMENTS), len(DOCUMENTS) + 1  # sequences, and bounds of documents
    found = {}
    for vocab_size in (65_000, 65_520, 70_000):
        found[vocab_size] = read(vocab_size, None), read(vocab_size, counts)
        headed, counted = found[vocab_size]
        print(f"RESULT vocabulary {vocab_size:,}: by the index {headed}, with sequences_per_dataset {counted}")
    right = all(documents == DOCUMENTS for size in (65_000, 70_000) for documents in found[size])
    headed, counted = found[65_520]
    sys.exit(not (right and headed == DOCUMENTS and counted == [[11, 0, 12, 0], [21, 0, 22, 0, 23, 0]]))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
