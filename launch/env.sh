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

# Variables that other hosts get, where they are set: pdsh passes none by itself. Names in full and no keys (no HF_TOKEN, no
# WANDB_API_KEY), since its command line is seen by all users: keys belong into files of the hosts, as `wandb login` and
# `hf auth login` write them. DeepSpeed adds all NCCL_*, UCX* and PYTHON*. More: in .deepspeed_env.
TRIFOLD_EXPORTS="OMP_NUM_THREADS HF_HOME HF_HUB_OFFLINE HF_DATASETS_OFFLINE TOKENIZERS_PARALLELISM PYTHONFAULTHANDLER
    TORCH_EXTENSIONS_DIR MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
    GLOO_SOCKET_IFNAME DS_ACCELERATOR WANDB_MODE
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_TRACE_BUFFER_SIZE
    TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_HIGH_PRIORITY
    NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_DEBUG_FILE NCCL_SOCKET_IFNAME NCCL_SOCKET_FAMILY NCCL_SOCKET_NTHREADS NCCL_NSOCKS_PERTHREAD
    NCCL_IB_HCA NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_TC NCCL_IB_SL NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_IB_QPS_PER_CONNECTION
    NCCL_IB_PCI_RELAXED_ORDERING NCCL_IB_ADAPTIVE_ROUTING NCCL_IB_SPLIT_DATA_ON_QPS NCCL_NET NCCL_NET_PLUGIN NCCL_NET_GDR_LEVEL
    NCCL_NET_GDR_READ NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE NCCL_CROSS_NIC NCCL_ALGO NCCL_PROTO NCCL_BUFFSIZE
    NCCL_NTHREADS NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MAX_CTAS NCCL_NVLS_ENABLE NCCL_CUMEM_ENABLE
    NCCL_TOPO_FILE NCCL_TUNER_PLUGIN NCCL_COLLNET_ENABLE NCCL_LAUNCH_MODE NCCL_CTA_POLICY"
export TRIFOLD_EXPORTS
