#!/usr/bin/env bash
# torch: grouped_mm in fp32 trains eagerly, but not under a sum, and not compiled
#
# Seen with   torch 2.13.0 (CPU), Python 3.11
# Behaviour   torch.nn.functional.grouped_mm multiplies fp32 and bf16 rows by the matrix of their group, with the
#             gradients of a loop over the groups. Under y.sum(), whose gradient is an expanded scalar, backward
#             raises about strides. In fp32 torch.compile raises as well: shapes are propagated by a rule that
#             takes bf16 alone.
# Output seen
#   RESULT fp32: values and gradients of a loop: True; y.sum().backward(): Invalid strides/sizes; compiled: Expected
#     inputs of BF16 type
#   RESULT bf16: values and gradients of a loop: True; y.sum().backward(): Invalid strides/sizes; compiled: equal
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""grouped_mm against a loop over the groups, under y.sum(), and compiled without code generation."""
import sys

import torch
import torch.nn.functional as F

COUNTS = [10, 30, 24]


def multiply(x, weight, ends):
    return F.grouped_mm(x, weight, offs=ends)


def is_loop(x, weight, ends):
    upstream = torch.randn(len(x), weight.shape[2], dtype=x.dtype)
    grouped = multiply(x, weight, ends)
    loop = torch.cat([rows @ matrix for rows, matrix in zip(x.split(COUNTS), weight)])
    found, wanted = (torch.autograd.grad(y, (x, weight), upstream) for y in (grouped, loop))
    pairs = zip((grouped, *found), (loop, *wanted))
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs)


def outcome(call, expected):
    """`expected` if it is in the message of what the call raises; "equal" if nothing is raised."""
    try:
        call()
        return "equal"
    except Exception as error:
        return expected if expected in str(error) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    torch.manual_seed(0)
    ends = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    seen = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(sum(COUNTS), 32, dtype=dtype, requires_grad=True)
        weight = torch.randn(len(COUNTS), 32, 48, dtype=dtype, requires_grad=True)
        equal = is_loop(x, weight, ends)
        summed = outcome(lambda: multiply(x, weight, ends).sum().backward(), "Invalid strides/sizes")

        def compiled():
            torch._dynamo.reset()
            run = torch.compile(multiply, backend="aot_eager", fullgraph=True)
            assert torch.equal(run(x, weight, ends), multiply(x, weight, ends))

        traced = outcome(compiled, "Expected inputs of BF16 type")
        print(f"RESULT {name}: values and gradients of a loop: {equal}; y.sum().backward(): {summed}; "
              f"compiled: {traced}")
        seen.append((equal, summed, traced))
    strides = "Invalid strides/sizes"
    sys.exit(seen != [(True, strides, "Expected inputs of BF16 type"), (True, strides, "equal")])
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
