#!/usr/bin/env bash
# A number in a state dict makes torch's Hugging Face checkpoint writer save a file that nothing opens
#
# Seen with   torch 2.13.0 (CPU), safetensors 0.8.0, Python 3.11
# Behaviour   dcp.save with HuggingFaceStorageWriter accepts a state dict that holds a step counter
#             beside the weights and reports success. The number is pickled into the .safetensors file,
#             which is then no safetensors file; the weights in it cannot be loaded either.
# Output seen
#   RESULT saved ['w']: safetensors: reads it; dcp.load of the weight: reads it
#   RESULT saved ['step', 'w']: safetensors: SafetensorError; dcp.load of the weight: CheckpointException
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy safetensors==0.8.0
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""dcp.save in the format of Hugging Face, of a weight alone and of a weight with a step counter."""
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter


def outcome(read):
    try:
        read()
    except (Exception, CheckpointException) as error:
        return type(error).__name__
    return "reads it"


def saved(name, state):
    """How safetensors and dcp itself fare with what dcp.save wrote."""
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(path=name), no_dist=True)
    (file,) = Path(name).glob("*.safetensors")
    weight = {"w": torch.zeros(2, 3)}
    back = outcome(lambda: dcp.load(weight, storage_reader=HuggingFaceStorageReader(path=name), no_dist=True))
    found = outcome(lambda: load_file(file)), back
    print(f"RESULT saved {sorted(state)}: safetensors: {found[0]}; dcp.load of the weight: {found[1]}")
    return found


if __name__ == "__main__":
    weight = torch.ones(2, 3)
    plain = saved("plain", {"w": weight})
    numbered = saved("numbered", {"w": weight, "step": 3})
    sys.exit(not (plain == ("reads it",) * 2 and "reads it" not in numbered))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
