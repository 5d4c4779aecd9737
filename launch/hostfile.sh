#!/usr/bin/env bash
# One recipe on several machines, through the deepspeed launcher, pdsh and ssh.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=hostfile.sh
# shellcheck source=launch/supervised.sh
source "$here/supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/hostfile.sh [OPTIONS] RECIPE [FLAGS of the recipe]

Trains RECIPE (a file) on the machines of a hostfile, from one that reaches them all by ssh without a password. Repository,
environment, data and --out-dir lie at the same paths on all of them; --out-dir on a file system that they share.
  --hostfile FILE   lines of `HOST slots=RANKS` (default: hostfile); read anew at every restart, so hosts may come and go
  --spares N        hosts that stay idle until another does not answer
  --min-hosts N     go on with as few as N, where the recipe has a layout for that many ranks (default: all but the spares)
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
# a dead line is given up in 10 s, and a host that does not answer in 10: ssh's own patience is minutes
export PDSH_SSH_ARGS_APPEND="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2 ${PDSH_SSH_ARGS_APPEND:-}"
supervisor+=(--hostfile "$hostfile" --probe 'ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true')
supervise deepspeed --hostfile '{hostfile}' --no_ssh_check '{force_multi}' --master_addr '{master}' --master_port '{port}'
