#!/usr/bin/env bash
# An optimizer that went through dcp_to_torch_save loads without an error and without its moments
#
# Seen with   torch 2.13.0 (CPU), Python 3.11
# Behaviour   dcp turns the numbers under which optimizer.state_dict() holds the state of parameters into
#             strings. load_state_dict accepts what dcp_to_torch_save wrote, finds no parameter of that
#             name and lets AdamW begin anew: the resumed step is that of an optimizer without history.
#             The same state_dict through torch.save continues.
# Output seen
#   RESULT plain: after 5 steps, saved and resumed, the next one is step 6; weights off by 0.0e+00
#   RESULT converted: after 5 steps, saved and resumed, the next one is step 1; weights off by 1.8e-02
#   RESULT new: after 5 steps, saved and resumed, the next one is step 1; weights off by 1.8e-02
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""The step after a resume of AdamW, by torch.save and by dcp.save with dcp_to_torch_save."""
import copy
import sys

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def resumed(model, state):
    """The weights after one more step of a new optimizer with this state, and its count of steps."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if state is not None:
        optimizer.load_state_dict(state)
    step(model, optimizer, 99)
    return model.weight.detach(), int(optimizer.state[model.weight]["step"])


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for seed in range(5):
        step(model, optimizer, seed)
    torch.save({"optimizer": optimizer.state_dict()}, "plain.pt")
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id="sharded", no_dist=True)
    dcp_to_torch_save("sharded", "converted.pt")
    states = {name: torch.load(f"{name}.pt")["optimizer"] for name in ("plain", "converted")}
    found = {name: resumed(model, state) for name, state in (states | {"new": None}).items()}
    step(model, optimizer, 99)
    off = {name: (weight - model.weight.detach()).abs().max().item() for name, (weight, _) in found.items()}
    for name, (_, count) in found.items():
        print(f"RESULT {name}: after 5 steps, saved and resumed, the next one is step {count}; weights off "
              f"by {off[name]:.1e}")
    sys.exit(not (off["plain"] == 0.0 and torch.equal(found["converted"][0], found["new"][0])
                  and off["converted"] > 1e-3))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
