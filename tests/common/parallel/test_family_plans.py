"""Plans of our own are exact, and a wrong entry at any place of one shows in the gradients."""

import pytest

from recipes.common.parallel.tensor_plans import ADDED_TENSOR, BUILT_IN_TENSOR
from tests.support.planted_plans import SIZE, WRONG, planted
from tools.common.forked_ranks import run_ranks

# one for each shape of attention and of experts; `python -m tests.bench.planted_plans` plants in all of them
SAMPLE = ("bloom", "dbrx", "falcon", "gpt_oss", "jetmoe", "lfm2")


def test_a_wrong_style_is_known_for_each_that_is_used():
    plans = (BUILT_IN_TENSOR | ADDED_TENSOR).values()
    assert {style for plan in plans for style in plan.values()} == WRONG.keys()


@pytest.mark.parametrize("family", SAMPLE)
def test_a_planted_entry_is_found(family):
    right, found = run_ranks(planted, SIZE, family)[0]
    assert right < 0.1  # of what is allowed: rounding
    assert len(found) >= len(BUILT_IN_TENSOR[family])
    assert [entry for entry, caught in found.items() if not caught] == []
