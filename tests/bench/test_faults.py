"""A few of the fault bench's trials, of every kind; the bench itself runs a thousand."""

import pytest

from tests.bench.faults import jobs  # noqa: F401  imported once, before the bench is forked
from tests.support.small_runs import call_bench

SEED = 5
PICKED = {  # one rank, or two in a pipeline: their undisturbed runs are shared
    "error": (62, 85),  # ENOSPC for good; a rank's fsync
    "kill": (9,),  # in a save
    "blow": (14,),
    "damage": (26, 112),  # run.json; a rank's file and state.json
    "memory": (131,),  # MemoryError on every rank
    "clock": (42,),  # and SIGTERM
    "signal": (110,),
    "second": (7,),  # at the same moment
    "output": (65, 95),  # closed; nobody reads
}


def test_a_dozen_trials_hold():
    picked = [number for numbers in PICKED.values() for number in numbers]
    called = call_bench("faults", "--seed", SEED, "--pick", *picked, "--jobs", 2, "--json")
    assert called.code == 0 and called.json["violations"] == [], called.err
    assert called.json["trials"] == len(picked)
    assert called.json["kinds"] == {kind: len(numbers) for kind, numbers in PICKED.items()}


@pytest.mark.parametrize(
    ("flags", "message"), [(("--trials", 0), "--trials=0: must be 1 or more"), (("--resume",), "needs --log FILE")]
)
def test_a_mistake_is_said_before_anything_runs(flags, message):
    called = call_bench("faults", *flags)
    assert called.code == 2 and message in called.err and "Traceback" not in called.err
