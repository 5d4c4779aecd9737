#!/usr/bin/env bash
# Starts the ranks of one pod of launch/kubernetes.yaml; the first pod also runs the supervisor of all.
set -euo pipefail

here="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=pod.sh
# shellcheck source=launch/lib_supervised.sh
source "$here/lib_supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/pod.sh [OPTIONS] RECIPE [FLAGS of the recipe]

Starts this pod's ranks of RECIPE. launch/kubernetes.yaml runs it in every pod, with these variables:
  POD_JOB, POD_NODES, POD_SLOTS    the JobSet's name, its pods, ranks in each
  JOB_COMPLETION_INDEX             this pod's number, from 0
  POD_RESTART                      restarts of the JobSet so far; from 1 on, the run resumes from its last checkpoint
  TRIFOLD_SECRET                   the JobSet's secret, by which its pods know each other (launch/README.md, Trust)
  POD_HOSTS                        the pods' addresses, as a,b,c (default: the JobSet's names for them)
HELP
    common_usage
}

own_flag() { :; }
take_words "$@"
job="${POD_JOB:-}" nodes="${POD_NODES:-}" slots="${POD_SLOTS:-}" pod_index="${JOB_COMPLETION_INDEX:-}"
[[ "$nodes" =~ ^[1-9][0-9]*$ && "$slots" =~ ^[1-9][0-9]*$ && "$pod_index" =~ ^[0-9]+$ ]] \
    || fail "POD_NODES='$nodes', POD_SLOTS='$slots' and JOB_COMPLETION_INDEX='$pod_index' must be numbers"
[[ -n "$print" || -n "${TRIFOLD_SECRET:-}" ]] || fail "TRIFOLD_SECRET is not set: create the Secret that launch/kubernetes.sh names"
hosts="${POD_HOSTS:-}"
if [[ -z "$hosts" ]]; then
    [[ -n "$job" ]] || fail "POD_JOB or POD_HOSTS is needed"
    for ((index = 0; index < nodes; index++)); do
        hosts+="${hosts:+,}$job-node-0-$index.$job"
    done
fi
master="${hosts%%,*}"
export NODE_RANK="$pod_index" MASTER_PORT="${MASTER_PORT:-29500}"
report_port="${REPORT_PORT:-29501}"
supervisor+=(--restarts 0) # the JobSet restarts all pods
((${POD_RESTART:-0} == 0)) || supervisor+=(--continue)
if ((pod_index == 0)); then
    supervisor+=(--address "$master" --report-port "$report_port")
else
    supervisor+=(--join "$master:$report_port")
fi
supervisor+=(--master "$master" --processes "$((nodes * slots))")
supervise bash "$here/node.sh" "$hosts" "$slots" '{master}' '{port}'
