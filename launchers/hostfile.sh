#!/usr/bin/env bash
# Print a DeepSpeed hostfile with the nodes of this Slurm job: launchers/hostfile.sh [SLOTS]
set -euo pipefail

slots=${1:-$SLURM_GPUS_ON_NODE}
[[ $slots =~ ^[1-9][0-9]{0,5}$ ]] || { echo "SLOTS=$slots must be a positive integer" >&2; exit 2; }
scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r node; do
  # The launchers pass names to ssh and to shells: one that starts with - would be an option.
  [[ $node =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || { printf 'not a host name: %q\n' "$node" >&2; exit 2; }
  echo "$node slots=$slots"
done
