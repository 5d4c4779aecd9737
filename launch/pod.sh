#!/usr/bin/env bash
# What one pod of launch/kubernetes.yaml runs: its ranks; in the first pod, under the supervisor of all.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=pod.sh
# shellcheck source=launch/supervised.sh
source "$here/supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/pod.sh [OPTIONS] RECIPE [FLAGS of the recipe]

Starts this pod's ranks of RECIPE. launch/kubernetes.yaml runs it in every pod, with these variables:
  POD_JOB, POD_NODES, POD_SLOTS    the JobSet's name, its pods, ranks in each
  JOB_COMPLETION_INDEX             this pod's number, from 0
  POD_RESTART                      how often the JobSet started again: after the first, the run goes on from its last checkpoint
  POD_HOSTS                        the pods' addresses, as a,b,c (default: the JobSet's names for them)
HELP
    common_usage
}

own_flag() { :; }
take_words "$@"
job="${POD_JOB:-}" nodes="${POD_NODES:-}" slots="${POD_SLOTS:-}" place="${JOB_COMPLETION_INDEX:-}"
[[ "$nodes" =~ ^[1-9][0-9]*$ && "$slots" =~ ^[1-9][0-9]*$ && "$place" =~ ^[0-9]+$ ]] \
    || fail "POD_NODES='$nodes', POD_SLOTS='$slots' and JOB_COMPLETION_INDEX='$place' must be numbers"
hosts="${POD_HOSTS:-}"
if [[ -z "$hosts" ]]; then
    [[ -n "$job" ]] || fail "POD_JOB or POD_HOSTS is needed"
    for ((index = 0; index < nodes; index++)); do
        hosts+="${hosts:+,}$job-node-0-$index.$job"
    done
fi
master="${hosts%%,*}"
export NODE_RANK="$place" MASTER_PORT="${MASTER_PORT:-29500}"
report="${REPORT_PORT:-29501}"
supervisor+=(--restarts 0) # the JobSet starts all pods again
((${POD_RESTART:-0} == 0)) || supervisor+=(--continue)
if ((place == 0)); then
    supervisor+=(--address "$master" --lease-port "$report" --token "${job:-pod}")
else
    supervisor+=(--join "$master:$report:${job:-pod}")
fi
supervisor+=(--master "$master" --processes "$((nodes * slots))")
supervise bash "$here/node.sh" "$hosts" "$slots" '{master}' '{port}'
