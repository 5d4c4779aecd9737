# shellcheck shell=bash
# Sets the environment variables of every run, in this one place. Sourced by the other scripts; may be sourced by hand.
# Variables that are already set keep their value. They concern the machine and its network, never what is learned.

# One thread a process: a rank computes on one core or on its GPU; more threads would compete for the cores of other ranks.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A run reads local folders only. A thousand ranks asking the hub for a tokenizer are rate-limited, or hang without a network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"

# The fast tokenizers' threads warn, and can hang, after a fork; we use processes instead.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Print every thread's stack on a segmentation fault or an abort inside a library.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# DeepSpeed's compiled extensions belong to one environment: in a shared folder, another environment's build or the stale lock
# of a killed build would block this one silently.
if [[ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]]; then
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${VIRTUAL_ENV:-$CONDA_PREFIX}/torch_extensions}"
fi

# By default glibc returns large blocks at each free, and the kernel zeroes them again at each allocation. Keeping them made a
# CPU step of a 7M-parameter llama 9% faster for 14% more memory (2-core CPU, torch 2.13, one thread, 0.87 s -> 0.79 s).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2147483648}"

# Let segments grow instead of allocating new ones: less GPU memory is lost to fragmentation.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# NCCL reports why a connection failed, and nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Each rank finds gloo's interface itself (recipes/common/runtime/network.py): it differs between hosts, and a host's name may
# resolve to loopback. GLOO_SOCKET_IFNAME overrides it.

# Variables that other hosts get: pdsh passes none by itself. No keys: its command line is logged and visible to all users.
TRIFOLD_EXPORTS="$(compgen -e | grep -E '^(OMP_|HF_|TOKENIZERS_|PYTHONFAULT|TORCH_EXT|MALLOC_|PYTORCH_|NCCL_|TORCH_NCCL_|GLOO_|DS_ACCELERATOR|WANDB_MODE)' | tr '\n' ' ')"
export TRIFOLD_EXPORTS
