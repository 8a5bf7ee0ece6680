# shellcheck shell=bash
# Sourced by every batch script: the site's settings, and what all jobs do around their work.
#
# A job's log is one file over all its attempts. Its first line always holds the job's status; every attempt begins
# with a line `=== attempt`. Settings come from slurm/site.env (or SITE=file); slurm/site.env.example explains them.
# slurm/restart_policy.py decides what follows a phase that did not succeed; docs/slurm.md draws a job's states.

set -euo pipefail

# SIGTERM (requeue, preemption) and SIGUSR1 (a time limit ahead) do not end this shell. It passes them on to the phase
# that runs, or does not begin the next one; the processes save, and the shell waits for them.
signal_count=0 received_signal="" phase_pid=""
on_signal() { # NAME
  signal_count=$((signal_count + 1))
  received_signal="$1"
  [[ -z "$phase_pid" ]] || kill -USR1 "$phase_pid" 2>/dev/null || true
}
trap 'on_signal SIGTERM' TERM
trap 'on_signal SIGUSR1' USR1

root="${QWENVL_ROOT:-$SLURM_SUBMIT_DIR}"
site="${SITE:-$root/slurm/site.env}"
# shellcheck source=slurm/site.env.example
[[ ! -f "$site" ]] || source "$site"
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
# shellcheck source=slurm/client.sh
source "$root/slurm/client.sh"

log="$(readlink -f /proc/$$/fd/1)"
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
run_dir="" phase_start=0
max_failures="${MAX_FAILURES:-10}"
max_failures_without_progress="${MAX_FAILURES_WITHOUT_PROGRESS:-3}"
# As in megatron_qwenvl/runtime/exit_codes.py; a test compares them.
RUN_ERROR=1
INTERRUPTED=75
BY_SIGTERM=143 # as a shell reports the end by SIGTERM

# --- the log --------------------------------------------------------------------------------------------------------

# Text as one line of at most BYTES bytes that ends with a whole character.
one_line() { # BYTES, TEXT
  local LC_ALL=C text="${2//[$'\n\r\t']/ }"
  if ((${#text} > $1)); then
    text="${text:0:$1}"
    while [[ "$text" == *[$'\x80'-$'\xbf'] ]]; do text="${text%?}"; done
    text="${text%[$'\xc0'-$'\xff']}"
  fi
  printf '%s' "$text"
}

# Rewrites the first line of the log, in place: slurmd goes on appending to the same file.
set_status() { # TEXT
  [[ -f "$log" ]] || return 0
  printf '%s\n' "$(LC_ALL=C printf '%-500s' "$(one_line 500 "$SLURM_JOB_NAME: $1")")" |
    dd of="$log" conv=notrunc status=none || true
}

# Runs a command whose own processes no signal may end.
shielded() { # COMMAND...
  (trap '' TERM USR1 && "$@")
}

begin_attempt() {
  shielded announce
  [[ "$max_failures$max_failures_without_progress" =~ ^[0-9]+$ ]] ||
    give_up "MAX_FAILURES=$max_failures, MAX_FAILURES_WITHOUT_PROGRESS=$max_failures_without_progress: expected numbers"
}

announce() {
  local before=""
  [[ ! -f "$log" || -s "$log" ]] || LC_ALL=C printf '%-500s\n' "" >>"$log"
  [[ "$(restart_policy read-status "$log" 2>/dev/null)" != running ]] || before="$(head -n 1 "$log" | tr -d '\0')"
  set_status "running since $(date '+%F %T'), attempt $attempt"
  echo "=== attempt $attempt of job $SLURM_JOB_ID ($SLURM_JOB_NAME) on $SLURM_JOB_NODELIST, $(date '+%F %T')"
  [[ -z "$before" ]] ||
    echo "=== the previous attempt ended unexpectedly (killed, or its node was lost): ${before%"${before##*[! ]}"}"
}

# --- phases of a job ------------------------------------------------------------------------------------------------

# Notes where the log of a phase begins.
mark_phase() {
  [[ ! -f "$log" ]] || phase_start="$(shielded stat -c %s "$log")"
}

# Runs a command to its end, whatever signals arrive meanwhile; returns its exit code.
run_phase() { # COMMAND...
  local pipe seen code
  mark_phase
  [[ -z "$received_signal" ]] || return "$BY_SIGTERM"
  exec {pipe}<> <(:)
  { echo >&"$pipe" && exec "$@" {pipe}>&-; } &
  phase_pid=$!
  # bash forgets a signal that reaches its child process between the fork and the first command. From that command on
  # a signal ends the child or is handled, so what came before is passed on then.
  until read -r -t 1 -u "$pipe" || ! kill -0 "$phase_pid" 2>/dev/null; do :; done
  exec {pipe}>&-
  [[ -z "$received_signal" ]] || kill -USR1 "$phase_pid" 2>/dev/null || true
  while
    seen=$signal_count code=0
    wait "$phase_pid" || code=$?
    ((signal_count != seen)) # a signal ended `wait`, not the command
  do :; done
  phase_pid=""
  return "$code"
}

# Runs preflight on every rank. Each ends by itself: were the others ended with the first, the verdict's exit code
# would be lost.
run_preflight() { # ARGUMENTS
  PROGRAM=tools/preflight.py SRUN_OPTIONS="--kill-on-bad-exit=0 ${SRUN_OPTIONS:-}" run_phase "$root/launch/srun.sh" "$@"
}

# Runs one process of a program on the first node.
run_single_task() { # PROGRAM, ARGUMENTS...
  PROGRAM="$1" SRUN_OPTIONS="--nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap ${SRUN_OPTIONS:-}" \
    run_phase "$root/launch/srun.sh" "${@:2}"
}

# --- jobs that do not train -----------------------------------------------------------------------------------------

# A job that is one process of a program.
single_task_job() { # PROGRAM, ARGUMENTS...
  task_job run_single_task "$@"
}

# A job that checks its nodes and then runs a command. A job whose program reports an error ends; one that was killed
# is requeued a few times.
task_job() { # COMMAND...
  local code=0
  begin_attempt
  run_preflight --directory "$(dirname "$log")" || end_attempt preflight $? # the log is on the shared file system
  "$@" || code=$?
  ((code == 0)) || end_attempt task "$code"
  finish
}

# --- training -------------------------------------------------------------------------------------------------------

# A training stage. A --recipe among the overrides replaces RECIPE.
train() { # RECIPE, OVERRIDES...
  local code=0
  begin_attempt
  configure "$@"
  claim_run_dir
  run_preflight "${arguments[@]}" --bad_nodes "$run_dir/bad_nodes.txt" || end_attempt preflight $?
  SRUN_OPTIONS="--label ${SRUN_OPTIONS:-}" run_phase "$root/launch/srun.sh" "${arguments[@]}" || code=$?
  ((code == 0)) || end_attempt training "$code"
  finish
}

# Sets `arguments` and `run_dir`; a configuration that cannot be used ends the job.
configure() { # RECIPE, OVERRIDES...
  arguments=(--recipe "$@") # of two the last one counts
  local code=0 answer
  mark_phase
  answer="$(ask_trainer run_dir)" || code=$?
  ((code == 0)) || end_attempt configuration "$([[ "$received_signal" ]] && echo "$BY_SIGTERM" || echo "$code")"
  run_dir="$answer"
  shielded mkdir -p "$run_dir" 2>/dev/null || true # preflight explains one that cannot be made
}

# One value of the resolved configuration. The site's options may label output, which would be read as part of it.
ask_trainer() { # FIELD
  local options option plain=""
  unset SLURM_LABELIO
  words options "${SRUN_OPTIONS:-}"
  for option in "${options[@]}"; do
    [[ "$option" == --label || "$option" == -l ]] || plain+="$option "
  done
  SRUN_OPTIONS="$plain" run_single_task "-m megatron_qwenvl.train" "${arguments[@]}" --print_value "$1"
}

# Names this job in RUN/job.txt while it works there. A file that is found was left by a job that ended unexpectedly,
# or that still runs: then the file stays, and the trainer will refuse to start.
claim_run_dir() {
  local other
  other="$(job_of_run_dir)"
  if [[ -n "$other" && "$other" != "$SLURM_JOB_ID" ]]; then
    echo "=== job $other worked in this run directory and ended unexpectedly: $(shielded describe_end "$other")"
  fi
  shielded write_job_file
}

# The job that RUN/job.txt names.
job_of_run_dir() {
  [[ ! -r "$run_dir/job.txt" ]] || sed -n '1s/ .*//p' "$run_dir/job.txt"
}

write_job_file() {
  local other
  other="$(job_of_run_dir)"
  if [[ -n "$other" && "$other" != "$SLURM_JOB_ID" ]] && ask_state 2 "$other" && is_live "$state"; then return; fi
  # Preflight explains a directory that cannot be written.
  { echo "$SLURM_JOB_ID since $(date '+%F %T'), attempt $attempt, log $log" >"$run_dir/job.txt"; } 2>/dev/null || true
}

release_run_dir() {
  [[ -z "$run_dir" || "$(job_of_run_dir)" != "$SLURM_JOB_ID" ]] || rm -f "$run_dir/job.txt"
}

# --- the end of an attempt ------------------------------------------------------------------------------------------

finish() {
  trap '' TERM USR1
  release_run_dir
  set_status "finished $(date '+%F %T')"
  echo "=== finished, $(date '+%F %T')"
  exit 0
}

# Ends the attempt after a phase that did not succeed.
end_attempt() { # PHASE, EXIT CODE
  trap '' TERM USR1 # requeueing ends this shell, and there is more to do then
  local ended="" decision=()
  still_running || ended=--ended-by-slurm
  mapfile -t decision < <(
    restart_policy decide --phase "$1" --exit-code "$2" --signal="$received_signal" --job "$SLURM_JOB_ID" \
      --log "$log" --log-start "$phase_start" ${run_dir:+"--run-dir=$run_dir"} --unreachable="$UNREACHED" \
      --max-failures "$max_failures" --max-failures-without-progress "$max_failures_without_progress" ${ended:+"$ended"}
  )
  case "${decision[0]:-}" in
    requeued) requeue "${decision[1]}" "${decision[2]}" ;;
    given_up) give_up "${decision[1]}" ;;
    stopped_by_slurm) report_stopped "${decision[1]}" ;;
    *) [[ -z "$ended" ]] || report_stopped "exit code $2 during $1" ;;
  esac
  requeue_without_policy "$@"
}

# The same where restart_policy.py cannot run: an interruption is requeued, anything else a few times, so that a run is
# not lost. Nothing is known of the cause then.
requeue_without_policy() { # PHASE, EXIT CODE
  local mark="=== the restart policy cannot run" reason="exit code $2 during $1" count
  if [[ -n "$received_signal" ]] || (($2 == INTERRUPTED)); then
    requeue "interrupted${received_signal:+ by $received_signal} during $1"
  fi
  echo "$mark: a python3 of version 3.6 or newer is needed on $HOSTNAME"
  count="$([[ -f "$log" ]] && grep -c "^$mark" "$log" || echo "$attempt")"
  ((count < max_failures_without_progress)) || give_up "$reason; $count failures, and the restart policy cannot run (see above)"
  requeue "$reason; the restart policy cannot run"
}

give_up() { # REASON
  trap '' TERM USR1
  release_run_dir
  set_status "FAILED: $1"
  echo "=== FAILED: $1"
  exit "$RUN_ERROR"
}

# Slurm, an administrator or the user has ended or requeued the job, and that is what happens.
report_stopped() { # REASON
  local newest=""
  [[ -z "$run_dir" ]] || newest="$(cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none)"
  set_status "stopped by Slurm $(date '+%F %T')${newest:+, newest checkpoint: $newest}"
  echo "=== stopped by Slurm: $1"
  exit "$INTERRUPTED"
}

# False once Slurm says that the job does not run any more; without an answer it does.
still_running() { # [TRIES]
  ask_state "${1:-5}" "$SLURM_JOB_ID" || return 0
  case "$state" in
    RUNNING | SUSPENDED | STOPPED | SIGNALING | RESIZING | CONFIGURING) true ;;
    *) false ;;
  esac
}

# Puts the job back into the queue, without the nodes to be excluded.
requeue() { # REASON, [NODES]
  release_run_dir
  set_status "to be started again: $1"
  echo "=== to be started again: $(one_line 1000 "$1")"
  request_requeue "$1"
  [[ -z "${2:-}" ]] || exclude_nodes "$2"
  exit "$INTERRUPTED"
}

# Slurm's controller may be away; the job waits for it, as it could not be started again otherwise.
request_requeue() { # REASON
  local code why deadline=$((SECONDS + ${SLURM_WAIT_SECONDS:-3600})) pause=1
  while
    code=0
    ask_once scontrol requeue "$SLURM_JOB_ID" || code=$?
    ((code != 0))
  do
    why="$answer"
    still_running 1 || return 0 # it was requeued, though no answer came
    if ((code == 1 || SECONDS >= deadline)) || ! command -v scontrol >/dev/null; then
      give_up "$1; and the job could not be requeued: $why"
    fi
    echo "=== Slurm cannot be asked to requeue the job, next attempt in $pause s: $why"
    sleep "$pause"
    pause=$((pause < 30 ? pause * 2 : 60))
  done
}

exclude_nodes() { # NODES
  local before=""
  ! ask 3 scontrol --oneliner show job "$SLURM_JOB_ID" || before="$(sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' <<<"$answer")"
  [[ "$before" != "(null)" ]] || before=""
  echo "=== excluded from now on: $1 (to undo: scontrol update jobid=$SLURM_JOB_ID ExcNodeList=$before)"
  ask 3 scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$1" || echo "=== not excluded: $answer"
}
