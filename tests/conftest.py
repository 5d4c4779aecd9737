"""Set the environment before anything imports torch or DeepSpeed, and keep this process free of tensor code.

Tests that compute fork their ranks from here (tools.common.forked_ranks): a fork that inherits autograd or OpenMP threads hangs.
"""

import fcntl
import gc
import importlib
import inspect
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
gc.disable()  # until all tests are collected: what is imported stays
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the programs of the tests would inherit its deafness
os.environ.update(
    DS_ACCELERATOR=os.environ.get("DS_ACCELERATOR", "cpu"),
    OMP_NUM_THREADS="1",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402

# the longest files, begun first: one that comes last keeps one worker busy while the others have nothing left
LONG = (
    "common/pipeline/test_executor.py",
    "tools/supervise/test_supervise.py",
    "bench/test_benches.py",
    "rehearsal/test_steps.py",
    "common/checkpoint/test_resume.py",
    "tests/test_parity.py",
    "tests/test_recipes.py",
    "tools/replay/test_first_tensor.py",
    "tools/replay/test_replay.py",
    "tools/spikes/test_explain.py",
    "tools/verify/test_gate.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def pytest_collection_finish(session):
    """Import what every rank would import again on each of thousands of forks, and set it aside.

    A forked rank that collects garbage does not look at it, nor copies its pages.
    """
    if session.config.pluginmanager.hasplugin("dsession"):  # it hands tests to other processes, and runs none
        return
    if "tools.common.forked_ranks" in sys.modules:  # some test forks ranks
        import deepspeed.comm.mori  # by the first engine of a process, as the next three
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        import numpy.ma  # noqa: F401
        import pyarrow.compute  # noqa: F401  by whoever reads tensor statistics
        import torch._dynamo.repro.after_dynamo  # by the first torch.compile
        import torch.profiler._cupti_monitor  # noqa: F401
        from transformers.loss.loss_utils import LOSS_MAPPING

        from recipes.common.record import recording
        from recipes.common.run_dir import run_log
        from tests.support import forked_jobs  # noqa: F401
        from tests.support.tiny import FAMILIES

        for family in FAMILIES:  # transformers imports a model's code when it is first asked for
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")

        facts = recording.package_facts()  # of this environment, which every run would read again
        recording.package_facts = lambda: facts
        run_log.start_wandb = lambda *_: None  # WANDB_MODE has it disabled; asking it costs every run as much as a step

        re.compile(f"({'|'.join(LOSS_MAPPING)})")  # 5 ms: of the loss that its name says, in every model that is built
        inspect.getmodule(inspect.currentframe())  # keeps the file of each module, for which defining an operator asks

    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def warm():
    """A stand-in for `python` whose programs have everything imported."""
    from tests.support.warm_python import warm_python  # imports what a rank does

    with warm_python() as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """(recipe file, run directory): under the supervisor on 2 ranks, interrupted by nobody. Broken runs are compared to it."""
    from tests.support import supervised  # imports what a rank does

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "straight"  # one for all workers
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_dir = folder / "straight"
        if not folder.exists():
            folder.mkdir()
            recipe = supervised.recipe_copy(folder, extra=supervised.HELD)
            assert supervised.supervise(recipe, run_dir).wait(120) == 0, supervised.output(run_dir)
    return folder / "repository/recipes/quickstart.py", run_dir
