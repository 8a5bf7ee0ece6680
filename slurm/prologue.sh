# shellcheck shell=bash
# Sourced by every batch script: the site's settings, and what all jobs do around their work.
#
# A job's log is one file over all its attempts. Its first line always says how the job stands; every attempt begins
# with a line `=== attempt`. Settings come from slurm/site.env (or SITE=file); slurm/site.env.example explains them.

set -euo pipefail

root="${QWENVL_ROOT:-$SLURM_SUBMIT_DIR}"
site="${SITE:-$root/slurm/site.env}"
# shellcheck source=slurm/site.env.example
[[ ! -f "$site" ]] || source "$site"
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"

log="$(readlink -f /proc/$$/fd/1)"
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
INTERRUPTED=75 # as in megatron_qwenvl/runtime/exit_codes.py
BAD_NODES=3

# Slurm sends SIGTERM to this shell too when it ends or requeues a job. The work below gets its own and saves; the shell
# waits for it.
trap : TERM

# Rewrites the first line of the log, in place: slurmd goes on appending to the same file.
stand() { # TEXT
  [[ -f "$log" ]] || return 0
  printf '%-500.500s\n' "$SLURM_JOB_NAME: $1" | dd of="$log" conv=notrunc status=none
}

begin() {
  [[ ! -f "$log" || -s "$log" ]] || printf '%500s\n' "" >>"$log"
  stand "running since $(date '+%F %T'), attempt $attempt"
  echo "=== attempt $attempt of job $SLURM_JOB_ID ($SLURM_JOB_NAME) on $SLURM_JOB_NODELIST, $(date '+%F %T')"
}

end_well() {
  stand "finished $(date '+%F %T')"
  echo "=== finished, $(date '+%F %T')"
  exit 0
}

give_up() { # REASON
  stand "FAILED: $1"
  echo "=== FAILED: $1"
  exit 1
}

# The part of the log that belongs to this attempt.
this_attempt() {
  awk '/^=== attempt /{ text = "" } { text = text $0 "\n" } END { printf "%s", text }' "$log"
}

# What ended the work, as one line: the first of what ranks say of themselves and of what srun says of ranks that
# could not say anything (killed, node lost). A rank that only lost a neighbour is believed last.
first_cause() { # EXIT CODE
  this_attempt | awk -v code="$1" '
    { sub(/^ *[0-9]+: /, "") } # the label of srun --label
    /FAILED \(lost peer\)/ { if (peer == "") peer = $0; next }
    /FAILED/ { cause = $0; exit }
    /srun: error: .*(Killed|Aborted|Segmentation fault|Bus error|Illegal instruction|Node failure|core dumped)/ { cause = $0; exit }
    /oom.kill/ { cause = $0; exit }
    END {
      if (cause == "") cause = peer
      if (cause == "") cause = "exit code " code
      sub(/^[0-9-]+ [0-9:,]+ /, "", cause) # the time
      print cause
    }'
}

# It ends by itself on every rank; were the others ended with the first, the verdict's exit code would be lost.
run_preflight() { # ARGUMENTS
  PROGRAM=tools/preflight.py SRUN_OPTIONS="--kill-on-bad-exit=0 ${SRUN_OPTIONS:-}" "$root/launch/srun.sh" "$@"
}

# Looks at the machines before a job that is no training; its log lies on the file system that all nodes share.
preflight_machines() {
  run_preflight --directory "$(dirname "$log")" || give_up "$(last_words)"
}

# Runs one process of the job's programs on the first node: PROGRAM ARGUMENTS...
one() {
  PROGRAM="$1" SRUN_OPTIONS="--nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap ${SRUN_OPTIONS:-}" "$root/launch/srun.sh" "${@:2}"
}

# A job whose work is one conversion: PROGRAM ARGUMENTS...
run_one() {
  begin
  preflight_machines
  one "$@" || give_up "$(last_words)"
  end_well
}

# The last line that a program, not Slurm, left on the log.
last_words() {
  this_attempt | awk '!/^(srun|slurmstepd|===)/ && NF { line = $0 } END { print line }'
}

# --- training -------------------------------------------------------------------------------------------------------

# A training stage: RECIPE OVERRIDES...; a --recipe among the overrides replaces RECIPE.
train() {
  local code=0
  begin
  configure "$@"
  preflight
  SRUN_OPTIONS="--label ${SRUN_OPTIONS:-}" "$root/launch/srun.sh" "${arguments[@]}" || code=$?
  case "$code" in
    0) end_well ;;
    "$INTERRUPTED") go_on "interrupted, saved as $(newest)" ;;
    *) after_failure "$(first_cause "$code")" ;;
  esac
}

# Sets `arguments` and `run_dir`; a configuration that cannot be used ends the job.
configure() { # RECIPE OVERRIDES...
  arguments=(--recipe "$@")
  [[ " ${*:2} " != *" --recipe "* ]] || arguments=("${@:2}")
  local resolved
  resolved="$(one "-m megatron_qwenvl.train" "${arguments[@]}" --print-config)" || give_up "$(last_words)"
  run_dir="$(sed -n 's/^run_dir: //p' <<<"$resolved")"
  mkdir -p "$run_dir" 2>/dev/null || true # one that cannot be made is preflight's to explain
}

# Looks at nodes, network, file system and data before anything is trained on.
preflight() {
  local code=0 list="$run_dir/bad_nodes.txt"
  run_preflight "${arguments[@]}" --bad-nodes "$list" || code=$?
  case "$code" in
    0) return ;;
    1 | 2) give_up "$(last_words)" ;;
    138) go_on "interrupted by SIGUSR1 in preflight" ;;
    "$BAD_NODES")
      bad_nodes="$(paste -sd, "$list" 2>/dev/null || true)"
      after_failure "$(last_words)"
      ;;
    *) after_failure "$(first_cause "$code")" ;;
  esac
}

# The newest checkpoint, or `nothing`.
newest() {
  cat "$run_dir/checkpoints/latest" 2>/dev/null || echo nothing
}

# False once Slurm, an administrator or the user has ended or requeued the job: then that is what happens.
still_running() {
  [[ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" == RUNNING ]]
}

# Starts the job again, at its end of the queue, without the nodes in `bad_nodes`.
go_on() { # REASON
  if ! still_running; then
    stand "stopped by Slurm $(date '+%F %T'), newest checkpoint: $(newest)"
    echo "=== stopped by Slurm: $1"
    exit "$INTERRUPTED"
  fi
  stand "to be started again: $1"
  echo "=== to be started again: $1"
  trap '' TERM # requeueing ends this shell, and the next line is still to be done
  scontrol requeue "$SLURM_JOB_ID" || give_up "$1; and the job could not be requeued"
  [[ -z "${bad_nodes:-}" ]] || leave_out "$bad_nodes"
  exit "$INTERRUPTED"
}

leave_out() { # NODES
  local before
  before="$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')"
  [[ "$before" != "(null)" ]] || before=""
  echo "=== left out from now on: $1 (back in: scontrol update jobid=$SLURM_JOB_ID ExcNodeList=$before)"
  scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$1"
}

# Starts the job again unless that would only repeat the failure. RUN_DIR/failures.tsv keeps time, job, newest
# checkpoint and cause of every failure.
after_failure() { # CAUSE
  local cause="${1//$'\t'/ }" ledger="$run_dir/failures.tsv" here same stuck all
  still_running || go_on "$cause"
  printf '%s\t%s\t%s\t%s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$(newest)" "$cause" >>"$ledger" || give_up "$cause"
  here="$(awk -F'\t' -v at="$(newest)" '{ if ($3 == at) text = text $4 "\n"; else text = "" } END { printf "%s", text }' "$ledger")"
  stuck="$(wc -l <<<"$here")"
  # The same but for numbers: another rank, port or node may say it.
  same="$(grep -cxF -- "${cause//[0-9]/}" <<<"${here//[0-9]/}")"
  all="$(awk -F'\t' -v job="$SLURM_JOB_ID" '$2 == job' "$ledger" | wc -l)"
  ((all < ${MAX_FAILURES:-10})) || give_up "$cause; $all failures of this job"
  if [[ -z "${bad_nodes:-}" ]]; then # else it is other nodes that try next
    ((same < 2)) || give_up "$cause; it is the same as at the last start from here ($(newest))"
    ((stuck < ${MAX_FAILURES_WITHOUT_PROGRESS:-3})) || give_up "$cause; $stuck failures without a new checkpoint"
  fi
  go_on "$cause"
}
