# shellcheck shell=bash
# Sourced by the prologue of jobs, submit_pipeline.sh and status.sh: questions to Slurm's controller, which may be
# restarted, busy or out of reach, and to the restart policy. A client that fails is no answer.

slurm_scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Messages of a refusal: trying again changes nothing.
REFUSED='Invalid job id|Invalid node name|[Aa]ccess.*denied|[Pp]ermission denied|is presently disabled|already (finished|complet)|not permitted'
# Messages when Slurm cannot be reached: trying again may help.
# shellcheck disable=SC2034  # read by the scripts that source this
UNREACHED='[Uu]nable to contact|[Cc]onnection (failure|refused|reset|timed out)|[Ss]ocket timed out|Zero Bytes were transmitted|controller not responding|Resource temporarily unavailable|establish a configuration source'

# Calls a client once. Sets `answer` to what it printed, or to why it failed, in one line.
# Returns 0: it worked; 1: Slurm refused; 2: no answer.
ask_once() { # COMMAND...
  local code=0
  answer="$("$@" 2>&1)" || code=$?
  if ((code == 0)); then
    answer="$(sed -E '/^[a-z_]+: (error|warning|info|debug[0-9]*): /d' <<<"$answer")"
    return 0
  fi
  answer="$(sed -E 's/^[a-z_]+:? error: //' <<<"$answer" | paste -sd' ')"
  answer="${answer:-$1: exit code $code}"
  [[ ! "$answer" =~ $REFUSED ]] || return 1
  return 2
}

# The same, up to TRIES times while there is no answer, with increasing pauses.
ask() { # TRIES, COMMAND...
  local tries="$1" try code
  for ((try = 1; ; try++)); do
    code=0
    ask_once "${@:2}" || code=$?
    ((code == 2 && try < tries)) || return "$code"
    sleep $((try < 6 ? 2 ** (try - 1) : 30))
  done
}

# Sets `state` to Slurm's state of a job (RUNNING, PENDING, FAILED, ...), by squeue or else by scontrol, or to GONE for
# a job that Slurm does not know. Without an answer returns 2 and sets `state` to nothing and `answer` to the reason.
ask_state() { # TRIES, JOB
  local code=0 try why=""
  state=""
  for ((try = 1; try <= $1; try++)); do
    code=0
    ask_once squeue --noheader --states=all --job "$2" --format %T || code=$?
    if ((code == 0)) && [[ -n "$answer" ]]; then
      read -r state _ <<<"$answer"
      return 0
    elif [[ "$answer" == *"Invalid job id"* ]]; then
      state=GONE
      return 0
    fi
    why="$answer"
    if ask_once scontrol --oneliner show job "$2" && [[ " $answer " =~ \ JobState=([A-Z_]+)\  ]]; then
      state="${BASH_REMATCH[1]}"
      return 0
    fi
    ((try == $1)) || sleep $((2 ** (try < 6 ? try - 1 : 5)))
  done
  answer="${why:-squeue said nothing}"
  return 2
}

# Whether a job with this state runs, still ends, or will run.
is_live() { # STATE
  case "$1" in
    PENDING | CONFIGURING | RUNNING | SUSPENDED | COMPLETING | STOPPED | SIGNALING | RESIZING | STAGE_OUT) true ;;
    REQUEUED | REQUEUE_HOLD | REQUEUE_FED | SPECIAL_EXIT) true ;;
    *) false ;;
  esac
}

# Describes in words how a job ended, or that it has not.
describe_end() { # JOB
  local ended
  if ! ask_state 2 "$1"; then
    echo "Slurm cannot be asked ($answer)"
  elif is_live "$state"; then
    echo "Slurm says that it is $state"
  else
    ended="$(how_it_ended "$1")"
    echo "Slurm says ${ended:-nothing about it any more}"
  fi
}

# Prints how a job ended according to Slurm (`FAILED, exit code 0:9`), or nothing for a job that it does not know.
how_it_ended() { # JOB
  if ask 1 scontrol --oneliner show job "$1"; then
    sed -nE 's/^.* JobState=([A-Z_]+) .* ExitCode=([0-9:]+) .*$/\1, exit code \2/p' <<<"$answer" | head -n 1
  elif ask 1 sacct --noheader --allocations --parsable2 --jobs "$1" --format State,ExitCode; then
    sed -n '1s/|/, exit code /p' <<<"$answer"
  fi
}

# Runs restart_policy.py under this host's own Python, outside of any container or environment.
restart_policy() { # ARGUMENTS...
  timeout -s KILL 120 python3 -EsSB "$slurm_scripts/restart_policy.py" "$@"
}
