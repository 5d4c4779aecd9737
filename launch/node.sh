#!/usr/bin/env bash
# What one machine of several runs, where a scheduler starts the same thing on each: the ranks of this machine.
set -euo pipefail

usage() {
    cat << 'HELP'
usage: bash launch/node.sh [--print] HOSTS SLOTS MASTER PORT RECIPE [FLAGS of the recipe]

Starts SLOTS ranks of RECIPE here. launch/slurm.sbatch and launch/kubernetes.yaml run it on every machine.
  HOSTS     all machines, as a,b,c, rank 0's first
  MASTER    rank 0's address; PORT is where the ranks meet on it
  --print   print the command instead of running it
  --help    this text
This machine's place in HOSTS is NODE_RANK, or where SLURMD_NODENAME stands.
HELP
}

fail() {
    echo "launch/node.sh: $1 (--help shows the usage)" >&2
    exit 2
}

print=""
case "${1:-}" in
    -h | --help) usage && exit 0 ;;
    --print) print=yes && shift ;;
    -*) fail "unknown flag $1" ;;
esac
(($# >= 5)) || fail "needs HOSTS, SLOTS, MASTER, PORT and RECIPE, got $# words"
IFS=, read -r -a hosts <<< "$1"
slots="$2" master="$3" port="$4"
shift 4

place="${NODE_RANK:-}"
for index in "${!hosts[@]}"; do
    [[ -n "$place" || "${hosts[index]}" != "${SLURMD_NODENAME:-}" ]] || place="$index"
done
[[ "$place" =~ ^[0-9]+$ && "$place" -lt "${#hosts[@]}" ]] || fail "this machine has no place among ${hosts[*]}: set NODE_RANK"

command=(deepspeed --no_ssh --node_rank "$place" --master_addr "$master" --master_port "$port")
if [[ -n "$print" ]]; then
    printf '%q ' "${command[@]}" --hostfile "<(lines of HOST slots=$slots)" "$@"
    echo
    exit 0
fi

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/venv.sh
source "$here/venv.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"
hostfile="$(mktemp)" # of this machine's own: /tmp is not shared
printf "%s slots=$slots\n" "${hosts[@]}" > "$hostfile"
trap 'rm -f "$hostfile"' EXIT
# shellcheck source=launch/group.sh
source "$here/group.sh"
run_in_group "${command[@]}" --hostfile "$hostfile" "$@"
