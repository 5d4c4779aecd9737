"""One of the fault bench's trials of each of nine kinds; the bench itself runs a thousand."""

import pytest

from tests.bench.faults import jobs  # noqa: F401  imported once, before the bench is forked
from tests.support.small_runs import call_bench

SEED = 5
PICKED = {  # one rank, or two in a pipeline: their undisturbed runs are shared
    "error": 85,  # a rank's fsync
    "kill": 9,  # in a save
    "blow": 14,
    "damage": 26,  # run.json
    "memory": 131,  # MemoryError on every rank
    "clock": 42,  # and SIGTERM
    "signal": 110,
    "second": 7,  # at the same moment
    "output": 65,  # closed
}


def test_a_trial_of_each_of_nine_kinds_holds():
    called = call_bench("faults", "--seed", SEED, "--pick", *PICKED.values(), "--jobs", 3, "--json")
    assert called.code == 0 and called.json["violations"] == [], called.err
    assert called.json["trials"] == len(PICKED)
    assert called.json["kinds"] == dict.fromkeys(PICKED, 1)


@pytest.mark.parametrize(
    ("flags", "message"), [(("--trials", 0), "--trials=0: must be 1 or more"), (("--resume",), "needs --log FILE")]
)
def test_a_mistake_is_said_before_anything_runs(flags, message):
    called = call_bench("faults", *flags)
    assert called.code == 2 and message in called.err and "Traceback" not in called.err
