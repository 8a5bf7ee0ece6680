#!/usr/bin/env bash
# Train on this machine, one process per device:
#   NPROC=4 launch/local.sh --recipe tiny_stage1 --parallel.tensor 2 --parallel.pipeline 2
# PROGRAM, PYTHON and CONTAINER_* are explained in launch/env.sh. The exit code is that of the process that failed first.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
refuse_pyxis

exec "${interpreter[@]}" "$root/launch/torchrun.py" --standalone --local-addr 127.0.0.1 \
  --nproc-per-node "${NPROC:-1}" "${program[@]}" "$@"
