"""What a launcher says of a rank's place, and what was left over from another one."""

import pytest

from recipes.common.config.arguments import launch_problems, place_of

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment", [{}, WHOLE, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"RANK": "0", "LOCAL_RANK": "0"}]
)
def test_a_place_that_is_whole_or_not_needed(environment):
    assert launch_problems(environment) == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: the other ranks would be waited"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "3"}, "but no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four is not a whole number"),
        (WHOLE | {"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (WHOLE | {"RANK": "-1"}, "RANK=-1 is not a whole number"),
        (WHOLE | {"MASTER_PORT": "x"}, "MASTER_PORT=x is not a whole number"),
    ],
)
def test_what_is_left_over_is_told_with_the_cure(environment, words):
    (problem,) = launch_problems(environment)
    assert words in problem
    assert "unset" in problem
    assert place_of(environment)[1] >= 1
