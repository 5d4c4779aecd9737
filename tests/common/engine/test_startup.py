"""A rank's start: the device that it was told, whatever DeepSpeed found, and errors that name the cure."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from recipes.common.engine.startup import start_distributed, use_accelerator
from recipes.common.recipe import RecipeError
from tests.support.nvidia import plant_nvidia_smi
from tools.common.forked_ranks import run_ranks


def test_deepspeed_works_on_the_device_that_it_is_told():
    """verify --device cpu on a machine whose GPUs DeepSpeed found when it was imported, and the other way round."""
    assert run_ranks(_accelerators, 1) == [["cuda", "cpu", "cpu"]]


def _accelerators():
    found = []
    for device in ("cuda", "cpu"):
        use_accelerator(device)
        found.append(get_accelerator().device_name())
    start_distributed("cpu")
    return [*found, get_accelerator().device_name()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU can be used")
def test_a_gpu_that_cannot_be_used_is_an_error_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", plant_nvidia_smi(tmp_path, count=8))
    [error] = run_ranks(_error_on_cuda, 1)
    assert error.startswith(
        "cuda:0, by LOCAL_RANK, cannot be used:\n  - nvidia-smi lists 8 GPUs (NVIDIA H100 80GB HBM3, driver 535.54.03), but torch"
    )


def _error_on_cuda():
    try:
        start_distributed("cuda")
    except RecipeError as error:
        return str(error)
