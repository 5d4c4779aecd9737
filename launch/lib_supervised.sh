# shellcheck shell=bash
# Library of the scripts that start a recipe: their common flags, the parsing of their words, and the start itself.
# Needs $script, the script's name, and $here, the folder of launch/. take_words "$@" sets $print, $supervisor (words for
# tools.supervise), $recipe and $recipe_flags.

: "${script:?}" "${here:?}"

fail() {
    echo "launch/$script: $1 (--help shows the usage)" >&2
    exit 2
}

# Prints the flags that every script has, for its usage.
common_usage() {
    cat << 'HELP'
  --print         print the command instead of running it
  --help          this text
Supervision (more in `python -m tools.supervise --help`):
  --restarts N             give up after N restarts in a row without a new checkpoint
  --backoff-seconds S      wait before the first restart; doubles with each
  --hang-seconds S         restart after S without progress in a step (and at least 10 median steps)
  --long-phase-seconds S   the same for a start, an evaluation and a save
  --stop-seconds S         for the last save when asked to stop
  --no-preflight           start without checking the machines
FLAGS follow the recipe: --out-dir DIR, --resume, --max-steps N, --dry-run; `python RECIPE --help` lists them.

Uses the active virtual or conda environment, or makes .venv (launch/venv.sh). Variables: launch/env.sh.
Exit: 0 trained to the end, 1 gave up, 2 configuration error, 3 diverged, 75 stopped on request.
HELP
}

# Parses the words before the recipe. own_flag NAME VALUE, a function of the script, handles the script's own flags: it sets $took
# to the number of words it used, and leaves it 0 for a flag that it does not know.
take_words() {
    local word
    print="" supervisor=() recipe_flags=()
    for word in "$@"; do
        [[ "$word" != *[[:cntrl:]]* ]] || fail "a word with a newline or another control character: $(printf '%q' "$word")"
    done
    while (($#)); do
        took=0
        own_flag "$@"
        if ((took)); then
            shift "$took"
            continue
        fi
        case "$1" in
            --restarts | --backoff-seconds | --hang-seconds | --long-phase-seconds | --stop-seconds)
                [[ "${2:-}" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "$1 needs a number, got '${2:-}'"
                supervisor+=("$1" "$2")
                shift 2
                ;;
            --no-preflight) supervisor+=("$1") && shift ;;
            --print) print=yes && shift ;;
            -h | --help)
                usage || true # its reader may be gone (`| head`)
                exit 0
                ;;
            -*) fail "unknown flag $1 before the recipe" ;;
            *) break ;;
        esac
    done
    (($#)) || fail "which recipe?"
    recipe="$1" && shift
    [[ -f "$recipe" ]] || fail "there is no file $recipe"
    recipe_flags=("$@")
}

# Sets the environment of a run, then replaces this shell by the supervisor: signals reach it, and its exit code is the script's.
# Arguments: the launcher's words.
supervise() {
    local command=(python "$(dirname "$here")/tools/supervise/__main__.py" "${supervisor[@]}" --launcher "$(quote "$@")" "$recipe" "${recipe_flags[@]}")
    if [[ -n "$print" ]]; then
        quote "${command[@]}"
        echo
        exit 0
    fi
    # shellcheck source=launch/venv.sh
    source "$here/venv.sh"
    # shellcheck source=launch/env.sh
    source "$here/env.sh"
    exec "${command[@]}"
}

# Prints the words as a shell would read them, quoting only those that need it.
quote() {
    local word line=""
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./{}-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="${line:+ }$word"
    done
    printf '%s' "$line"
}
