"""GPUs that nvidia-smi lists and torch does not see are an error that names both, unless the user wants the CPU."""

import pytest
import torch

from recipes.common.recipe import ROOT
from recipes.common.runtime.gpus import list_gpus, unusable_gpus_text, unused_gpus
from tests.support.nvidia import plant_nvidia_smi
from tests.support.small_runs import call_file


def test_gpus_that_torch_cannot_use_are_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", plant_nvidia_smi(tmp_path, count=8, driver="470.82.01"))
    monkeypatch.setattr(torch.version, "cuda", None)
    problem = unused_gpus("cpu", {})
    assert problem.startswith("nvidia-smi lists 8 GPUs (NVIDIA H100 80GB HBM3, driver 470.82.01), but torch ")
    assert "is a build for the CPU" in problem and "DS_ACCELERATOR=cpu" in problem
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, can use none: the driver is too old" in unused_gpus("cpu", {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.mark.parametrize(
    ("device", "environment"),
    [
        ("cuda", {}),
        ("cpu", {"DS_ACCELERATOR": "cpu"}),
        ("cpu", {"CUDA_VISIBLE_DEVICES": ""}),
        ("cpu", {"CUDA_VISIBLE_DEVICES": "-1"}),
    ],
)
def test_what_the_user_wants_is_no_problem(tmp_path, monkeypatch, device, environment):
    monkeypatch.setenv("PATH", plant_nvidia_smi(tmp_path, count=8))
    assert unused_gpus(device, environment) is None


def test_a_machine_without_gpus_has_none_to_use(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() is None and unused_gpus("cpu", {}) is None
    monkeypatch.setenv("PATH", plant_nvidia_smi(tmp_path, count=0))
    assert list_gpus() is None and unused_gpus("cpu", {}) is None
    monkeypatch.setenv("PATH", plant_nvidia_smi(tmp_path, count=2, exit_code=9))  # "couldn't communicate with the driver"
    assert list_gpus() is None and unused_gpus("cpu", {}) is None


def test_one_gpu_is_singular():
    assert unusable_gpus_text(["T4"], "1", "2", None).startswith("nvidia-smi lists 1 GPU (T4, driver 1), but torch 2 is ")


def test_a_run_does_not_fall_back_to_the_cpu(tmp_path):
    """As a user starts it; the first rank of each host says so."""
    place = {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    found = {"PATH": plant_nvidia_smi(tmp_path, count=2), "DS_ACCELERATOR": None, "CUDA_VISIBLE_DEVICES": None}
    done = call_file(ROOT / "recipes" / "quickstart.py", "--out-dir", tmp_path / "run", **place, **found)
    assert done.code == 2, done.err
    assert "nvidia-smi lists 2 GPUs (NVIDIA H100 80GB HBM3, driver 535.54.03), but torch" in done.err
    assert not (tmp_path / "run").exists()
