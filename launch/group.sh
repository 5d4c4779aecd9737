# shellcheck shell=bash
# Sourced: run_in_group COMMAND... runs it in a process group of its own, and leaves no process of it behind.
# The single-node `deepspeed` runner that gets SIGTERM dies alone and orphans its workers, which keep the GPUs.

# Ends the group: politely, so that ranks may finish a checkpoint, and after STOP_SECONDS (60) for good.
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
    # shellcheck disable=SC2064 # the group is known now, and gone from scope later
    trap "trap '' INT TERM HUP; stop_group $group; exit 143" TERM HUP
    # shellcheck disable=SC2064
    trap "trap '' INT TERM HUP; stop_group $group; exit 130" INT
    wait "$group" || status=$?
    trap - INT TERM HUP
    stop_group "$group" # ranks that outlived the launcher
    return "$status"
}
