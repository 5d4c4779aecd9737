#!/usr/bin/env bash
# Trains a recipe on this machine, through the deepspeed launcher.
set -euo pipefail

here="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
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
# DeepSpeed warns at each import where it has to find out that there is no GPU
if [[ -z "${DS_ACCELERATOR:-}" && ! -e /dev/kfd ]] && ! compgen -G '/dev/nvidia[0-9]*' > /dev/null && ! command -v nvidia-smi > /dev/null; then
    export DS_ACCELERATOR=cpu
fi
# --hostfile: without it, DeepSpeed would use a hostfile at its default path and start other machines too
supervise deepspeed --log_level "${TRIFOLD_LAUNCHER_LOG_LEVEL:-error}" --hostfile /dev/null --master_port '{port}' "${processes[@]}"
