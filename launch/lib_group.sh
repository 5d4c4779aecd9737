# shellcheck shell=bash
# Library: run_in_group COMMAND... runs it in a process group of its own and leaves no process of it behind
# (tools/supervise/process_group.py, which knows processes by more than their numbers). Passes signals on.

process_group="$(dirname "${BASH_SOURCE[0]}")/../tools/supervise/process_group.py"

run_in_group() {
    local status=0
    "$(command -v python || command -v python3)" "$process_group" "$@" < /dev/null &
    trap 'kill -TERM %% 2> /dev/null' TERM HUP # the job, not its number: bash knows whether it has ended
    trap 'kill -INT %% 2> /dev/null' INT
    wait %% || status=$?
    while kill -0 %% 2> /dev/null; do # a signal ended the wait, not the job
        status=0
        wait %% || status=$?
    done
    trap - INT TERM HUP
    return "$status"
}
