"""Planted faults: each is found, by the rule that is meant to find it and with the line that is at fault."""

import pytest

from tests.rehearsal import planted
from tests.rehearsal.cases import Variant
from tests.rehearsal.rules import wait_problems
from tools.plan.rehearsal.kernels import LOSS
from tools.plan.rehearsal.nccl_stand_in import Call, compare
from tools.plan.rehearsal.step_summary import summarize

SMALL = Variant(recipe="llama_1b", layers=2, gpus=2, layout="tensor=2", rank=0, seq_len=1024)
SMALL_MICRO_BATCH = 4 * 1024  # tokens
HERE = "tests/rehearsal/planted.py:"


@pytest.fixture(scope="module")
def healthy(rehearsed):
    return summarize(rehearsed(SMALL), 8)


def summary_with(rehearsed, fault):
    return summarize(rehearsed(SMALL, plant=fault), 8)


def test_a_healthy_step_breaks_no_rule(healthy):
    assert healthy.broken == {} and wait_problems(healthy) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [(planted.cpu_tensor_in_a_collective, "on the cpu"), (planted.missing_contiguous, "not contiguous")],
    ids=["a CPU tensor in a collective", "a missing contiguous"],
)
def test_nccl_would_refuse(fault, words, rehearsed):
    (problem,) = summary_with(rehearsed, fault).broken
    assert problem.startswith("all_reduce: ") and words in problem and HERE in problem


@pytest.mark.parametrize(
    ("fault", "what"),
    [(planted.item_in_a_layer, "item"), (planted.synchronous_copy, "copy from host to device")],
    ids=["item in a layer", "a synchronous copy"],
)
def test_the_host_waits_in_every_micro_batch(fault, what, rehearsed):
    (problem,) = wait_problems(summary_with(rehearsed, fault))
    assert problem.startswith(f"{what}: 1 a micro batch, allowed 0") and HERE in problem


def test_ranks_that_swap_two_collectives(rehearsed):
    def calls(plant):
        return [[Call(**call) for call in rehearsed(SMALL, rank=rank, plant=plant)["calls"]] for rank in range(2)]

    assert compare(calls(None)) == []
    (problem,) = compare(calls(planted.swapped_collectives_on_rank_1))
    assert "rank 0 all_reduce SUM of 2 bfloat16" in problem and "rank 1 all_reduce SUM of 3 bfloat16" in problem
    assert HERE in problem


def test_an_fp32_copy_of_the_logits(healthy, rehearsed):
    """There and back, forward and backward: four kernels in each chunk of the loss that read or write 2 and 4 bytes a logit."""
    found = summary_with(rehearsed, planted.fp32_copy_of_the_logits)
    logits = SMALL_MICRO_BATCH * 128_256 / 2
    assert (found.work[LOSS].each[1] - healthy.work[LOSS].each[1]) / logits == pytest.approx(4 * 6, rel=0.01)
    assert found.work[LOSS].each[0] - healthy.work[LOSS].each[0] == 4 * SMALL_MICRO_BATCH / 2048


@pytest.mark.parametrize(
    ("fault", "kernels", "bytes_per_element"),
    [(planted.cast_in_a_layer, 4, 24), (planted.copy_in_a_layer, 1, 4)],
    ids=["a cast", "a copy"],
)
def test_a_layer_that_does_more(fault, kernels, bytes_per_element, healthy, rehearsed):
    """Planted in one of two layers: half of it a layer."""
    found = summary_with(rehearsed, fault)
    more_kernels, more_bytes = (new - old for new, old in zip(found.layer_share(), healthy.layer_share(), strict=True))
    elements = SMALL_MICRO_BATCH * 2048
    assert (2 * more_kernels, 2 * more_bytes) == (kernels, bytes_per_element * elements)
