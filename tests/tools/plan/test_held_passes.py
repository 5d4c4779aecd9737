"""Tests what a rank holds when its backward passes begin, against orders written down in the papers."""

import pytest

from recipes.common.config.placement import FOLDED, ONE_PASS, ZERO_BUBBLE, Placement
from recipes.common.pipeline.partition import partition_layers, pass_costs
from recipes.common.pipeline.schedules import order_passes
from tools.plan.held_passes import Held, _backward_passes, _most, _played, held_in_backward


@pytest.mark.parametrize("schedule", [ONE_PASS, ZERO_BUBBLE])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 24])
def test_of_one_chunk_a_rank_the_formula_is_what_the_passes_hold(schedule, micro_batches):
    placement = Placement(schedule, 4)
    orders = order_passes(placement, micro_batches, ())
    played = tuple(_most(_backward_passes(order, (rank,))) for rank, order in enumerate(orders))
    assert held_in_backward(placement, micro_batches) == played


def most(placement, micro_batches):
    return [max(held.in_flight for held in of_rank) for of_rank in held_in_backward(placement, micro_batches)]


@pytest.mark.parametrize("schedule", [ONE_PASS, ZERO_BUBBLE])
def test_stage_i_of_p_has_p_minus_i_micro_batches_in_flight(schedule):
    assert most(Placement(schedule, 4), 32) == [4, 3, 2, 1]
    assert most(Placement(schedule, 4), 2) == [2, 2, 2, 1]


def test_a_zero_bubble_keeps_the_factors_of_as_many_as_a_rank_begins_late():
    for rank, helds in enumerate(held_in_backward(Placement(ZERO_BUBBLE, 4), 32)):
        assert max(held.factors[0] for held in helds) == rank
    assert not any(held.factors[0] for helds in held_in_backward(Placement(ONE_PASS, 4), 32) for held in helds)


def test_interleaved_holds_more_of_the_first_chunks():
    """(v + 1 - 1/p)p / v of all layers on the first stage (arXiv 2104.04473); two ranks of two chunks, by hand."""
    assert most(Placement(ONE_PASS, 4, 2), 32)[0] == (3 - 1 / 4) * 4 / 2
    first, last = held_in_backward(Placement(ONE_PASS, 2, 2), 8)
    assert Held(1, (3, 2), (0, 0)) in first and Held(1, (2, 1), (0, 0)) in last


def test_a_folded_rank_holds_as_much_as_the_first_stage_does():
    assert most(Placement(FOLDED, 4, 2), 32) == [4, 4, 4, 4]
    assert most(Placement(FOLDED, 4, 2), 3) == [3, 3, 3, 3]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("layers", "head"), [(16, 0.6), (24, 1.7), (32, 3.0)])
def test_no_folded_rank_holds_more_than_is_planned(layers, head, recomputed):
    """Bytes of passes as they are played, with what a layer keeps and its factors; the last rank holds most of it."""
    placement, (stored, factors) = Placement(FOLDED, 4, 2), (0.1, 0.8) if recomputed else (1.0, 0.8)
    chunks = partition_layers([1.0] * layers, head, placement)
    costs = pass_costs([1.0] * layers, [0.05] * layers, head, chunks, range(layers if recomputed else 0), 1.0)

    def most_of(helds, own):
        return max(
            sum(n * (a * stored + f * factors) for n, a, f in zip(own, held.activations, held.factors, strict=True))
            for held in helds
        )

    for micro_batches in (4, 8, 24):
        orders, planned = order_passes(placement, micro_batches, costs), held_in_backward(placement, micro_batches)
        for rank, order in enumerate(orders):
            own = [len(chunks[chunk]) for chunk in placement.chunks_of(rank)]
            played = most_of(_most(_backward_passes(order, placement.chunks_of(rank))), own)
            assert played <= most_of(planned[rank], own) + 1e-9
        assert played >= (0.6 if recomputed else 0.95) * most_of(planned[rank], own)


@pytest.mark.parametrize("placement", [Placement(ONE_PASS, 4, 3), Placement(ZERO_BUBBLE, 4, 2), Placement(ZERO_BUBBLE, 3, 5)])
def test_longer_steps_hold_no_more(placement):
    assert _played(placement, 3 * placement.pipeline) == _played(placement, 15 * placement.pipeline)
