#!/usr/bin/env bash
# Train inside a Slurm allocation (salloc or sbatch), one process per task:
#   salloc --nodes 2 --ntasks-per-node 8 launch/srun.sh --recipe stage2
# NPROC takes another number of tasks than the allocation has, SRUN_OPTIONS further options of srun, separated by blanks.
# The first node of the allocation is the rendezvous; MASTER_ADDR and MASTER_PORT override it, and are needed if
# SRUN_OPTIONS exclude that node. PROGRAM, PYTHON and CONTAINER_* are explained in launch/env.sh.
# The exit code is srun's: the highest of all tasks, where a task that a signal ended counts as 128 + the signal.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[[ -n "${SLURM_JOB_ID:-}" ]] || die "runs inside an allocation: start it through salloc or sbatch"
export_rendezvous first_node_address

words options "${SRUN_OPTIONS:-}"
[[ -z "${NPROC:-}" ]] || options=(--ntasks="$NPROC" "${options[@]}")
# Since Slurm 22.05 srun does not inherit the allocation's CPUs per task; each task would get one.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"

exec srun --kill-on-bad-exit=1 "${container[@]}" "${options[@]}" "${interpreter[@]}" "${program[@]}" "$@"
