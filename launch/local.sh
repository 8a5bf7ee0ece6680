#!/usr/bin/env bash
# Train on this machine, one process per device:  NPROC=4 launch/local.sh --recipe tiny_stage1 --parallel.tensor 2
# PYTHON chooses the interpreter; the default is .venv's, or python3 where there is none.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -n "${PYTHON:-}" || -x "$python" ]] || python=python3

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
  --nproc-per-node "${NPROC:-1}" -m megatron_qwenvl.train "$@"
