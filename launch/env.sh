# shellcheck shell=bash
# shellcheck disable=SC2034  # read by the scripts that source this
# Sourced by the launchers and by batch scripts: the program, its Python interpreter, the container and the rendezvous.
# It sets
#   root         the repository
#   program      the program that the launchers start: PROGRAM, which is `-m MODULE` or a script's path in the repository
#                (tools/preflight.py); the default is the trainer
#   interpreter  the Python of a rank; inside the container where there is one
#   container    options of srun for the container
#   python       the same Python for one process that the calling script starts itself:
#                "${python[@]}" tools/convert_checkpoint.py ...
# PYTHON chooses the interpreter; the default is .venv's, or python3 where there is none. In a container it is python3.
# CONTAINER_IMAGE with CONTAINER_RUNTIME=pyxis or apptainer runs all of it in a container; CONTAINER_MOUNTS (default:
# the repository, at its own path) lists the mounts, CONTAINER_OPTIONS holds further options of the runtime.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Splits a text into words as the shell does, but leaves * in them alone.
words() { # NAME OF THE ARRAY, TEXT
  read -r -d '' -a "$1" <<<"$2" || true # the end of the text counts as a failure
}

choose_program() {
  local chosen="${PROGRAM:--m megatron_qwenvl.train}"
  if [[ "$chosen" == "-m "* ]]; then
    program=(-m "${chosen#-m }")
  else
    program=("$root/$chosen")
    [[ -f "${program[0]}" ]] || die "PROGRAM=$chosen: there is no ${program[0]}"
  fi
}

choose_python() {
  local name
  container=()
  if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    choose_container
    return
  fi
  for name in CONTAINER_RUNTIME CONTAINER_MOUNTS CONTAINER_OPTIONS; do
    [[ -z "${!name:-}" ]] || die "$name=${!name} is set but CONTAINER_IMAGE is not"
  done
  interpreter=("${PYTHON:-$root/.venv/bin/python}")
  [[ -n "${PYTHON:-}" || -x "${interpreter[0]}" ]] || interpreter=(python3)
  python=("${interpreter[@]}")
}

choose_container() {
  local mounts="${CONTAINER_MOUNTS:-$root:$root}" options
  words options "${CONTAINER_OPTIONS:-}"
  case "${CONTAINER_RUNTIME:-}" in
    pyxis)
      # In the image's own working directory, files that a run writes to relative paths would vanish with the container.
      container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD"
        "${options[@]}")
      interpreter=("${PYTHON:-python3}")
      python=(srun --nodes=1 --ntasks=1 "${container[@]}" "${interpreter[@]}")
      ;;
    apptainer)
      interpreter=(apptainer exec --nv --bind "$mounts" "${options[@]}" "$CONTAINER_IMAGE" "${PYTHON:-python3}")
      python=("${interpreter[@]}")
      ;;
    "") die "CONTAINER_IMAGE=$CONTAINER_IMAGE is set but CONTAINER_RUNTIME (pyxis or apptainer) is not" ;;
    *) die "CONTAINER_RUNTIME=$CONTAINER_RUNTIME: expected pyxis or apptainer" ;;
  esac
}

# pyxis is a plugin of srun; the other launchers cannot enter its containers.
refuse_pyxis() {
  ((${#container[@]} == 0)) || die "CONTAINER_RUNTIME=pyxis works through srun only: use launch/srun.sh"
}

# Exports the rendezvous, MASTER_ADDR and MASTER_PORT: each as given, or else found and chosen here.
export_rendezvous() { # COMMAND THAT PRINTS THE ADDRESS OF THE FIRST NODE
  [[ -n "${MASTER_ADDR:-}" ]] || MASTER_ADDR="$("$@")" || exit # it has printed the reason
  export MASTER_ADDR
  export MASTER_PORT="${MASTER_PORT:-$(free_port)}"
}

# Prints a port on which nothing listens here, below the system's ephemeral ports. It is random, so that jobs that share
# a node get different ones, even if that node is not this one.
free_port() {
  local port
  while
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
  do :; done
  echo "$port"
}

# Prints the first name of a list of hosts in Slurm's notation: gpu-a01.example of gpu-a[01-02,07].example.
first_host() { # LIST
  local rest="$1" name=""
  while [[ "$rest" =~ ^([^][,]*)\[([^],-]+)[^]]*\](.*)$ ]]; do
    name+="${BASH_REMATCH[1]}${BASH_REMATCH[2]}"
    rest="${BASH_REMATCH[3]}"
  done
  echo "$name${rest%%,*}"
}

# Prints the address of the allocation's first node according to Slurm, as a node's name need not resolve. Where Slurm
# cannot be asked (its controller is away, or a container has srun alone) prints the name, if it resolves.
first_node_address() {
  local list="${SLURM_JOB_NODELIST:-${SLURM_STEP_NODELIST:-${SLURM_NODELIST:-}}}" first shown why try
  [[ -n "$list" ]] || die "SLURM_JOB_NODELIST is not set: set MASTER_ADDR to the address of the job's first node"
  first="$(first_host "$list")"
  why="there is no scontrol on PATH"
  for try in 1 2 3; do
    command -v scontrol >/dev/null || break
    if shown="$(scontrol --oneliner show node "$first" 2>&1)" && [[ "$shown" =~ (^|[[:space:]])NodeAddr=([^[:space:]]+) ]]; then
      echo "${BASH_REMATCH[2]}"
      return
    fi
    why="scontrol show node failed (${shown//[[:space:]]/ })"
    ((try == 3)) || sleep "$try"
  done
  ! command -v getent >/dev/null || getent hosts "$first" >/dev/null ||
    die "the address of node $first is not known: $why, and the name does not resolve; set MASTER_ADDR"
  echo "$first"
}

choose_program
choose_python
