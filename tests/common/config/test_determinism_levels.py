"""Each level of determinism promises what the one before does, and names the variable that breaks it."""

from __future__ import annotations

import pytest

from recipes.common.config.determinism_levels import environment_problems, promises
from recipes.common.recipe import DETERMINISM

GOOD = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "1"}


def problems(level: str, environment: dict[str, str], *, gpu: bool = True, ranks: int = 8, attention: str = "sdpa") -> list[str]:
    return environment_problems(level, environment, gpu=gpu, ranks=ranks, attention=attention)


def test_the_levels_are_a_ladder() -> None:
    table = [[promises(level, other) for other in DETERMINISM] for level in DETERMINISM]
    assert table == [[column <= row for column in range(4)] for row in range(4)]


@pytest.mark.parametrize("level", DETERMINISM)
def test_a_good_environment(level: str) -> None:
    assert problems(level, GOOD) == [] and problems(level, {}, gpu=False) == []
    assert (
        problems(level, GOOD | {"NVIDIA_TF32_OVERRIDE": "0", "OMP_DYNAMIC": "FALSE", "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT"})
        == []
    )


@pytest.mark.parametrize(
    ("name", "value", "from_level"),
    [
        ("NVIDIA_TF32_OVERRIDE", "1", "rounding"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "rounding"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "rounding"),
        ("TRITON_F32_DEFAULT", "tf32", "rounding"),
        ("OMP_DYNAMIC", "true", "bitwise"),
        ("PYTORCH_TUNABLEOP_ENABLED", "1", "bitwise"),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1", "bitwise"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1", "bitwise"),
        ("NCCL_NVLS_ENABLE", "2", "bitwise"),
        ("NCCL_ALGO", "NVLS", "bitwise"),
        ("NCCL_ALGO", "Ring,Tree", "bitwise"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", "bitwise"),
    ],
)
def test_a_variable_is_named_from_the_level_on_that_it_breaks(name: str, value: str, from_level: str) -> None:
    found = {level: problems(level, GOOD | {name: value}) for level in DETERMINISM}
    assert [level for level in DETERMINISM if found[level]] == list(DETERMINISM[DETERMINISM.index(from_level) :])
    assert all(f"determinism={level!r}" in text and f"{name}={value}" in text for level, lines in found.items() for text in lines)


def test_what_a_gpu_needs_is_asked_of_gpus_alone() -> None:
    assert [text.split("'s ")[1].split()[0] for text in problems("bitwise", {})] == ["CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"]
    assert len(problems("bitwise", {}, ranks=1)) == 1  # alone, nothing is summed over ranks
    (flash,) = problems("bitwise", GOOD, attention="flash_attention_2")
    assert "FLASH_ATTENTION_DETERMINISTIC=1" in flash
    assert problems("bitwise", GOOD | {"FLASH_ATTENTION_DETERMINISTIC": "1"}, attention="flash_attention_2") == []
