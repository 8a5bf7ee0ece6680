#!/usr/bin/env bash
# Submit the whole training as a chain of jobs: import -> stage 1 -> next-stage -> stage 2 -> next-stage -> stage 3 ->
# export. Each step starts when the previous one has succeeded; a failed step cancels those after it.
#   slurm/submit_pipeline.sh runs/qwenvl                        # slurm/site.env holds what each step needs
#   slurm/submit_pipeline.sh runs/qwenvl --dry_run
#   slurm/submit_pipeline.sh runs/qwenvl --from stage2 --to next_stage3
#   slurm/submit_pipeline.sh runs/qwenvl -- --parallel.pipeline 2      # overrides for every training stage
# Called again it continues: finished steps are skipped, queued or running jobs are kept, the rest is submitted.
# slurm/status.sh RUN shows the progress. In RUN: weights/, stage1/ to stage3/, export/, logs/ and jobs.tsv.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
QWENVL_ROOT="$(dirname "$here")"
export QWENVL_ROOT
# shellcheck source=slurm/client.sh
source "$here/client.sh"
steps=(import stage1 next_stage2 stage2 next_stage3 stage3 export)

die() {
  echo "submit_pipeline: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  echo "Options: --from STEP, --to STEP, --dry_run, --site FILE. Steps: ${steps[*]}."
}

# Position of a step in the chain.
position() { # STEP
  local number
  for number in "${!steps[@]}"; do
    [[ "${steps[number]}" != "$1" ]] || {
      echo "$number"
      return
    }
  done
  die "unknown step $1: expected one of ${steps[*]}"
}

import_arguments=()
run="" first=import last=export dry_run="" overrides=()
while (($#)); do
  case "$1" in
    --from | --to | --site) (($# > 1)) || die "$1: expected a value" ;;&
    --from) first="$2" && shift ;;
    --to) last="$2" && shift ;;
    --site) SITE="$(realpath "$2")" && shift ;;
    --dry_run) dry_run=yes ;;
    --dry-run) # the spelling of version 0.2
      echo "submit_pipeline.sh: --dry-run is written --dry_run; the next version takes that alone" >&2
      dry_run=yes
      ;;
    --help | -h) usage && exit 0 ;;
    --) overrides=("${@:2}") && break ;;
    -*) die "unknown option $1 (--help shows them)" ;;
    *) [[ -z "$run" ]] || die "expected one run directory, found $run and $1" && run="$1" ;;
  esac
  shift
done
[[ -n "$run" ]] || die "expected a run directory (--help explains)"
from="$(position "$first")"
to="$(position "$last")"
((from <= to)) || die "--from $first comes after --to $last"
run="$(realpath -m "$run")"
export SITE="${SITE:-$here/site.env}"
# shellcheck source=slurm/site.env.example
[[ ! -f "$SITE" ]] || source "$SITE"

# Sets `script` and `arguments` of a step, and `result`, which exists when the step is finished.
describe_step() { # STEP
  local -n own="${1}_arguments"
  local weights="$run/weights"
  case "$1" in
    import) script=import_checkpoint arguments=(--out "$weights/stage1_start") result="$weights/stage1_start" ;;
    stage1) script=stage1_pretrain arguments=(--run_dir "$run/stage1" --checkpoint.init_from "$weights/stage1_start") ;;
    stage2) script=stage2_multitask arguments=(--run_dir "$run/stage2" --checkpoint.init_from "$weights/stage2_start") ;;
    stage3) script=stage3_sft arguments=(--run_dir "$run/stage3" --checkpoint.init_from "$weights/stage3_start") ;;
    next_stage*)
      local number="${1#next_stage}"
      script=next_stage result="$weights/stage${number}_start"
      arguments=(--from "$run/stage$((number - 1))" --to "stage$number" --out "$result")
      ;;
    export) script=export arguments=(--from "$run/stage3" --out "$run/export") result="$run/export" ;;
  esac
  # A step's own arguments come last, where they win; a subcommand such as import-parts must come first.
  if [[ "$1" == import ]]; then
    arguments=("${own[@]}" "${arguments[@]}")
  else
    arguments+=("${own[@]}")
  fi
  [[ "$1" != stage? ]] || arguments+=("${overrides[@]}") result="$run/$1"
}

finished() { # STEP
  if [[ "$1" == stage? ]]; then
    python3 "$QWENVL_ROOT/tools/run_progress.py" "$result" --finished
  else
    [[ -d "$result" ]]
  fi
}

# Sets `job` to the queued or running job of a step, or to nothing. Never guesses: otherwise two jobs could work in the
# same directory.
find_live_job() { # STEP
  job="$(awk -F'\t' -v step="$1" '$1 == step { job = $2 } END { print job }' "$run/jobs.tsv" 2>/dev/null || true)"
  if [[ -n "$job" ]]; then
    ask_state 5 "$job" || die "Slurm cannot be asked about job $job of $1, so nothing more is submitted; call again ($answer)"
    ! is_live "$state" || return 0
    case "$(restart_policy read-status "$run/logs/$1-$job.log")" in
      running | requeued) echo "$1: job $job ended unexpectedly: $(describe_end "$job")" ;;
    esac
  fi
  find_unrecorded_job "$1"
}

# Sets `job` to a job that Slurm accepted without an answer, or that this script had no time to record.
find_unrecorded_job() { # STEP
  local number comment
  job=""
  [[ -z "$dry_run" ]] || command -v squeue >/dev/null || return 0
  ask 5 squeue --name="$1" --format '%A|%k' ||
    die "Slurm cannot be asked about jobs of $1, so nothing more is submitted; call again ($answer)"
  while IFS='|' read -r number comment; do
    [[ "$comment" != "chain $run" ]] || job="$number"
  done <<<"$answer"
}

# Sets `job`. Slurm may have accepted a job although it did not answer.
submit() { # STEP, COMMAND...
  local try code
  for try in 1 2 3 4 5; do
    code=0
    ask_once "${@:2}" || code=$?
    if ((code == 0)); then
      job="${answer%%;*}"
      return
    fi
    [[ "$answer" =~ $UNREACHED ]] ||
      die "$1 was not accepted: ${answer//sbatch: error: /} (settings: $SITE)"
    ((try < 5)) || die "$1 could not be submitted, Slurm is out of reach: ${answer//sbatch: error: /}; call again later"
    sleep $((2 ** try))
    find_unrecorded_job "$1"
    [[ -z "$job" ]] || return 0
  done
}

# Whether one of the arguments is an option: `--name` or `--name=value`.
has_option() { # NAME, ARGUMENTS...
  local argument
  for argument in "${@:2}"; do
    [[ "$argument" != "$1" && "$argument" != "$1="* ]] || return 0
  done
  return 1
}

# Checks that the start weights of a step exist, where no submitted job will write them.
check_start() { # STEP, NUMBER
  if [[ "$1" == import ]]; then
    ((${#import_arguments[@]})) || die "import needs import_arguments in $SITE, for instance (import-qwenvl --from DIR)"
    return
  fi
  ! has_option --checkpoint.init_from "${arguments[@]:4}" || return 0 # the site names the start weights
  local before="${steps[$2 - 1]}"
  describe_step "$before"
  finished "$before" || die "$1 starts from $result, which is not finished: begin with --from $before"
}

previous="" # the job that the next step waits for
for ((number = from; number <= to; number++)); do
  step="${steps[number]}"
  declare -a "${step}_arguments+=()" "${step}_sbatch+=()"
  declare -n options="${step}_sbatch"
  describe_step "$step"
  if finished "$step"; then
    echo "$step: finished ($result)"
    continue
  fi
  find_live_job "$step"
  if [[ -n "$job" ]]; then
    echo "$step: job $job is queued or running"
    previous="$job"
    continue
  fi
  if [[ -z "$previous" ]]; then
    check_start "$step" "$number"
    describe_step "$step"
  fi
  # Slurm replaces %x and the like, also where they are part of a directory's name.
  command=(sbatch --parsable --job-name="$step" --comment="chain $run" --output="${run//%/%%}/logs/%x-%j.log" "${options[@]}")
  [[ -z "$previous" ]] || command+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
  command+=("$here/$script.sbatch" "${arguments[@]}")
  if [[ -n "$dry_run" ]]; then
    echo "$step: $(printf '%q ' "${command[@]}")"
    previous="<job of $step>"
    continue
  fi
  mkdir -p "$run/logs" || die "$run cannot be made"
  submit "$step" "${command[@]}"
  previous="$job"
  printf '%s\t%s\t%s\n' "$step" "$previous" "$(date '+%F %T')" >>"$run/jobs.tsv"
  echo "$step: submitted as job $previous, log $run/logs/$step-$previous.log"
done
