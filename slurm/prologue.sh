# shellcheck shell=bash
# Sourced by every batch script: the site's settings, and what all jobs do around their work.
#
# A job's log is one file over all its attempts. Its first line always says how the job stands; every attempt begins
# with a line `=== attempt`. Settings come from slurm/site.env (or SITE=file); slurm/site.env.example explains them.
# docs/slurm.md says what counts as a failure and what as an interruption.

set -euo pipefail

# SIGTERM (requeue, preemption) and SIGUSR1 (a time limit ahead) do not end this shell. It tells the work that runs, or
# does not begin the next; the work saves, and the shell waits for it.
signals=0 told="" work=""
on_signal() { # NAME
  signals=$((signals + 1))
  told="$1"
  [[ -z "$work" ]] || kill -USR1 "$work" 2>/dev/null || true
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
run_dir="" bad_nodes="" log_start=0
INTERRUPTED=75 # as in megatron_qwenvl/runtime/exit_codes.py
BAD_NODES=3
BY_SIGNAL=143 # as a shell reports the end by SIGTERM

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
stand() { # TEXT
  [[ -f "$log" ]] || return 0
  printf '%s\n' "$(LC_ALL=C printf '%-500s' "$(one_line 500 "$SLURM_JOB_NAME: $1")")" |
    dd of="$log" conv=notrunc status=none || true
}

# Runs bookkeeping whose own processes no signal may end.
calmly() { # COMMAND...
  (trap '' TERM USR1 && "$@")
}

begin() {
  calmly announce
}

announce() {
  local before=""
  [[ ! -f "$log" || -s "$log" ]] || LC_ALL=C printf '%-500s\n' "" >>"$log"
  [[ ! -f "$log" ]] || before="$(head -n 1 "$log" | tr -d '\0')"
  stand "running since $(date '+%F %T'), attempt $attempt"
  echo "=== attempt $attempt of job $SLURM_JOB_ID ($SLURM_JOB_NAME) on $SLURM_JOB_NODELIST, $(date '+%F %T')"
  [[ "$before" != *": running since "* ]] ||
    echo "=== the attempt before ended without a word (killed, or its node was lost): ${before%"${before##*[! ]}"}"
}

end_well() {
  trap '' TERM USR1
  leave_run
  stand "finished $(date '+%F %T')"
  echo "=== finished, $(date '+%F %T')"
  exit 0
}

give_up() { # REASON
  trap '' TERM USR1
  local reason="${1:-no reason is known; see the lines above}"
  leave_run
  stand "FAILED: $reason"
  echo "=== FAILED: $reason"
  exit 1
}

# The part of the log since the last piece of work of this attempt began.
this_work() {
  [[ ! -f "$log" ]] || tail -c "+$((log_start + 1))" "$log" |
    awk '/^=== attempt /{ text = "" } { text = text $0 "\n" } END { printf "%s", text }'
}

# What ended the work, as one line: the first of what ranks say of themselves and of what srun says of ranks that
# could not say anything (killed, node lost). A rank that only lost a neighbour is believed last.
first_cause() { # EXIT CODE
  this_work | awk -v code="$1" '
    { sub(/^ *[0-9]+: /, "") } # the label of srun --label
    /FAILED \(lost peer\)/ { if (peer == "") peer = $0; next }
    /FAILED/ { cause = $0; exit }
    /oom.kill/ { cause = $0; exit }
    /^srun: error: .*Node failure/ { cause = $0; exit }
    /^srun: error: .*tasks? [-0-9,\[\]]+: / {
      # Codes that a rank explains itself, and ends that srun brings about.
      if (/: Exited with exit code (1|2|70|71|75)$/) { if (exited == "" && !/code (70|75)$/) exited = $0; next }
      if (/: (Terminated|User defined signal 1)/) next
      cause = $0; exit
    }
    /^srun: (error|fatal): / { if (said == "") said = $0 }
    END {
      if (cause == "") cause = peer
      if (cause == "") cause = exited
      if (cause == "") cause = said
      if (cause == "") cause = "exit code " code
      sub(/^[0-9-]+ [0-9:,]+ /, "", cause) # the time
      print cause
    }'
}

# The last line that a program, not Slurm, left on the log; if none did, the last of Slurm, or the exit code.
last_words() { # EXIT CODE
  this_work | awk -v code="${1:-unknown}" '
    /^(srun|slurmstepd): .*\*\*\* STEP|^===/ || !NF { next }
    /^(srun|slurmstepd)/ { slurm = $0; next }
    { line = $0 }
    END { print line != "" ? line : (slurm != "" ? slurm : "exit code " code) }'
}

# --- pieces of work -------------------------------------------------------------------------------------------------

begin_work() {
  [[ ! -f "$log" ]] || log_start="$(calmly stat -c %s "$log")"
}

# Runs a command to its end, whatever signals come meanwhile; returns its exit code.
work() { # COMMAND...
  [[ -z "$told" ]] || return "$BY_SIGNAL"
  begin_work
  "$@" &
  work=$!
  [[ -z "$told" ]] || kill -USR1 "$work" 2>/dev/null || true # it came just now
  local seen code
  while
    seen=$signals code=0
    wait "$work" || code=$?
    ((signals != seen)) # `wait` was disturbed
  do :; done
  work=""
  return "$code"
}

# Whether work ended because it was asked to: saved, or ended by SIGUSR1 or SIGTERM before it could save. srun sends
# SIGTERM too, to all others when one rank fails; so what the first rank died of decides.
was_interrupted() { # EXIT CODE
  local first
  case "$1" in
    0) return 1 ;;
    "$INTERRUPTED" | 138 | "$BY_SIGNAL") [[ -z "$told" ]] || return 0 ;;
  esac
  first="$(this_work | awk '
    { sub(/^ *[0-9]+: /, "") }
    /FAILED/ && !/lost peer/ { failed = 1 }
    /^srun: forcing job termination/ { print "asked"; exit }
    /^srun: error: .*tasks? [-0-9,\[\]]+: / {
      if (/: (Terminated|User defined signal 1)/ || /: Exited with exit code 75$/) { print "asked"; exit }
      if (/: Exited with exit code 70$/ && !failed) next # it lost a neighbour, which comes next
      print "failed"; exit
    }')"
  case "$first" in
    asked) return 0 ;;
    failed) return 1 ;;
  esac
  (($1 == INTERRUPTED || $1 == 138 || $1 == BY_SIGNAL))
}

# Whether srun never came to the work, because Slurm could not be reached.
was_not_started() {
  this_work | grep -E "^srun: (error|fatal): (Unable|Failed|Could not|_establish).*($UNREACHED)" >/dev/null
}

# What work that did not end well means wherever it is not the work's own verdict; returns if it is one.
unless_it_was_not_the_work() { # EXIT CODE, WHAT
  trap '' TERM USR1
  ! was_interrupted "$1" || go_on "interrupted ${told:+by $told }in $2"
  ! was_not_started || go_on "Slurm could not be reached in $2"
}

# It ends by itself on every rank; were the others ended with the first, the verdict's exit code would be lost.
run_preflight() { # ARGUMENTS
  PROGRAM=tools/preflight.py SRUN_OPTIONS="--kill-on-bad-exit=0 ${SRUN_OPTIONS:-}" work "$root/launch/srun.sh" "$@"
}

# Looks at the machines before a job that is no training; its log lies on the file system that all nodes share.
preflight_machines() {
  local code=0
  run_preflight --directory "$(dirname "$log")" || code=$?
  ((code == 0)) && return
  unless_it_was_not_the_work "$code" preflight
  ((code < 128)) || again_or_give_up "$(first_cause "$code")"
  give_up "$(last_words "$code")"
}

# Runs one process of the job's programs on the first node: PROGRAM ARGUMENTS...
one() {
  PROGRAM="$1" SRUN_OPTIONS="--nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap ${SRUN_OPTIONS:-}" work "$root/launch/srun.sh" "${@:2}"
}

# A job whose work is one conversion: PROGRAM ARGUMENTS...
run_one() {
  begin
  preflight_machines
  finish_with one "$@"
}

# The last piece of work of a job that is no training. What a program says against its arguments or its input ends the
# job; killed, it is started again some times.
finish_with() { # COMMAND...
  local code=0
  "$@" || code=$?
  ((code != 0)) || end_well
  unless_it_was_not_the_work "$code" "$SLURM_JOB_NAME"
  ((code < 128)) || again_or_give_up "$(first_cause "$code")"
  give_up "$(last_words "$code")"
}

# Starts a job that is no training again after a failure, a few times.
again_or_give_up() { # CAUSE
  local before=0
  [[ ! -f "$log" ]] || before="$(grep -c '^=== to be started again: killed: ' "$log" || true)"
  ((before + 1 < ${MAX_FAILURES_WITHOUT_PROGRESS:-3})) || give_up "$1; $((before + 1)) failures of this job"
  go_on "killed: $1"
}

# --- training -------------------------------------------------------------------------------------------------------

# A training stage: RECIPE OVERRIDES...; a --recipe among the overrides replaces RECIPE.
train() {
  local code=0
  begin
  configure "$@"
  enter_run
  preflight
  SRUN_OPTIONS="--label ${SRUN_OPTIONS:-}" work "$root/launch/srun.sh" "${arguments[@]}" || code=$?
  ((code != 0)) || end_well
  trap '' TERM USR1
  ((code != INTERRUPTED)) || go_on "interrupted, saved as $(newest)"
  unless_it_was_not_the_work "$code" "training, newest checkpoint: $(newest)"
  after_failure "$(first_cause "$code")"
}

# Sets `arguments` and `run_dir`; a configuration that cannot be used ends the job.
configure() { # RECIPE OVERRIDES...
  arguments=(--recipe "$@") # of two the last one counts
  local code=0
  begin_work
  run_dir="$(ask_trainer run_dir)" || code=$?
  if ((code)); then
    [[ ! "$told" ]] || code="$BY_SIGNAL"
    run_dir="" # no failure of a run yet
    unless_it_was_not_the_work "$code" "the configuration"
    ((code < 128)) || again_or_give_up "$(first_cause "$code")"
    give_up "$(last_words "$code")"
  fi
  calmly mkdir -p "$run_dir" 2>/dev/null || true # one that cannot be made is preflight's to explain
}

# One value of the resolved configuration. The site's options may label output, which would be read as part of it.
ask_trainer() { # FIELD
  local options option plain=""
  unset SLURM_LABELIO
  words options "${SRUN_OPTIONS:-}"
  for option in "${options[@]}"; do
    [[ "$option" == --label || "$option" == -l ]] || plain+="$option "
  done
  SRUN_OPTIONS="$plain" one "-m megatron_qwenvl.train" "${arguments[@]}" --print-value "$1"
}

# Leaves a note in the run's directory while the job works there. One that is found there was left by a job that ended
# without a word, or that still runs: then it stays, and the trainer will refuse to start.
enter_run() {
  local other
  other="$(note_of_job)"
  if [[ -n "$other" && "$other" != "$SLURM_JOB_ID" ]]; then
    echo "=== job $other worked here before and left no word of its end: $(calmly describe_end "$other")"
  fi
  calmly write_note
}

# The job that last said that it works in the run's directory.
note_of_job() {
  [[ ! -r "$run_dir/job.txt" ]] || sed -n '1s/ .*//p' "$run_dir/job.txt"
}

write_note() {
  local other
  other="$(note_of_job)"
  if [[ -n "$other" && "$other" != "$SLURM_JOB_ID" ]] && ask_state 2 "$other" && is_live "$state"; then return; fi
  # What cannot be written is preflight's to explain.
  { echo "$SLURM_JOB_ID since $(date '+%F %T'), attempt $attempt, log $log" >"$run_dir/job.txt"; } 2>/dev/null || true
}

leave_run() {
  [[ -z "$run_dir" || "$(note_of_job)" != "$SLURM_JOB_ID" ]] || rm -f "$run_dir/job.txt"
}

# Looks at nodes, network, file system and data before anything is trained on.
preflight() {
  local code=0 list="$run_dir/bad_nodes.txt"
  run_preflight "${arguments[@]}" --bad-nodes "$list" || code=$?
  ((code == 0)) && return
  unless_it_was_not_the_work "$code" preflight
  case "$code" in
    1 | 2) give_up "$(last_words "$code")" ;;
    "$BAD_NODES")
      bad_nodes="$(paste -sd, "$list" 2>/dev/null || true)"
      after_failure "$(last_words "$code")"
      ;;
    *) after_failure "$(first_cause "$code")" ;;
  esac
}

# The newest checkpoint, or `nothing`.
newest() {
  [[ -z "$run_dir" ]] || cat "$run_dir/checkpoints/latest" 2>/dev/null || echo nothing
}

# --- what comes next ------------------------------------------------------------------------------------------------

# False once Slurm, an administrator or the user has ended or requeued the job: then that is what happens. Not known
# is not stopped.
still_running() {
  ask_state "${1:-5}" "$SLURM_JOB_ID" || return 0
  case "$state" in
    RUNNING | SUSPENDED | STOPPED | SIGNALING | RESIZING | CONFIGURING) true ;;
    *) false ;;
  esac
}

stopped_by_slurm() { # REASON
  stand "stopped by Slurm $(date '+%F %T')${run_dir:+, newest checkpoint: $(newest)}"
  echo "=== stopped by Slurm: $1"
  exit "$INTERRUPTED"
}

# Starts the job again, at its end of the queue, without the nodes in `bad_nodes`.
go_on() { # REASON
  trap '' TERM USR1 # requeueing ends this shell, and the last line is still to be done
  leave_run
  still_running || stopped_by_slurm "$1"
  stand "to be started again: $1"
  echo "=== to be started again: $(one_line 1000 "$1")"
  requeue "$1"
  [[ -z "$bad_nodes" ]] || leave_out "$bad_nodes"
  exit "$INTERRUPTED"
}

# Slurm's controller may be away; the job waits for it, as it could not be started again otherwise.
requeue() { # REASON
  local code why deadline=$((SECONDS + ${SLURM_WAIT_SECONDS:-3600})) pause=1
  while
    code=0
    ask_once scontrol requeue "$SLURM_JOB_ID" || code=$?
    ((code != 0))
  do
    why="$answer"
    still_running 1 || return 0 # it was done, though no answer came
    if ((code == 1 || SECONDS >= deadline)) || ! command -v scontrol >/dev/null; then
      give_up "$1; and the job could not be requeued: $why"
    fi
    echo "=== Slurm cannot be asked to start the job again, next try in $pause s: $why"
    sleep "$pause"
    pause=$((pause < 30 ? pause * 2 : 60))
  done
}

leave_out() { # NODES
  local before=""
  ! ask 3 scontrol --oneliner show job "$SLURM_JOB_ID" || before="$(sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' <<<"$answer")"
  [[ "$before" != "(null)" ]] || before=""
  echo "=== left out from now on: $1 (back in: scontrol update jobid=$SLURM_JOB_ID ExcNodeList=$before)"
  ask 3 scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$1" || echo "=== not left out: $answer"
}

# Starts the job again unless that would only repeat the failure. RUN_DIR/failures.tsv keeps time, job, newest
# checkpoint and cause of every failure.
after_failure() { # CAUSE
  trap '' TERM USR1
  local cause here same stuck all ledger="$run_dir/failures.tsv"
  cause="$(one_line 2000 "$1")"
  still_running || stopped_by_slurm "$cause"
  printf '%s\t%s\t%s\t%s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$(newest)" "$cause" >>"$ledger" || give_up "$cause"
  here="$(awk -F'\t' -v at="$(newest)" '{ if ($3 == at) text = text $4 "\n"; else text = "" } END { printf "%s", text }' "$ledger")"
  stuck="$(wc -l <<<"$here")"
  # The same but for numbers: another rank, port or node may say it.
  same="$(grep -cxF -- "${cause//[0-9]/}" <<<"${here//[0-9]/}" || true)"
  all="$(awk -F'\t' -v job="$SLURM_JOB_ID" '$2 == job' "$ledger" | wc -l)"
  ((all < ${MAX_FAILURES:-10})) || give_up "$cause; $all failures of this job"
  if [[ -z "$bad_nodes" ]]; then # else it is other nodes that try next
    ((same < 2)) || give_up "$cause; it is the same as at the last start from here ($(newest))"
    ((stuck < ${MAX_FAILURES_WITHOUT_PROGRESS:-3})) || give_up "$cause; $stuck failures without a new checkpoint"
  fi
  go_on "$cause"
}
