#!/usr/bin/env bash
# Show the progress of a chain of slurm/submit_pipeline.sh: for every step its job and state; for a training stage also
# step, loss, rate and time left; for a failed step the reason; for a job that ended unexpectedly Slurm's report of it.
#   slurm/status.sh runs/qwenvl
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=slurm/client.sh
source "$root/slurm/client.sh"
run="${1:?usage: slurm/status.sh RUN}"
[[ -f "$run/jobs.tsv" ]] || {
  echo "status: $run: no chain was submitted there (no jobs.tsv)" >&2
  exit 2
}

# Sets `shown`, the state of a job: Slurm's, and after its end the one that the first line of the job's log names.
describe_job() { # JOB, LOG
  if ! ask_state 2 "$1"; then
    shown="UNKNOWN (Slurm cannot be asked: $answer)"
  elif is_live "$state"; then
    shown="$state"
    ! ask 1 squeue --noheader --job "$1" --format '%T %r' || shown="${answer%%$'\n'*}"
    return
  fi
  case "$(restart_policy read-status "$2")" in
    finished) shown=FINISHED ;;
    given_up) shown=FAILED ;;
    stopped_by_slurm) shown="${shown:-ENDED}" ;;
    pending) shown="${shown:-CANCELLED before it started}" ;;
    *) shown="${shown:-"ENDED unexpectedly; $(describe_end "$1")"}" ;;
  esac
}

# The last job of every step, in the order of the chain.
jobs="$(awk -F'\t' '!($1 in job) { order[++count] = $1 } { job[$1] = $2 } END { for (i = 1; i <= count; i++) print order[i] "\t" job[order[i]] }' "$run/jobs.tsv")"
while IFS=$'\t' read -r step job; do
  log="$run/logs/$step-$job.log"
  status="$(head -n 1 "$log" 2>/dev/null | sed -e 's/^[^:]*: //' -e 's/ *$//' || true)"
  progress="" shown=""
  [[ "$step" != stage? ]] || progress="$(python3 "$root/tools/run_progress.py" "$run/$step")"
  describe_job "$job" "$log"
  printf '%-12s job %-8s %-12s %s\n' "$step" "$job" "$shown" "$progress"
  [[ "$status" == "" || "$status" == finished* ]] || printf '%-12s %s\n' "" "$status"
done <<<"$jobs"
