#!/usr/bin/env bash
# Trains a recipe on several machines, through the deepspeed launcher, pdsh and ssh.
set -euo pipefail

here="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=hostfile.sh
# shellcheck source=launch/lib_supervised.sh
source "$here/lib_supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/hostfile.sh [OPTIONS] RECIPE [FLAGS of the recipe]

Trains RECIPE (a file) on the machines of a hostfile. This machine must reach them all by ssh without a password. Repository,
environment, data and --out-dir have the same paths on all of them; --out-dir is on a file system that they share.
  --hostfile FILE   lines of `HOST slots=RANKS` (default: hostfile); read again at every restart, so hosts may come and go
  --spares N        keep N hosts idle until another does not answer
  --min-hosts N     continue with as few as N hosts, if the recipe has a layout for their ranks (default: all but the spares)
HELP
    common_usage
}

hostfile=hostfile
own_flag() {
    case "$1" in
        --hostfile)
            [[ -n "${2:-}" ]] || fail "--hostfile needs a file"
            hostfile="$2"
            ;;
        --spares | --min-hosts)
            [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "$1 needs a number, got '${2:-}'"
            supervisor+=("$1" "$2")
            ;;
        *) return 0 ;;
    esac
    took=2
}

take_words "$@"
[[ -e "$hostfile" ]] || fail "there is no hostfile $hostfile"
# give up a dead connection, and a host that does not answer, after 10 s: ssh itself waits for minutes
export PDSH_SSH_ARGS_APPEND="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2 ${PDSH_SSH_ARGS_APPEND:-}"
supervisor+=(--hostfile "$hostfile" --probe 'ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true')
# DeepSpeed would put these on pdsh's command line, passwords included
unset "${!MLFLOW_@}"
# from /: DeepSpeed writes the current folder into what the other hosts' shells read; {packed} knows the true one
supervise env --chdir=/ deepspeed --log_level "${TRIFOLD_LAUNCHER_LOG_LEVEL:-error}" --hostfile '{hostfile}' --no_ssh_check '{force_multi}' --master_addr '{master}' --master_port '{port}' '{packed}'
