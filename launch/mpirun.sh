#!/usr/bin/env bash
# Train under Open MPI, one process per slot: on this machine, on hosts that share its file system, or on the nodes of
# a Slurm allocation:
#   NPROC=4 launch/mpirun.sh --recipe tiny_stage1
#   HOSTS=node1:8,node2:8 launch/mpirun.sh --recipe stage2
#   salloc --nodes 2 --ntasks-per-node 8 launch/mpirun.sh --recipe stage2
# NPROC takes fewer processes than there are slots. The first host must be reachable from the others under the name
# given; MASTER_ADDR and MASTER_PORT override. PROGRAM, PYTHON and CONTAINER_* are explained in launch/env.sh.
# The exit code is that of the process that failed first.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
refuse_pyxis

where=()
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  [[ -z "${HOSTS:-}" ]] || die "HOSTS=$HOSTS contradicts SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST: unset HOSTS"
  export_rendezvous first_node_address
else
  hosts="${HOSTS:-localhost:${NPROC:-1}}"
  first="${hosts%%[:,]*}"
  [[ "$first" != localhost ]] || first=127.0.0.1
  export_rendezvous echo "$first"
  where=(--host "$hosts")
fi
[[ -z "${NPROC:-}" ]] || where+=(-np "$NPROC")

# Unlike torchrun and srun, mpirun passes its environment to processes on this machine only.
shared='PATH|LD_LIBRARY_PATH|PYTHON.*|(MASTER|OMP|MKL|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|NVTE|TRITON|HF|UCX|FI)_.*'
exports=()
while read -r name; do
  exports+=(-x "$name")
done < <(compgen -e | grep -xE "$shared|APPTAINERENV_.*")

exec mpirun "${where[@]}" --bind-to none "${exports[@]}" "${interpreter[@]}" "${program[@]}" "$@"
