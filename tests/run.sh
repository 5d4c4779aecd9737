#!/usr/bin/env bash
# Everything CI checks: bash tests/run.sh [pytest arguments], as in `bash tests/run.sh -k schedules`; -n 0 for one process.
# Runs in the active environment, or in .venv, which it makes (launch/venv.sh). Exit 0: all good.
set -euo pipefail

CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
# shellcheck source=launch/env.sh
source launch/env.sh

# Three processes collect the tests and dozens of programs start: each would compile every module again.
unset PYTHONDONTWRITEBYTECODE

failed=()
ruff check . || failed+=("ruff check")
ruff format --check . || failed+=("ruff format: run it and look at the difference")
scripts=(launch/*.sh launch/*.sbatch tests/*.sh .ci/run)
for script in "${scripts[@]}"; do
    bash -n "$script" || failed+=("bash -n $script")
done
if command -v shellcheck > /dev/null; then
    shellcheck -x "${scripts[@]}" || failed+=("shellcheck")
else
    echo "shellcheck is not installed: the scripts were only parsed"
fi

python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder "$@" || failed+=("pytest")

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
