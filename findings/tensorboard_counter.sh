#!/usr/bin/env bash
# SummaryWriter.add_scalar(double_precision=True) still rounds to fp32
#
# Seen with   torch 2.13.0 (CPU), tensorboard 2.21.0, Python 3.11
# Behaviour   a counter of tokens above 2^24 comes back rounded, with double_precision=True as without:
#             without new_style=True the argument has no effect. With both the number is exact, and
#             stands among the reader's tensors, not its scalars.
# Output seen
#   RESULT 1,000,000,007 with no option: 1,000,000,000, among the scalars
#   RESULT 1,000,000,007 with {'double_precision': True}: 1,000,000,000, among the scalars
#   RESULT 1,000,000,007 with {'double_precision': True, 'new_style': True}: 1,000,000,007, among the tensors
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check setuptools torch==2.13.0 tensorboard==2.21.0
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""A counter of a billion tokens, logged with each way of add_scalar and read back."""
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

TOKENS = 1_000_000_007


def read_back(folder, **options):
    with SummaryWriter(folder) as writer:
        writer.add_scalar("tokens", TOKENS, 1, **options)
    events = EventAccumulator(folder).Reload()
    kind = "scalars" if events.Tags()["scalars"] else "tensors"
    (event,) = events.Scalars("tokens") if kind == "scalars" else events.Tensors("tokens")
    value = event.value if kind == "scalars" else make_ndarray(event.tensor_proto).item()
    print(f"RESULT {TOKENS:,} with {options or 'no option'}: {value:,.0f}, among the {kind}")
    return value, kind


if __name__ == "__main__":
    plain = read_back("plain")
    double = read_back("double", double_precision=True)
    both = read_back("both", double_precision=True, new_style=True)
    sys.exit(not (plain == double == (1_000_000_000, "scalars") and both == (TOKENS, "tensors")))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
