#!/usr/bin/env bash
# Train with N processes on this machine: launchers/local.sh N --config-name NAME key=value ...
set -euo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { sed -n 2p "$0" >&2; exit 2; }
processes=$1
shift
root=$(dirname "$0")/..
# In a clone, paths are relative to its root, elsewhere to the current directory.
if [[ -f $root/pyproject.toml && -f $root/pretrain/train.py ]]; then cd "$root"; fi
python=${PYTHON:-python}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
# Standalone: rendezvous on a free port that other machines cannot reach.
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" \
  -m pretrain.train "$@"
