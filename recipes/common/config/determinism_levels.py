"""Says what each level of determinism promises, and which environment variables break that.

A level is the recipe's word on what a rerun repeats. Each promises what those before it do:

    "order"           what each step reads, the initial weights, and what dropout draws. Costs nothing: every run has it
    "rounding"        in the same layout, every number but for rounding: nothing lowers the precision of sums or products
    "bitwise"         in the same layout, with the same packages on machines of one kind, every bit
    "bitwise_stages"  every bit also with another number of pipeline stages, another schedule, partition or recomputation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from recipes.common.recipe import DETERMINISM

ORDER, ROUNDING, BITWISE, BITWISE_STAGES = DETERMINISM
OFF = ("", "0", "false", "off", "no")
# variables that lower precision -> the values with which they do not
_LOWERS_PRECISION = {
    "NVIDIA_TF32_OVERRIDE": OFF,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": OFF,
    "CUBLAS_EMULATE_SINGLE_PRECISION": OFF,
    "CUBLAS_EMULATE_DOUBLE_PRECISION": OFF,
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "strict"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "strict"),
    "TRITON_F32_DEFAULT": ("", "ieee"),
}
# variables that make the choice or the order of sums another from start to start
_VARIES = {
    "OMP_DYNAMIC": OFF,
    "PYTORCH_TUNABLEOP_ENABLED": OFF,
    "TORCHINDUCTOR_MAX_AUTOTUNE": OFF,
    "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": OFF,
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": OFF,
    "NCCL_NVLS_ENABLE": OFF,  # sums in the switch
    "NCCL_COLLNET_ENABLE": OFF,
    "USE_HUB_KERNELS": OFF,  # kernels that another day's download may replace
}
_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which its sums have one order
_ALGORITHMS = (
    "ring",
    "tree",
)  # of NCCL, one of which must be fixed: else it chooses by what it finds of the network


def promises(level: str, other: str) -> bool:
    """Whether a level promises what `other` does."""
    return DETERMINISM.index(level) >= DETERMINISM.index(other)


def environment_problems(level: str, environment: Mapping[str, str], *, gpu: bool, ranks: int, attention: str) -> list[str]:
    """Return each variable that breaks what a level promises, with the cure. gpu: whether ranks have one."""
    broken = []
    if promises(level, ROUNDING):
        broken += list(_set_wrongly(environment, _LOWERS_PRECISION, "lowers the precision of sums or products"))
    if promises(level, BITWISE):
        broken += list(_set_wrongly(environment, _VARIES, "lets the order of sums change from start to start"))
        if gpu:
            broken += list(_needed_on_gpus(environment, ranks, attention))
    return [f"determinism={level!r}: {text}" for text in broken]


def _set_wrongly(environment: Mapping[str, str], rules: Mapping[str, tuple[str, ...]], what: str) -> Iterator[str]:
    for name, harmless in rules.items():
        if environment.get(name, "").strip().lower() not in ("", *harmless):
            yield f"the environment's {name}={environment[name]} {what}; unset {name}"


def _needed_on_gpus(environment: Mapping[str, str], ranks: int, attention: str) -> Iterator[str]:
    workspace = environment.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace not in _WORKSPACES:
        found = f"={workspace}" if workspace else " is not set"
        yield f"the environment's CUBLAS_WORKSPACE_CONFIG{found}: cuBLAS would split sums differently; export it as :4096:8"
    algorithm = environment.get("NCCL_ALGO", "")
    if ranks > 1 and algorithm.lower() not in _ALGORITHMS:
        found = f"={algorithm}" if algorithm else " is not set"
        yield f"the environment's NCCL_ALGO{found}: NCCL would choose how it sums at each start; export it as Ring or Tree"
    if attention.startswith("flash_attention") and environment.get("FLASH_ATTENTION_DETERMINISTIC") != "1":
        yield (
            f"attention={attention!r}: its backward pass sums in any order; export FLASH_ATTENTION_DETERMINISTIC=1, or use "
            "attention='sdpa'"
        )
