"""Rings of objects live until the step at which all ranks collect them, and Python collects by itself again afterwards."""

import gc
import weakref

import pytest

from recipes.common.runtime.garbage import EVERY_STEPS, collect_as_usual, collect_by_steps, collect_if_due


class Ring:
    def __init__(self):
        self.own = self


@pytest.fixture
def by_steps():
    collect_by_steps()
    yield
    collect_as_usual()


def test_a_ring_lives_until_the_agreed_step(by_steps):
    ring = weakref.ref(Ring())
    rings = [Ring() for _ in range(20_000)]  # far more than make Python collect by itself
    del rings
    for step in range(1, EVERY_STEPS):
        collect_if_due(step)
        assert ring() is not None
    collect_if_due(EVERY_STEPS)
    assert ring() is None


def test_python_collects_again_afterwards():
    collect_by_steps()
    assert not gc.isenabled() and gc.get_freeze_count() > 0
    collect_as_usual()
    assert gc.isenabled() and gc.get_freeze_count() == 0
