"""What the history of rewinds means for the next try and the learning rate."""

from recipes.common.anomalies.rewinds import Rewind, lr_factor_at, tries_at


def entry(from_step, to_step, **fields):
    values = {"kind": "diverged", "onset_step": from_step, "skipped": (0, 1), "lr_factor": 1.0, "lr_until_step": 0}
    return Rewind(from_step=from_step, to_step=to_step, **(values | fields))


def test_a_run_that_gets_past_the_step_starts_counting_anew():
    first, second, third = entry(100, 80), entry(105, 60), entry(300, 280)
    assert tries_at((first,), onset_step=101) == ()
    assert tries_at((first, second), onset_step=99) == (first, second)
    assert tries_at((first, second, third), onset_step=299) == (third,)


def test_stretches_of_a_lower_rate_multiply():
    history = (entry(9, 4, lr_factor=0.5, lr_until_step=10), entry(9, 2, lr_factor=0.5, lr_until_step=6))
    assert [lr_factor_at(history, step) for step in (2, 3, 5, 7, 11)] == [1.0, 0.5, 0.25, 0.5, 1.0]
