#!/usr/bin/env bash
# Train under Open MPI, one process per slot, on this machine or on hosts that share its file system:
#   NPROC=4 launch/mpirun.sh --recipe tiny_stage1
#   HOSTS=node1:8,node2:8 NPROC=16 launch/mpirun.sh --recipe stage2
# The first host must be reachable from the others under the name given; MASTER_ADDR and MASTER_PORT override.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

hosts="${HOSTS:-localhost:${NPROC:-1}}"
first="${hosts%%[:,]*}"
[[ "$first" != localhost ]] || first=127.0.0.1
export MASTER_ADDR="${MASTER_ADDR:-$first}"
export MASTER_PORT="${MASTER_PORT:-29500}"

exec mpirun -np "${NPROC:-1}" --host "$hosts" --bind-to none \
  -x MASTER_ADDR -x MASTER_PORT -x PYTHONPATH -x OMP_NUM_THREADS \
  "$python" -m megatron_qwenvl.train "$@"
