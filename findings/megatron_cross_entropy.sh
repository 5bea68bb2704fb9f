#!/usr/bin/env bash
# Megatron-Core's cross entropies overwrite fp32 logits, and the fused one rounds their gradient to bf16
#
# Seen with   megatron-core 0.16.1, torch 2.13.0 (CPU, gloo), Python 3.11
# Behaviour   both vocabulary-parallel cross entropies subtract the maximum from fp32 logits in place, so
#             that logits which are used once more (for a z-loss, an entropy, a second loss) are other
#             numbers after the call. fused_vocab_parallel_cross_entropy gives the gradient of fp32
#             logits in the precision of bf16. The losses are right.
# Output seen
#   RESULT torch: loss off by 0e+00, gradient by 0e+00; logits changed by 0.00
#   RESULT plain: loss off by 0e+00, gradient by 2e-08; logits changed by 3.04
#   RESULT fused: loss off by 0e+00, gradient by 2e-03; logits changed by 3.04
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 megatron-core==0.16.1
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""Loss, gradient and logits of both vocabulary-parallel cross entropies beside torch's own."""
import os
import sys

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.nn.functional import cross_entropy

TOKENS, VOCAB = 8, 32


def measured(loss_of):
    """The loss, the gradient of its sum, and by how much the call changed the logits."""
    torch.manual_seed(0)
    leaf = torch.randn(TOKENS, 1, VOCAB, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS, 1))
    logits = 1.0 * leaf  # as of a head: an inner tensor of the graph
    before = logits.detach().clone()
    loss = loss_of(logits, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient, (logits.detach() - before).abs().max().item()


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29615"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    mpu.initialize_model_parallel()
    group = mpu.get_tensor_model_parallel_group()
    losses = {
        "torch": lambda x, y: cross_entropy(x[:, 0], y[:, 0], reduction="none")[:, None],
        "plain": vocab_parallel_cross_entropy,
        "fused": lambda x, y: fused_vocab_parallel_cross_entropy(x, y, group),
    }
    found = {name: measured(loss_of) for name, loss_of in losses.items()}
    right, off = found["torch"], {}
    for name, (loss, gradient, changed) in found.items():
        off[name] = ((loss - right[0]).abs().max().item(), (gradient - right[1]).abs().max().item(), changed)
        print(f"RESULT {name}: loss off by {off[name][0]:.0e}, gradient by {off[name][1]:.0e}; "
              f"logits changed by {changed:.2f}")
    plain, fused = off["plain"], off["fused"]
    exact = max(plain[0], plain[1], fused[0]) < 1e-5
    sys.exit(not (exact and plain[2] > 0.1 and fused[1] > 1e-4))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
