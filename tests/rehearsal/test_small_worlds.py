"""Small worlds: every rank makes the same calls, and each planted fault is found, by the rule that is meant to find it and with
the line that is at fault. In one file: the process that rehearses takes seconds to start."""

import pytest

from tests.rehearsal import planted
from tests.rehearsal.cases import SP, Variant
from tests.rehearsal.rules import wait_problems
from tools.plan.rehearsal.kernels import LOSS
from tools.plan.rehearsal.nccl_stand_in import Call, compare
from tools.plan.rehearsal.step_summary import summarize

SMALL = Variant(recipe="llama_1b", layers=2, gpus=64, layout="tensor=2", rank=0, seq_len=1024)
SMALL_MICRO_BATCH = 4 * 1024  # tokens
HERE = "tests/rehearsal/planted.py:"

# All ranks of each. A small vocabulary: statistics and checksums go through a large one in many parts.
OF_4 = {"gpus": 4, "rank": 0, "seq_len": 256, "vocab_size": 8192}
WORLDS = (
    Variant(recipe="qwen3_0_6b", layers=2, layout=f"tensor=2,pipeline=2,{SP}", steps=(2,), extras=("evaluate", "drift"), **OF_4),
    Variant(recipe="gpt2_124m", layers=4, layout="pipeline=2,pipeline_schedule=zero_bubble_v", steps=(2,),
            extras=("skip", "drift"), **OF_4),
    Variant(recipe="qwen3_0_6b", layers=2, layout=f"tensor=2,context=2,{SP}", steps=(1,), extras=("layers",), **OF_4),
)  # fmt: skip


@pytest.fixture(scope="module")
def healthy(rehearsed):
    return summarize(rehearsed(SMALL), 8)


@pytest.fixture(scope="module")
def both_ranks(rehearsed):
    """What both ranks recorded of faulty messages and waits."""
    return [rehearsed(SMALL, rank=rank, plant=planted.messages_and_waits) for rank in range(2)]


@pytest.fixture(scope="module")
def with_more_work(rehearsed):
    return summarize(rehearsed(SMALL, plant=planted.more_work), 8)


def test_a_healthy_step_breaks_no_rule(healthy):
    assert healthy.broken == {} and wait_problems(healthy) == []


def test_what_nccl_would_refuse(both_ranks):
    """A CPU tensor in a collective, and a missing contiguous."""
    of_cpu, of_strides = sorted(summarize(both_ranks[0], 8).broken, key=lambda problem: "not contiguous" in problem)
    assert of_cpu.startswith("all_reduce: ") and "on the cpu" in of_cpu and HERE in of_cpu
    assert of_strides.startswith("all_reduce: ") and "not contiguous" in of_strides and HERE in of_strides


def test_the_host_waits_in_every_micro_batch(both_ranks):
    """For an item in a layer, and for a synchronous copy."""
    of_copy, of_item = sorted(wait_problems(summarize(both_ranks[0], 8)))
    assert of_copy.startswith("copy from host to device: 1 a micro batch, allowed 0") and HERE in of_copy
    assert of_item.startswith("item: 1 a micro batch, allowed 0") and HERE in of_item


def test_ranks_that_swap_two_collectives(both_ranks):
    """All others they make in one order, as far as two of 64 ranks tell; the worlds below show that healthy ranks make all."""
    problems = compare([[Call(**call) for call in result["calls"]] for result in both_ranks])
    (problem,) = (each for each in problems if HERE in each)
    assert "rank 0 all_reduce SUM of 2 bfloat16" in problem and "rank 1 all_reduce SUM of 3 bfloat16" in problem


def test_an_fp32_copy_of_the_logits(healthy, with_more_work):
    """There and back, forward and backward: four kernels in each chunk of the loss that read or write 2 and 4 bytes a logit."""
    kernels, moved, *_ = (new - old for new, old in zip(with_more_work.work[LOSS].each, healthy.work[LOSS].each, strict=True))
    logits = SMALL_MICRO_BATCH * 128_256 / 2
    assert moved / logits == pytest.approx(4 * 6, rel=0.01)
    assert kernels == 4 * SMALL_MICRO_BATCH / 2048


def test_layers_that_do_more(healthy, with_more_work):
    """A cast, there and back, forward and backward, and a copy: by their lines, and in what all layers do."""
    elements = SMALL_MICRO_BATCH * 2048
    cast, copy = (4, 24 * elements), (1, 4 * elements)
    planted_work = [growth.each for line, growth in with_more_work.layer_work.items() if line.startswith(HERE)]
    assert sorted(planted_work, reverse=True) == [cast, copy]
    more = [2 * (new - old) for new, old in zip(with_more_work.layer_share(), healthy.layer_share(), strict=True)]
    assert more == [a + b for a, b in zip(cast, copy, strict=True)]


@pytest.mark.parametrize("variant", WORLDS, ids=lambda variant: variant.name)
def test_every_rank_makes_the_same_calls(variant, rehearsed):
    """In every group the same calls in the same order, and each message has its other side."""
    ranks = [rehearsed(variant, rank=rank) for rank in range(variant.gpus)]
    calls = [[Call(**call) for call in result["calls"]] for result in ranks]
    assert compare(calls) == []
    assert [(result["broken"], result["unanswered"]) for result in ranks] == [({}, {})] * variant.gpus
    assert min(map(len, calls)) > 10
