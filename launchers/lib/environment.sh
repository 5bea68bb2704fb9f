# Environment of the ranks: which variables of sbatch they inherit, and which are set for them.

# Inherited names; everything else stays in the batch shell, above all keys and tokens.
readonly INHERITED='PATH|HOME|USER|LOGNAME|SHELL|PWD|LANG|LC_*|TZ|TERM|TMPDIR|LD_LIBRARY_PATH|XDG_CACHE_HOME
|SLURM*|CUDA*|NVIDIA_*|NCCL_*|GLOO_*|UCX_*|FI_*|OMP_*|GOMP_*|MKL_*|TORCH*|PYTORCH_*|PET_*|TRITON_*|DS_*|PYTHON*
|NVTE_*|CUDNN_*|ATEN_CPU_CAPABILITY|ONEDNN_*|KMP_*|CC|CXX|CPATH|LIBRARY_PATH|VIRTUAL_ENV|HF_HOME|HF_HUB_OFFLINE|HF_HUB_CACHE
|WANDB_MODE|WANDB_DIR|WANDB_PROJECT|MANYFORMER_*'
readonly SECRET='*KEY*|*TOKEN*|*SECRET*|*PASSW*|*CREDENTIAL*|*JWT*'

prepare_environment() {
  ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -Hn)"
  choose_python
  choose_container
  hide_other_variables
  use_fabric
  local threads=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
}

choose_python() {
  if [[ -z ${PYTHON:-} && -z ${CONTAINER_IMAGE:-} && -x $ROOT/.venv/bin/python ]]; then
    PYTHON=$ROOT/.venv/bin/python
  fi
  PYTHON=${PYTHON:-python}
}

choose_container() {
  CONTAINER=()
  [[ -n ${CONTAINER_IMAGE:-} ]] || return 0
  [[ $ROOT != *[:,]* ]] ||
    give_up 2 "the path $ROOT contains a colon or a comma and cannot be mounted; move the project"
  CONTAINER=(
    "--container-image=$CONTAINER_IMAGE"
    "--container-mounts=$ROOT:$ROOT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    "--container-workdir=$ROOT"
    --no-container-mount-home
  )
}

hide_other_variables() {
  local name kept=,${KEEP_ENV:-},
  shopt -s extglob
  for name in $(compgen -e); do
    [[ $kept != *",$name,"* ]] || continue
    # shellcheck disable=SC2053 - the right side is a pattern
    if [[ $name != @(${INHERITED//$'\n'/}) || $name == @($SECRET) ]]; then
      export -n "$name"
    fi
  done
}

# The names for srun --export. Bash would also pass on variables that it cannot name, such as a.b.
visible() { compgen -e | paste -sd ,; }

use_fabric() {
  [[ -n ${FABRIC:-} ]] || return 0
  local file=$LIB/fabric/$FABRIC.sh
  [[ $FABRIC != */* && -f $file ]] ||
    give_up 2 "FABRIC=$FABRIC is unknown; set it to one of $(basename -as .sh "$LIB"/fabric/*.sh | paste -sd ' ')"
  set -a
  . "$file"
  set +a
}
