"""Rehearses in a process of its own, in which torch has a stand-in for CUDA: python -m tools.plan.rehearsal.worker.

Reads pickled jobs from stdin and writes a pickled result of each to stdout. Imports once, and forks a process for each job: a
rehearsal leaves its world behind.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import sys
import warnings
from typing import Any, BinaryIO

from tools.plan.rehearsal.shim import ShimError, load_shim

LIMIT_SECONDS = 1800.0


def main() -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # DeepSpeed logs on stdout
    os.environ |= {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        stand_in = load_shim()
    except ShimError as error:
        _send(results, error)
        return
    import deepspeed.compile.backend  # noqa: F401  what each rehearsal would import late

    from tools.common.forked_ranks import RankError, run_ranks
    from tools.plan.rehearsal.rehearsed_step import rehearse

    # DeepSpeed asks where tensors lie; here they lie nowhere
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    gc.freeze()  # what was imported is not looked through again in every rehearsal
    _send(results, stand_in)
    while (job := _read(sys.stdin.buffer)) is not None:
        case, device, prepare = job
        try:
            (result,) = run_ranks(rehearse, 1, case, device, prepare, timeout_seconds=LIMIT_SECONDS)
            _send(results, result)
        except RankError as error:
            _send(results, error)


def _send(pipe: BinaryIO, value: Any) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def _read(pipe: BinaryIO) -> Any:
    try:
        return pickle.load(pipe)  # our own parent's bytes
    except EOFError:
        return None


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # whoever asked has gone
        main()
