#!/usr/bin/env bash
# torch: on an x86 processor without instructions for bf16, a linear layer in bf16 is slower than in fp32
#
# Seen with   torch 2.13.0 (CPU), Python 3.11
# Behaviour   bf16 halves the bytes, but a CPU without AVX512_BF16 or AMX converts every operand inside the kernels of
#             oneDNN (with AVX-512), or torch runs loops of its own (with AVX2). Casting the bf16 operands to fp32 for
#             the products and the result back is faster in either case, and adds in fp32 as well.
# Output seen (Ice Lake, AVX-512, one thread)
#   RESULT CPU seconds of forward and backward over those in fp32: bf16 4.1,
#     bf16 cast to fp32 and back 1.1
# Ends with 0 while this is so, with another code once it has changed, and with 0 and a line where the
# processor has such instructions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""A linear layer of 512 rows, forward and backward, in three forms in turn: the best of five."""
import platform
import sys
import time

import torch
import torch.nn.functional as F


def step(dtype, cast):
    x = torch.randn(512, 512, dtype=dtype, requires_grad=True)
    weight = torch.randn(2048, 512, dtype=dtype, requires_grad=True)
    upstream = torch.randn(512, 2048, dtype=dtype)

    def run():
        begin = time.process_time()
        y = F.linear(x.float(), weight.float()).to(dtype) if cast else F.linear(x, weight)
        torch.autograd.grad(y, (x, weight), upstream)
        return time.process_time() - begin

    return run


if __name__ == "__main__":
    has = torch.cpu.get_capabilities()
    if platform.machine() != "x86_64" or has["avx512_bf16"] or has["amx_bf16"]:
        print("RESULT this processor has instructions for bf16, or is another kind: nothing to see")
        sys.exit(0)
    forms = [step(torch.float32, False), step(torch.bfloat16, False), step(torch.bfloat16, True)]
    rounds = [[run() for run in forms] for _ in range(6)][1:]
    fp32, bf16, cast = (min(seconds) for seconds in zip(*rounds))
    print(f"RESULT CPU seconds of forward and backward over those in fp32: bf16 {bf16 / fp32:.1f}, "
          f"bf16 cast to fp32 and back {cast / fp32:.1f}")
    sys.exit(not (bf16 > 1.5 * fp32 and cast < bf16))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
