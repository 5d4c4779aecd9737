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

# gloo (CPU runs, and the control messages of GPU runs) takes the address that the host name resolves to, which is 127.0.1.1
# on many machines, or nothing in a container. On one machine: loopback (`machines=one` before sourcing). On several: NCCL's
# interface where the user named a single one, else that of the default route. NCCL's own choice is good, so it is left alone.
if [[ -z "${GLOO_SOCKET_IFNAME:-}" ]]; then
    if [[ "${machines:-several}" == one ]]; then
        [[ ! -d /sys/class/net/lo ]] || export GLOO_SOCKET_IFNAME=lo
    elif [[ "${NCCL_SOCKET_IFNAME:-}" =~ ^=?([A-Za-z0-9._-]+)$ && -d "/sys/class/net/${BASH_REMATCH[1]}" ]]; then
        export GLOO_SOCKET_IFNAME="${BASH_REMATCH[1]}"
    elif [[ -r /proc/net/route ]]; then
        # the kernel's routing table, as `ip` need not be installed: interface, destination (0: the default route), ...
        while read -r interface destination _; do
            if [[ "$destination" == 00000000 ]]; then
                export GLOO_SOCKET_IFNAME="$interface"
                break
            fi
        done < /proc/net/route
        unset interface destination
    fi
fi
