#!/usr/bin/env bash
# Starts this machine's ranks, where a scheduler runs the same command on every machine of a job.
set -euo pipefail

usage() {
    cat << 'HELP'
usage: bash launch/node.sh [--print] HOSTS SLOTS MASTER PORT RECIPE [FLAGS of the recipe]

Starts SLOTS ranks of RECIPE on this machine. launch/slurm.sbatch and launch/pod.sh run it on every machine.
  HOSTS     all machines, as a,b,c, that of rank 0 first
  MASTER    rank 0's address; PORT: the port of its rendezvous
  --print   print the command instead of running it
  --help    this text
This machine's index in HOSTS is NODE_RANK, or the position of SLURMD_NODENAME.
HELP
}

fail() {
    echo "launch/node.sh: $1 (--help shows the usage)" >&2
    exit 2
}

print=""
case "${1:-}" in
    -h | --help)
        usage || true # its reader may be gone (`| head`)
        exit 0
        ;;
    --print) print=yes && shift ;;
    -*) fail "unknown flag $1" ;;
esac
(($# >= 5)) || fail "needs HOSTS, SLOTS, MASTER, PORT and RECIPE, got $# words"
IFS=, read -r -a hosts <<< "$1"
slots="$2" master="$3" port="$4"
[[ "$slots" =~ ^[1-9][0-9]*$ && "$port" =~ ^[0-9]+$ ]] || fail "SLOTS='$slots' and PORT='$port' must be numbers"
for host in "${hosts[@]}" "$master"; do
    [[ "$host" =~ ^[A-Za-z0-9_:][A-Za-z0-9_.:-]*$ ]] || fail "'$host' is no host's name or address"
done
shift 4

node_rank="${NODE_RANK:-}" world=""
for index in "${!hosts[@]}"; do
    [[ -n "$node_rank" || "${hosts[index]}" != "${SLURMD_NODENAME:-}" ]] || node_rank="$index"
done
[[ "$node_rank" =~ ^(0|[1-9][0-9]*)$ && "$node_rank" -lt "${#hosts[@]}" ]] || fail "this machine is none of ${hosts[*]}: set NODE_RANK to its index"

ranks="$(seq -s , 0 $((slots - 1)))"
for host in "${hosts[@]}"; do world+="${world:+,}\"$host\":[$ranks]"; done
world="$(printf '{%s}' "$world" | base64 | tr -d '\n' | tr +/ -_)"
# what `deepspeed --no_ssh` would start, without the seconds of another import of DeepSpeed
command=(-u -m deepspeed.launcher.launch "--world_info=$world" "--master_addr=$master" "--master_port=$port"
    "--node_rank=$node_rank" "--log_level=${TRIFOLD_LAUNCHER_LOG_LEVEL:-error}")
if [[ -n "$print" ]]; then
    printf '%q ' python "${command[@]}" "$@"
    echo
    exit 0
fi

here="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/venv.sh
source "$here/venv.sh"
# shellcheck source=launch/env.sh
source "$here/env.sh"
# shellcheck source=launch/lib_group.sh
source "$here/lib_group.sh"
run_in_group "$(command -v python || command -v python3)" "${command[@]}" "$@"
