"""What tensor ranks exchange in a layer, counted by hand, in all-reduces; `tests/rehearsal` counts what training does."""

import pytest

from recipes.common.recipe import Layout
from tools.plan.tensor_sums import tensor_sums

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
BUBBLES = {"pipeline": 2, "pipeline_schedule": "zero_bubble"}


@pytest.mark.parametrize(
    ("layout", "repeated", "experts", "alone", "beside"),
    [
        # forward 2; backward 2 beside weight gradients
        ({"tensor": 2}, 0.0, False, 2.0, 2.0),
        ({"tensor": 2, "recompute": "full"}, 1.0, False, 3.0, 2.0),
        ({"tensor": 2}, 0.0, True, 3.0, 1.0),
        ({"tensor": 2} | BUBBLES, 0.0, False, 4.0, 0.0),
        # in halves. Forward 4; backward 2 gathers of rows' gradients, 2 scatters and 2 gathers of columns' inputs
        (SEQUENCE, 0.0, False, 3.0, 2.0),
        (SEQUENCE | {"recompute": "full"}, 1.0, False, 4.5, 1.0),
        # the weights' pass gathers 4 factors, each beside the product before
        (SEQUENCE | BUBBLES, 0.0, False, 4.0, 2.0),
    ],
)
def test_a_layers_sums(layout, repeated, experts, alone, beside):
    sums = tensor_sums(Layout(**layout), repeated, experts=experts)
    assert (sums["sums"], sums["sums_beside"]) == (alone, beside)
    assert (sums["passes_beside"] > 0) == (beside > 0)
