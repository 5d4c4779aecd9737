"""Launches ranks for tests, forked from one process that has imported everything: a start takes seconds.

    python forked_launcher.py RANKS RECIPE [FLAGS]       # RANKS: a number, or a hostfile whose slots are added up

Like other launchers it ends all ranks when one fails, and exits with that one's code. Killed, it ends none.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import deepspeed  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers
from transformers.models.llama import modeling_llama  # noqa: F401

from recipes.common.runtime.network import free_port


def main() -> int:
    ranks, recipe = sys.argv[1], sys.argv[2]
    if not ranks.isdigit():
        ranks = sum(int(line.rpartition("=")[2]) for line in Path(ranks).read_text().splitlines())
    world, port = int(ranks), str(free_port())
    transformers.logging.set_verbosity_error()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
            os.environ.update({name: str(value) for name, value in variables.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sys.argv = [recipe, *sys.argv[3:]]
            runpy.run_path(recipe, run_name="__main__")
            os._exit(0)
        children.append(child)
    while children:
        child, status = os.wait()
        if child not in children:
            continue
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGTERM)
            return os.waitstatus_to_exitcode(status) & 255
    return 0


if __name__ == "__main__":
    sys.exit(main())
