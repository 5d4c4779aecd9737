"""`throughput schedules` measures every pipeline schedule, and prints a table or one JSON object."""

import pytest

from tests.support.small_runs import call

TINY = ("--hidden", 64, "--layers", 4, "--seq-len", 32, "--micro-seqs", 1, "--rounds", 2)


def test_every_schedule_is_compared_with_1f1b():
    called = call("throughput", "schedules", *TINY, "--json")
    assert called.code == 0, called.err
    found = called.json["schedules"]
    twice = [("1f1b", 2), ("zero_bubble", 2)]
    assert [(row["schedule"], row["chunks"]) for row in found] == [("1f1b", 1), ("zero_bubble", 1), ("zero_bubble_v", 2), *twice]
    assert found[0]["ratio"] == 1.0
    for row in found:
        assert len(row["busy_seconds"]) == 2
        assert 0 < max(row["busy_seconds"]) <= row["step_seconds"]
        assert 0 < row["bubble_share"] < 1
    # what 1F1B loses of a micro batch with two stages (arXiv 2104.04473 and 2401.10241), beside four of them
    lost = [1, 1 / 3, 1 / 6, 1 / 2, 1 / 6]
    assert [row["formula_share"] for row in found] == pytest.approx([each / (4 + each) for each in lost])


def test_too_few_layers_are_refused():
    called = call("throughput", "schedules", "--layers", 3)
    assert called.code == 2
    assert "--layers=3: zero_bubble_v needs at least 4" in called.err
