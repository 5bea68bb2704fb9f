#!/usr/bin/env bash
# Print a hostfile for deepspeed with the nodes of this Slurm job: launchers/hostfile.sh [SLOTS]
set -euo pipefail

slots=${1:-$SLURM_GPUS_ON_NODE}
scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r node; do
  echo "$node slots=$slots"
done
