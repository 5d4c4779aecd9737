# shellcheck shell=bash
# Sourced: makes `python` one that has everything in requirements.txt.
# Uses an active virtual environment, or a conda environment other than base, as it is, and installs nothing there.
# Otherwise creates .venv in the repository root, and reuses it until requirements.txt changes.
# pip's own variables and configuration (index, proxy, certificate) apply.

repository="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Prints the first Python that is 3.11 or newer.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "launch/venv.sh: needs Python 3.11 or newer on the PATH; found none" >&2
    return 1
}

# Creates .venv if it is missing, and installs requirements.txt if it differs from what was installed.
fill_venv() {
    local venv="$repository/.venv" stamp="$repository/.venv/requirements.txt" creator
    if [[ ! -x "$venv/bin/python" ]]; then
        creator="$(find_python)" || return 1
        echo "creating $venv with $creator" >&2
        if ! "$creator" -m venv "$venv"; then
            echo "launch/venv.sh: '$creator -m venv' failed; on Debian and Ubuntu install python3-venv" >&2
            return 1
        fi
    fi
    if ! cmp -s "$repository/requirements.txt" "$stamp"; then # copied last, so an interrupted install is repeated
        echo "installing requirements.txt into $venv (once; some minutes)" >&2
        "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -r "$repository/requirements.txt" >&2 || return 1
        cp "$repository/requirements.txt" "$stamp"
    fi
}

# Fails if the active environment has no Python, an old one, or lacks a package, and says how to mend it.
check_active() {
    local folder="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if ! command -v python > /dev/null; then
        echo "launch/venv.sh: the active environment $folder has no python on the PATH; activate it again, or \`deactivate\` to" \
            "have .venv made for you" >&2
        return 1
    fi
    python - << 'CHECK' >&2
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit(f"launch/venv.sh: {sys.prefix} has Python {sys.version.split()[0]}, and 3.11 or newer is needed: activate another "
             "environment, or `deactivate` to have .venv made for you")
missing = [name for name in ("torch", "deepspeed", "transformers", "sentencepiece") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"launch/venv.sh: {sys.prefix} has no {', '.join(missing)}: "
             "run `python -m pip install -r requirements.txt`, or `deactivate` to have .venv made for you")
CHECK
}

if [[ -n "${VIRTUAL_ENV:-}" || (-n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base) ]]; then
    check_active || return 1
else
    fill_venv || return 1
    # shellcheck source=/dev/null
    source "$repository/.venv/bin/activate"
fi
