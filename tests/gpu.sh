#!/usr/bin/env bash
# What a CPU cannot show, on this machine's GPUs: bash tests/gpu.sh [1|2|8] [flags of python -m tests.gpu]
# Under 8 minutes; a call that was stopped is continued by the same call. Results: runs/gpu_tier_N/results.{json,html}.
# Exit 0: all was run and nothing failed; 1: a check failed, or no time was left for one; 2: the call was wrong.
set -euo pipefail

CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
# shellcheck source=launch/env.sh
source launch/env.sh
exec python -m tests.gpu "$@"
