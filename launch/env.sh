# shellcheck shell=bash
# Sourced by the launchers: which Python, and where the package is.
# PYTHON chooses the interpreter; the default is .venv's, or python3 where there is none.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -n "${PYTHON:-}" || -x "$python" ]] || python=python3

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
