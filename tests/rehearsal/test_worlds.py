"""All ranks of small worlds: in every group the same calls in the same order, and each message has its other side."""

import pytest

from tests.rehearsal.cases import Variant
from tools.plan.rehearsal.nccl_stand_in import Call, compare

COMMON = {"rank": 0, "steps": (3,), "seq_len": 256}
WORLDS = (
    Variant(
        recipe="qwen3_0_6b",
        layers=2,
        gpus=4,
        layout="tensor=2,pipeline=2,sequence_parallel=1",
        extras=("evaluate",),
        **COMMON,
    ),
    Variant(
        recipe="gpt2_124m",
        layers=4,
        gpus=4,
        layout="pipeline=2,pipeline_schedule=zero_bubble_v",
        extras=("skip", "drift"),
        **COMMON,
    ),
    Variant(recipe="qwen3_0_6b", layers=2, gpus=4, layout="tensor=2,context=2,sequence_parallel=1", extras=("layers",), **COMMON),
)


@pytest.mark.parametrize("variant", WORLDS, ids=lambda variant: variant.name)
def test_every_rank_makes_the_same_calls(variant, rehearsed):
    ranks = [rehearsed(variant, rank=rank) for rank in range(variant.gpus)]
    calls = [[Call(**call) for call in result["calls"]] for result in ranks]
    assert compare(calls) == []
    assert [result["broken"] for result in ranks] == [{}] * variant.gpus
    assert min(map(len, calls)) > 10
