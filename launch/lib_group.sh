# shellcheck shell=bash
# Library: run_in_group COMMAND... runs it in a process group of its own and leaves no process of it behind
# (tools/supervise/process_group.py, which knows processes by more than their numbers). Passes signals on.

process_group="$(dirname "${BASH_SOURCE[0]}")/../tools/supervise/process_group.py"

run_in_group() {
    local status=0 job asked=yes
    "$(command -v python || command -v python3)" "$process_group" "$@" < /dev/null &
    job=$!
    trap 'asked=yes; kill -TERM %% 2> /dev/null' TERM HUP # the job, not its number: bash knows whether it has ended
    trap 'asked=yes; kill -INT %% 2> /dev/null' INT
    while [[ -n "$asked" ]]; do # a signal ends the wait, not the job
        asked="" status=0
        wait "$job" || status=$?
    done
    trap - INT TERM HUP
    return "$status"
}
