#!/usr/bin/env bash
# Train on this machine, one process per device:
#   NPROC=4 launch/local.sh --recipe tiny_stage1 --parallel.tensor 2 --parallel.pipeline 2
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
  --nproc-per-node "${NPROC:-1}" -m megatron_qwenvl.train "$@"
