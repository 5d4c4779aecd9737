"""Tools fork their ranks from a process that knows of GPUs and has not started CUDA: no variable has to be set by hand."""

import os
import subprocess
import sys

import pytest
import torch

from recipes.common.recipe import ROOT

TOOLS = (
    "tools.verify.__main__",
    "tools.throughput.measure",
    "tools.spikes.replay",
    "tools.plan.calibrate",
    "tools.preflight.__main__",
)
MACHINE = """
import importlib, sys
import torch
started = []
def starts_cuda(*_):
    started.append(sys._getframe(1).f_code.co_name)
    return 8
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = starts_cuda
torch._C._cuda_getCurrentRawStream = None  # as a CUDA build has it
torch.cuda._device_count_nvml = lambda: 8
for name in sys.argv[1:]:
    importlib.import_module(name)
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name(), torch.cuda.is_available(), torch.cuda.device_count(), started)
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="the machine with 8 GPUs is made of torch's CPU build")
def test_importing_a_tool_starts_no_cuda():
    """Where NVML counts 8 GPUs, and every call that would start the driver is recorded."""
    kept = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK")}
    command = [sys.executable, "-c", MACHINE, *TOOLS, "recipes.common.train"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept)
    assert done.stdout.splitlines()[-1:] == ["cuda True 8 []"], done.stderr
