#!/usr/bin/env bash
# Where a chain of slurm/submit_pipeline.sh is: for every step its job and state, and of training its step, loss, rate
# and time left; of a failed step the reason.
#   slurm/status.sh runs/qwenvl
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:?usage: slurm/status.sh RUN}"
[[ -f "$run/jobs.tsv" ]] || {
  echo "status: $run: no chain was submitted there (no jobs.tsv)" >&2
  exit 2
}

# The last job of every step, in the order of the chain.
jobs="$(awk -F'\t' '!($1 in job) { order[++count] = $1 } { job[$1] = $2 } END { for (i = 1; i <= count; i++) print order[i] "\t" job[order[i]] }' "$run/jobs.tsv")"
while IFS=$'\t' read -r step job; do
  state="$(squeue --noheader --job "$job" --format '%T %r' 2>/dev/null | head -n 1 || true)"
  log="$run/logs/$step-$job.log"
  # A log's first line says how the job stands.
  stands="$(head -n 1 "$log" 2>/dev/null | sed -e 's/^[^:]*: //' -e 's/ *$//' || true)"
  progress=""
  [[ "$step" != stage? ]] || progress="$(python3 "$root/tools/run_progress.py" "$run/$step")"
  [[ -n "$state" ]] || case "$stands" in
    finished*) state=FINISHED ;;
    FAILED*) state=FAILED ;;
    "") state="CANCELLED before it started" ;;
    *) state=ENDED ;;
  esac
  printf '%-12s job %-8s %-12s %s\n' "$step" "$job" "$state" "${progress:+$progress}"
  [[ "$stands" == "" || "$stands" == finished* ]] || printf '%-12s %s\n' "" "$stands"
done <<<"$jobs"
