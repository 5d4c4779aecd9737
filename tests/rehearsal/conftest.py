"""One process that rehearses for all tests of a worker, and what it has rehearsed."""

import pytest

from tests.rehearsal.cases import GPU
from tools.plan.rehearsal.rehearsing import Rehearser
from tools.plan.rehearsal.shim import missing


@pytest.fixture(scope="session")
def rehearser():
    reason = missing()
    if reason is not None:
        pytest.skip(f"the stand-in for CUDA cannot be compiled: {reason}")
    with Rehearser() as running:
        yield running


@pytest.fixture(scope="session")
def rehearsed(rehearser):
    """Return a function from a variant (and a rank, and a fault to plant) to what its rehearsal recorded."""
    known = {}

    def run(variant, *, rank=None, plant=None):
        key = variant, rank, plant
        if key not in known:
            rehearser.start(variant.rehearsal(rank), GPU, plant)
            known[key] = rehearser.result()
        return known[key]

    return run
