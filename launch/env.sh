# shellcheck shell=bash
# Environment variables of every run: the only place they are set. Sourced by the other scripts, for `source` by hand too.
# What the user has set stays. About the machine and its network, never about what is learned.

# One thread for each process: a rank computes on one core or on its GPU, and its workers would fight for the others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A run reads local folders only. A thousand ranks that ask the hub about a tokenizer are refused, or hang without network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"

# The fast tokenizers' own threads warn, and can hang, after a fork; several processes are used instead.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# A stack of every thread on a segmentation fault or an abort inside a library.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# Extensions that DeepSpeed compiles belong to one environment: shared, another one's build, or the stale lock of a killed
# build, would stop this one in silence.
if [[ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]]; then
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${VIRTUAL_ENV:-$CONDA_PREFIX}/torch_extensions}"
fi

# glibc gives memory over a threshold back at each free, and the kernel clears it again at each allocation. Kept, a CPU step
# of a 7M-parameter llama took 9% less time for 14% more memory (2-core CPU, torch 2.13, one thread, 0.87 s -> 0.79 s).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2147483648}"

# Segments that grow instead of new ones: less GPU memory is lost between blocks of changing sizes.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# NCCL says why a connection failed, and nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# gloo's interface is each rank's own choice (recipes/common/runtime/network.py): it differs between hosts, and the host's name may say
# loopback. GLOO_SOCKET_IFNAME, where set, holds.

# What goes to other hosts: pdsh hands over nothing by itself. No keys: its command line is logged, and seen by all.
TRIFOLD_EXPORTS="$(compgen -e | grep -E '^(OMP_|HF_|TOKENIZERS_|PYTHONFAULT|TORCH_EXT|MALLOC_|PYTORCH_|NCCL_|TORCH_NCCL_|GLOO_|DS_ACCELERATOR|WANDB_MODE)' | tr '\n' ' ')"
export TRIFOLD_EXPORTS
