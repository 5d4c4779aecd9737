#!/usr/bin/env bash
# Trains a recipe on this machine, through the deepspeed launcher.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=local.sh
# shellcheck source=launch/lib_supervised.sh
source "$here/lib_supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/local.sh [OPTIONS] RECIPE [FLAGS of the recipe]

Trains RECIPE (a file) on this machine.
  --processes N   ranks (default: one a GPU; without a GPU, 1)
HELP
    common_usage
}

processes=()
own_flag() {
    [[ "$1" == --processes ]] || return 0
    [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--processes needs a number over 0, got '${2:-}'"
    processes=(--num_gpus "$2")
    supervisor+=(--processes "$2")
    took=2
}

take_words "$@"
# --hostfile: without it, DeepSpeed would use a hostfile at its default path and start other machines too
supervise deepspeed --hostfile /dev/null --master_port '{port}' "${processes[@]}"
