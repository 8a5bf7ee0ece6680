#!/usr/bin/env bash
# Train inside a Slurm allocation (salloc or sbatch), one process per task:
#   salloc --nodes 2 --ntasks-per-node 8 launch/srun.sh --recipe stage2
# The first node of the allocation is the rendezvous; MASTER_ADDR and MASTER_PORT override.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${SLURM_JOB_ID:?launch/srun.sh runs inside an allocation: start it through salloc or sbatch}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# Slurm's address for the node: a node's name need not resolve.
address="$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*')"
export MASTER_ADDR="${MASTER_ADDR:-${address#NodeAddr=}}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # jobs that share a node differ

exec srun --kill-on-bad-exit=1 "$python" -m megatron_qwenvl.train "$@"
