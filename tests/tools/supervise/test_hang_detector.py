"""When a run hangs, and which ranks the others wait for."""

import pytest

from recipes.common.engine.trainer import Trainer
from recipes.common.parallel.collectives import UnderWay
from recipes.common.parallel.router_losses import MicroBatchCounts
from recipes.common.pipeline.stage_messages import Mailbox
from recipes.common.run_dir.heartbeat import Beat
from recipes.common.runtime.supervisor_link import WAITING_FRAMES, WAITING_FUNCTION
from tools.supervise.hang_detector import HangLimits, RecentSteps, find_culprits, hang_seconds, is_waiting, main_thread_frames


def beat(rank: int, step: int = 7, phase: str = "step", seconds: float = 2.0) -> Beat:
    return Beat(rank, "ab"[rank // 2], 100 + rank, step, phase, 1000.0, seconds, {})


def test_the_limit_follows_the_median_step_and_the_phase():
    limits = HangLimits(step_seconds=60.0, long_phase_seconds=300.0)
    assert hang_seconds("step", None, limits) == 300.0  # the first step: compilation, first collectives
    assert hang_seconds("start", 50.0, limits) == 300.0
    assert hang_seconds("step", 2.0, limits) == 60.0
    assert hang_seconds("data", 20.0, limits) == 200.0
    assert hang_seconds("save", 2.0, limits) == hang_seconds("evaluate", 2.0, limits) == 300.0
    assert hang_seconds("save", 50.0, limits) == 500.0
    times = RecentSteps()
    for step, seconds in ((1, 0.0), (2, 30.0), (3, 2.0), (3, 2.0), (4, 2.5)):  # one step of 30 s does not raise the limit
        times.add([beat(0, step, seconds=seconds), beat(1, step - 1, seconds=9.0)])
    assert times.median() == 2.5


STACK = """Thread 0x01 (most recent call first):
  File "/x/threading.py", line 1 in wait

Current thread 0x02 (most recent call first):
  File "{innermost}
  File "/r/recipes/common/engine/trainer.py", line 200 in train_step
"""
WAITS = STACK.format(innermost='/v/torch/distributed/distributed_c10d.py", line 3034 in all_reduce')
SUMS = STACK.format(innermost='/r/recipes/common/engine/trainer.py", line 255 in ' + WAITING_FUNCTION)
WAITS_HERE = [f'/r/recipes/common/wing/{file}", line 78 in {function}' for file, function in WAITING_FRAMES]
BUSY = STACK.format(innermost='/r/recipes/common/data/shards.py", line 88 in read')


def test_stacks_show_which_rank_waits_for_others():
    assert main_thread_frames(BUSY)[0].endswith('shards.py", line 88 in read')
    assert is_waiting(WAITS)
    assert is_waiting(SUMS)
    assert all(is_waiting(STACK.format(innermost=place)) for place in WAITS_HERE)
    assert not is_waiting(BUSY)
    classes = (Mailbox, MicroBatchCounts, UnderWay)
    assert {function for _, function in WAITING_FRAMES} <= {name for each in classes for name in vars(each)}
    assert callable(getattr(Trainer, WAITING_FUNCTION))  # its name in a stack stands for a wait inside the all-reduce


@pytest.mark.parametrize(
    ("beats", "stacks", "states", "culprits"),
    [
        ([beat(0), beat(1)], {0: WAITS}, {0: "S", 1: "T"}, {1: "its process is stopped (state T)"}),
        ([beat(0), beat(1)], {0: WAITS}, {0: "S", 1: "D"}, {1: "its process waits for a disk or a device (state D)"}),
        ([beat(0), beat(1, phase="data")], {0: WAITS, 1: BUSY}, {}, {1: 'it is in "data" of step 7'}),
        ([beat(0, 8), beat(1)], {0: WAITS, 1: WAITS}, {}, {1: 'it is in "step" of step 7'}),
        ([beat(0), beat(1)], {0: WAITS}, {}, {1: "it did not print its stacks"}),
        ([beat(0), beat(1)], {0: WAITS, 1: BUSY}, {}, {1: 'it is at File "/r/recipes/common/data/shards.py", line 88 in read'}),
        ([beat(0), beat(1)], {0: WAITS, 1: SUMS}, {0: "S", 1: "S"}, {}),
    ],
)  # fmt: skip
def test_who_did_not_reach_the_collective(beats, stacks, states, culprits):
    assert find_culprits(beats, stacks, states) == culprits
