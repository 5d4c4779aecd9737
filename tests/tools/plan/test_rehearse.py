"""The rehearsal as its user calls it: what it says of a step, and the mistakes it names. `tests/rehearsal` has the rest."""

import pytest

from recipes.common.recipe import Layout
from tests.support.small_runs import call
from tools.plan.rehearsal import shim
from tools.plan.rehearse import step_lengths

QUICKSTART = "recipes/quickstart.py"


@pytest.mark.skipif(shim.missing() is not None, reason=f"the stand-in for CUDA cannot be compiled: {shim.missing()}")
def test_a_step_of_the_quickstart():
    """fp32, tensor 2 x pipeline 2 x data 2; rank 5 is of the last stage. What is compared here follows from the recipe."""
    called = call("plan", "rehearse", QUICKSTART, "--gpus", 8, "--rank", 5, "--json")
    assert called.code == 0, called.err
    said = called.json
    assert (said["gpus"], said["rank"], said["stage"], said["micro_batches"]) == (8, 5, 1, 2)
    assert said["rehearsed_micro_batches"] == [1, 1, 2]
    memory = said["memory"]
    assert sum(each["bytes"] for each in memory["held"]) == memory["peak"] > memory["between_steps"] > 0
    assert said["broken"] == {} and said["unanswered"] == {}
    traffic = {(row["group"], row["op"]): row for row in said["traffic"]}
    assert traffic["pipeline", "recv"]["calls"] == traffic["pipeline", "send"]["calls"] == 2
    assert traffic["pipeline", "recv"]["bytes"] == 2 * 8 * 128 * 192 * 4  # micro batches x [8, 128, hidden], fp32
    assert said["compared"]["products"]["rehearsed"] == pytest.approx(said["compared"]["products"]["planned"], rel=0.01)


def test_lengths_of_the_steps():
    """They fill the pipeline, and no more than the recipe's step has."""
    assert step_lengths(Layout(), 64) == step_lengths(Layout(), 1) == (1, 1, 2)
    assert step_lengths(Layout(pipeline=4), 64) == (1, 3, 4)
    assert step_lengths(Layout(pipeline=4, pipeline_schedule="zero_bubble"), 64) == (1, 7, 8)
    assert step_lengths(Layout(pipeline=16), 8) == (1, 7, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", 3), "--gpus=3: quickstart has layouts for 1, 2, 4, 8 GPUs; give one of those, or a --layout"),
        (("--gpus", 8, "--rank", 8), "--rank=8: the ranks of 8 GPUs are 0 to 7"),
        (("--gpus", 6, "--layout", "tensor=4"), "tensor=4"),
        (("--gpus", 8, "--gpu-type", "H1000"), "--gpu-type=H1000"),
        (
            ("--gpus", 8, "--layout", "tensor=2,data=3"),
            "--layout=tensor=2,data=3: does not fill --gpus=8",
        ),
        (("--gpus", -8, "--layout", "tensor=2"), "--gpus=-8: must be 1 or more"),
        (("--gpus", 8, "--lines", -3), "--lines=-3: must be 0 or more"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(flags, message):
    called = call("plan", "rehearse", QUICKSTART, *flags)
    assert called.code == 2 and message in called.err and "Traceback" not in called.err


@pytest.mark.skipif(not shim.needed(), reason="this torch has CUDA: nothing is compiled")
def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    called = call("plan", "rehearse", QUICKSTART, "--gpus", 1)
    assert called.code == 2 and "install g++, or a CUDA build of torch" in called.err and "Traceback" not in called.err
