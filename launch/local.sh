#!/usr/bin/env bash
# One recipe on this machine, through the deepspeed launcher.
set -euo pipefail

usage() {
    cat << 'HELP'
usage: bash launch/local.sh [--processes N] [--print] RECIPE [FLAGS of the recipe]

Trains RECIPE (a file) on this machine.
  --processes N   ranks (default: one for each GPU; without a GPU, 1)
  --print         print the command instead of running it
  --help          this text
FLAGS follow the recipe: --out-dir DIR, --resume ..., --max-steps N, --dry-run; `python RECIPE --help` lists them.

Uses the active virtual or conda environment, or makes .venv (launch/venv.sh). Variables: launch/env.sh.
HELP
}

fail() {
    echo "launch/local.sh: $1 (--help shows the usage)" >&2
    exit 2
}

processes="" print=""
while (($#)); do
    case "$1" in
        --processes)
            [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--processes needs a number over 0, got '${2:-}'"
            processes="$2"
            shift 2
            ;;
        --print) print=yes && shift ;;
        -h | --help) usage && exit 0 ;;
        -*) fail "unknown flag $1 before the recipe" ;;
        *) break ;;
    esac
done
(($#)) || fail "which recipe?"
recipe="$1" && shift
[[ -f "$recipe" ]] || fail "there is no file $recipe"

# a free port nearly always: two runs on one machine must not meet
port="${MASTER_PORT:-$((20000 + RANDOM % 20000))}"
# --hostfile: without it, a hostfile at DeepSpeed's usual place would start other machines too
command=(deepspeed --hostfile /dev/null --master_port "$port")
[[ -z "$processes" ]] || command+=(--num_gpus "$processes")
command+=("$recipe" "$@")
if [[ -n "$print" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/venv.sh
source "$here/venv.sh"
# shellcheck disable=SC2034 # read by env.sh
machines=one
# shellcheck source=launch/env.sh
source "$here/env.sh"
# shellcheck source=launch/group.sh
source "$here/group.sh"
run_in_group "${command[@]}"
