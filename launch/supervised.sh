# shellcheck shell=bash
# Sourced by the scripts that start a recipe: their common flags and words, and the start itself.
# In: $script, its name, and $here, the folder of launch/. After take_words "$@": $print, $supervisor (words for tools.supervise), $recipe, $recipe_flags.

: "${script:?}" "${here:?}"

fail() {
    echo "launch/$script: $1 (--help shows the usage)" >&2
    exit 2
}

# The flags that every script has, for its usage.
common_usage() {
    cat << 'HELP'
  --print         print the command instead of running it
  --help          this text
Supervision (`python -m tools.supervise --help` says more of each):
  --restarts N, --backoff-seconds S          how often and when a lost job starts again from its last checkpoint
  --stall-steps K, --stall-floor-seconds S, --start-seconds S, --long-seconds S      when it counts as hanging
  --stop-seconds S                           for a last save when asked to end
  --no-preflight                             start without looking at the machines first
FLAGS follow the recipe: --out-dir DIR, --resume, --max-steps N, --dry-run; `python RECIPE --help` lists them.

Uses the active virtual or conda environment, or makes .venv (launch/venv.sh). Variables: launch/env.sh.
Exit: 0 trained to the end, 2 a wrong recipe or flag, 3 numbers that make going on useless, 75 left on request, 1 gave up.
HELP
}

# Sorts the words before the recipe. own_flag NAME VALUE, a function of the script, takes the script's own; it gives how many
# words it took, in $took, or 0 for a flag that it does not know.
take_words() {
    print="" supervisor=() recipe_flags=()
    while (($#)); do
        took=0
        own_flag "$@"
        if ((took)); then
            shift "$took"
            continue
        fi
        case "$1" in
            --restarts | --backoff-seconds | --stall-steps | --stall-floor-seconds | --start-seconds | --long-seconds | --stop-seconds)
                [[ "${2:-}" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "$1 needs a number, got '${2:-}'"
                supervisor+=("$1" "$2")
                shift 2
                ;;
            --no-preflight) supervisor+=("$1") && shift ;;
            --print) print=yes && shift ;;
            -h | --help) usage && exit 0 ;;
            -*) fail "unknown flag $1 before the recipe" ;;
            *) break ;;
        esac
    done
    (($#)) || fail "which recipe?"
    recipe="$1" && shift
    [[ -f "$recipe" ]] || fail "there is no file $recipe"
    recipe_flags=("$@")
}

# The environment of a run, then the supervisor in place of this shell: signals reach it, and its exit code is the script's.
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

# The words as a shell reads them; those without anything special stay as they are.
quote() {
    local word line=""
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./{}-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="${line:+ }$word"
    done
    printf '%s' "$line"
}
