#!/usr/bin/env bash
# From nothing to generated text: tokenizer, shards, 3D training, export to Hugging Face, a sample.
set -euo pipefail

usage() {
    cat << 'HELP'
usage: bash launch/quickstart.sh [--steps N] [--out DIR] [--processes N] [--print]

Trains recipes/quickstart.py on the sources of Python's standard library, and samples from the model. It takes the GPUs that
nvidia-smi lists (of them 8, 4, 2 or 1), and the CPU where there are none or with DS_ACCELERATOR=cpu.
  --steps N       stop after N steps (default: the recipe's)
  --out DIR       run directory (default: runs/quickstart, then runs/quickstart-2, ...)
  --processes N   ranks (default: a GPU each; on CPU 8, as tensor 2 x pipeline 2 x data 2)
  --print         print the commands instead of running them
  --help          this text

A second run reuses the environment (.venv), the tokenizer and the shards (runs/quickstart_data).
HELP
}

fail() {
    echo "launch/quickstart.sh: $1 (--help shows the usage)" >&2
    exit 2
}

here="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
data=runs/quickstart_data
vocabulary=4096 # tokens; at most the recipe's vocab_size

steps="" out="" processes="" print=""
while (($#)); do
    case "$1" in
        --steps | --processes)
            [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number over 0, got '${2:-}'"
            if [[ "$1" == --steps ]]; then steps="$2"; else processes="$2"; fi
            shift 2
            ;;
        --out)
            [[ -n "${2:-}" ]] || fail "--out needs a folder"
            out="$2"
            [[ "$out" == /* ]] || out="$PWD/$out"
            shift 2
            ;;
        --print) print=yes && shift ;;
        -h | --help)
            usage || true # its reader may be gone (`| head`)
            exit 0
            ;;
        *) fail "unknown flag $1" ;;
    esac
done

# Prints how many GPUs the ranks may use: those that nvidia-smi lists, or that CUDA_VISIBLE_DEVICES names.
count_gpus() {
    local listed
    [[ "${DS_ACCELERATOR:-cuda}" != cpu ]] || listed=none
    if [[ -n "${listed:-}" ]] || ! listed="$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null)" || [[ -z "$listed" ]]; then
        echo 0
    elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -cv -e '^$' -e '^-1$' || true
    else
        wc -l <<< "$listed"
    fi
}

gpus="$(count_gpus)"
if ((gpus)); then
    if [[ -z "$processes" ]]; then
        for processes in 8 4 2 1; do ((processes > gpus)) || break; done
    fi
    ((processes <= gpus)) || fail "--processes $processes needs as many GPUs, $gpus were found; DS_ACCELERATOR=cpu uses none"
    echo "found $gpus GPUs (nvidia-smi): training on $processes of them; DS_ACCELERATOR=cpu trains on the CPU" >&2
else
    processes="${processes:-8}"
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

[[ "$processes" =~ ^[1248]$ ]] || fail "--processes $processes: recipes/quickstart.py has layouts for 1, 2, 4 and 8 ranks"

cd "$root" # all paths below are relative to it, printed ones included
if [[ -z "$out" ]]; then
    out=runs/quickstart
    for ((number = 2; ; number++)); do
        [[ -e "$out" ]] || break
        out="runs/quickstart-$number"
    done
elif [[ -e "$out" && ! -d "$out" ]]; then
    fail "--out $out is a file; give a folder"
elif [[ -e "$out/checkpoints" || -e "$out/hf" ]]; then
    fail "--out $out holds an earlier run; give another folder, or remove it"
fi

# Prints or runs a command; `group` runs it in a process group of its own.
run() {
    local how="$1"
    shift
    if [[ -n "$print" ]]; then
        printf '%q ' "$@"
        echo
    elif [[ "$how" == group ]]; then
        run_in_group "$@"
    else
        "$@"
    fi
}

if [[ -z "$print" ]]; then
    # shellcheck source=launch/venv.sh
    source "$here/venv.sh"
    # shellcheck source=launch/env.sh
    source "$here/env.sh"
    # shellcheck source=launch/lib_group.sh
    source "$here/lib_group.sh"
fi
if [[ -z "$print" ]] && ((gpus)); then # before the data is prepared, which takes longer
    python -c 'import os, sys; from recipes.common.runtime.gpus import place_problems; sys.exit("\n".join(place_problems(os.environ)))' ||
        fail "this machine's GPUs cannot be used"
fi
[[ "${DS_ACCELERATOR:-}" != cpu ]] || unset CUDA_VISIBLE_DEVICES # the launcher would read it as a list of CPU slots

if [[ ! -f "$data/dataset.json" ]]; then
    sources='the standard library'
    [[ -n "$print" ]] || sources="$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
    run plain python -m tools.data prepare "$sources" --suffix .py --exclude site-packages dist-packages test tests \
        __pycache__ --train-tokenizer "$vocabulary" --validation-fraction 0.02 --bad skip --out "$data"
fi

port="${MASTER_PORT:-$((20000 + RANDOM % 20000))}" # almost always free: two runs must not share a port
training=(deepspeed --log_level "${TRIFOLD_LAUNCHER_LOG_LEVEL:-error}" --hostfile /dev/null --master_port "$port" --num_gpus "$processes" recipes/quickstart.py --out-dir "$out")
[[ -z "$steps" ]] || training+=(--max-steps "$steps")
run group "${training[@]}"

run plain python -m tools.checkpoint to-hf "$out/checkpoints/latest" "$out/hf"
run plain python -m tools.sample "$out/hf" --data "$data"
