# shellcheck shell=bash
# Library: run_in_group COMMAND... runs it in a process group of its own and leaves no process of it behind.
# On SIGTERM the single-node `deepspeed` runner exits alone and orphans its workers, which keep the GPUs.

# Ends the group: SIGTERM, so that ranks may finish a checkpoint, and SIGKILL after STOP_SECONDS (60).
stop_group() {
    local group="$1" seconds
    kill -TERM -- "-$group" 2> /dev/null || return 0
    for ((seconds = 0; seconds < ${STOP_SECONDS:-60} * 5; seconds++)); do
        kill -0 -- "-$group" 2> /dev/null || return 0
        sleep 0.2
    done
    kill -KILL -- "-$group" 2> /dev/null || true
}

run_in_group() {
    local group status=0
    set -m # job control: the next background job gets a process group
    "$@" < /dev/null &
    group=$!
    set +m
    # shellcheck disable=SC2064 # expand now: the variable is out of scope when the trap runs
    trap "trap '' INT TERM HUP; stop_group $group; exit 143" TERM HUP
    # shellcheck disable=SC2064
    trap "trap '' INT TERM HUP; stop_group $group; exit 130" INT
    wait "$group" || status=$?
    trap - INT TERM HUP
    stop_group "$group" # ranks that outlived the launcher
    return "$status"
}
