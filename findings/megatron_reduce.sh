#!/usr/bin/env bash
# Megatron-Core's all-reduce over the tensor-parallel group returns a non-contiguous input unreduced
#
# Seen with   megatron-core 0.16.1, torch 2.13.0 (CPU, gloo), Python 3.11
# Behaviour   reduce_from_tensor_model_parallel_region reduces a contiguous copy of its input and then
#             returns the input, so that a transposed view of the same numbers comes back as each rank
#             held it, without an error.
# Output seen
#   RESULT rank 0: ones of 2 ranks sum to [2.0] contiguous, to [1.0] transposed
#   RESULT rank 1: ones of 2 ranks sum to [2.0] contiguous, to [1.0] transposed
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.16.1
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""The sum over two tensor-parallel ranks of a contiguous matrix, and of a transposed view of it."""
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region


def rank_main(rank, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    matrix = torch.ones(2, 3)
    whole = reduce_from_tensor_model_parallel_region(matrix.clone(), group)
    view = reduce_from_tensor_model_parallel_region(matrix.clone().t(), group)
    results[rank] = whole.unique().tolist(), view.unique().tolist()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(rank_main, (results,), nprocs=2)
    for rank in (0, 1):
        whole, view = results[rank]
        print(f"RESULT rank {rank}: ones of 2 ranks sum to {whole} contiguous, to {view} transposed")
    sys.exit(not all(results[rank] == ([2.0], [1.0]) for rank in (0, 1)))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
