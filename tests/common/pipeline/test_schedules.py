"""Schedules as data: every pass once, in an order that no message can block, with the bubble and the memory that they promise."""

from collections import Counter
from hashlib import blake2b

import pytest

from recipes.common.config.placement import chunk_count, chunks_of_rank, rank_of_chunk
from recipes.common.pipeline.schedules import (
    FORWARD,
    INPUTS,
    WEIGHTS,
    Costs,
    Message,
    Pass,
    finish_times,
    forward_passes,
    needs,
    order_passes,
    sent_messages,
)
from recipes.common.recipe import PIPELINE_SCHEDULES

ONE_PASS, ZERO_BUBBLE, FOLDED = PIPELINE_SCHEDULES
DEPTHS = [(2, 1), (2, 4), (3, 2), (3, 6), (4, 3), (4, 4), (4, 9), (8, 16)]  # stages, micro batches
EACH = [(schedule, *depth) for schedule in PIPELINE_SCHEDULES for depth in DEPTHS]
UNEVEN = (1.0, 1.25, 0.75)


def evenly(schedule, pipeline, costs=(1.0, 1.0, 1.0)):
    return (Costs(*costs),) * chunk_count(schedule, pipeline)


@pytest.mark.parametrize(("schedule", "pipeline", "micro_batches"), EACH)
def test_every_pass_is_run_once_by_its_rank_and_micro_batches_in_order(schedule, pipeline, micro_batches):
    """In order by chunk: gradients are added up as 1F1B adds them."""
    for rank, order in enumerate(order_passes(schedule, pipeline, micro_batches, evenly(schedule, pipeline, UNEVEN))):
        kinds = (FORWARD, INPUTS) if schedule == ONE_PASS else (FORWARD, INPUTS, WEIGHTS)
        own = chunks_of_rank(schedule, pipeline, rank)
        assert all(rank_of_chunk(schedule, pipeline, chunk) == rank for chunk in own)
        assert len(order) == len(kinds) * len(own) * micro_batches
        for kind in kinds:
            for chunk in own:
                assert [i for k, i, c in order if (k, c) == (kind, chunk)] == list(range(micro_batches))


@pytest.mark.parametrize(("schedule", "pipeline", "micro_batches"), EACH)
@pytest.mark.parametrize("ahead", [0, 1])
def test_no_order_of_messages_can_block(schedule, pipeline, micro_batches, ahead):
    """As on NCCL: between two ranks, what goes one way moves one message after another, when both have come to it."""
    plan = order_passes(schedule, pipeline, micro_batches, evenly(schedule, pipeline, UNEVEN))
    runs_to_its_end(plan, schedule, pipeline, ahead)


@pytest.mark.parametrize(("schedule", "pipeline", "micro_batches"), EACH)
def test_an_evaluation_cannot_block(schedule, pipeline, micro_batches):
    plan = [forward_passes(schedule, pipeline, rank, micro_batches) for rank in range(pipeline)]
    runs_to_its_end(plan, schedule, pipeline, 1)
    assert Counter(step for order in plan for step in order) == Counter(
        Pass(FORWARD, i, chunk) for i in range(micro_batches) for chunk in range(chunk_count(schedule, pipeline))
    )


def runs_to_its_end(plan, schedule, pipeline, ahead):
    chunks = chunk_count(schedule, pipeline)
    done, places, sent = [set() for _ in plan], [0] * pipeline, {}
    coming = {}  # (sender, receiver) -> messages in the sender's order
    for sender, order in enumerate(plan):
        for receiver, message in sent_messages(order, schedule, pipeline):
            coming.setdefault((sender, receiver), []).append(message)
    asked, moved_on = dict.fromkeys(coming, 0), dict.fromkeys(coming, 0)

    def message_of(step):
        before = needs(step, chunks)
        if before is None or rank_of_chunk(schedule, pipeline, before.chunk) == rank_of_chunk(schedule, pipeline, step.chunk):
            return None
        return rank_of_chunk(schedule, pipeline, before.chunk), Message(step.kind, step.micro_batch, step.chunk)

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(plan):
            while places[rank] < len(order):
                for following in order[places[rank] : places[rank] + ahead + 1]:
                    if (wanted := message_of(following)) is not None:
                        link = (wanted[0], rank)
                        asked[link] = max(asked[link], coming[link].index(wanted[1]) + 1)
                step = order[places[rank]]
                wanted, before = message_of(step), needs(step, chunks)
                if wanted is not None and coming[wanted[0], rank].index(wanted[1]) >= moved_on[wanted[0], rank]:
                    break
                assert wanted is not None or before is None or before in done[rank], step  # its own earlier pass
                done[rank].add(step)
                for receiver, _ in sent_messages([step], schedule, pipeline):
                    sent[rank, receiver] = sent.get((rank, receiver), 0) + 1
                places[rank] += 1
                moved = True
        for link in coming:
            if moved_on[link] < min(sent.get(link, 0), asked[link]):
                moved_on[link] += 1
                moved = True
    assert places == [len(order) for order in plan], "a rank waits for ever"
    assert all(moved_on[link] == len(messages) for link, messages in coming.items())


def bubble(schedule, pipeline, micro_batches, costs):
    """Time that the last rank to end lost, where every chunk takes the same."""
    of_chunks = evenly(schedule, pipeline, costs)
    work = micro_batches * sum(costs) * len(of_chunks) / pipeline
    return max(finish_times(order_passes(schedule, pipeline, micro_batches, of_chunks), of_chunks)) - work


FULL = [depth for depth in DEPTHS if depth[1] >= depth[0]]


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), UNEVEN])
@pytest.mark.parametrize(("pipeline", "micro_batches"), FULL)
def test_the_bubble_of_one_run_of_layers_is_the_papers(pipeline, micro_batches, costs):
    forward, inputs, weights = costs
    assert bubble(ZERO_BUBBLE, pipeline, micro_batches, costs) == pytest.approx((pipeline - 1) * (forward + inputs - weights))
    one = (pipeline - 1) * (forward + inputs + weights)
    assert bubble(ONE_PASS, pipeline, micro_batches, (forward, inputs + weights, 0.0)) == pytest.approx(one)


@pytest.mark.parametrize(("pipeline", "micro_batches"), FULL)
def test_a_folded_pipeline_waits_only_for_its_first_activation(pipeline, micro_batches):
    """A chunk is half of a rank's layers: with F = B = W of 1 a chunk, a sixth of 1F1B's (p - 1) x 6."""
    assert bubble(FOLDED, pipeline, micro_batches, (1.0, 1.0, 1.0)) == pytest.approx(pipeline - 1)


@pytest.mark.parametrize("costs", [UNEVEN, (1.0, 1.6, 1.0), (1.0, 2.0, 1.0)])
@pytest.mark.parametrize(("pipeline", "micro_batches"), FULL)
def test_a_folded_pipeline_is_no_worse_than_one_run_of_layers(pipeline, micro_batches, costs):
    doubled = tuple(2 * cost for cost in costs)
    assert bubble(FOLDED, pipeline, micro_batches, costs) <= bubble(ZERO_BUBBLE, pipeline, micro_batches, doubled) + 1e-9


@pytest.mark.parametrize(("schedule", "pipeline", "micro_batches"), EACH)
def test_no_rank_keeps_more_than_1f1bs_first_stage(schedule, pipeline, micro_batches):
    """In layers' activations, the model having as many as chunks; what weight gradients wait for counts with the folded one."""
    chunks = chunk_count(schedule, pipeline)
    for rank, order in enumerate(order_passes(schedule, pipeline, micro_batches, evenly(schedule, pipeline, UNEVEN))):
        kept = most = owed = most_owed = 0
        for kind, _, _ in order:
            kept += (
                {FORWARD: 1, INPUTS: 0, WEIGHTS: -1}[kind] if schedule == FOLDED else {FORWARD: 1, INPUTS: -1, WEIGHTS: 0}[kind]
            )
            owed += {FORWARD: 0, INPUTS: 1, WEIGHTS: -1}[kind]
            most = max(most, kept)
            most_owed = max(most_owed, owed if kind == FORWARD else 0)
        assert most <= (chunks if schedule == FOLDED else min(pipeline - rank, micro_batches))
        if schedule == ZERO_BUBBLE:
            assert most_owed <= rank


# digests of orders found by choosing anew after every pass: (stages, micro batches) -> of chunks that cost the same, and
# of chunks that do not
FOLDED_ORDERS = {
    (2, 1): ("d2278e0800d5b1fd", "d2278e0800d5b1fd"),
    (2, 7): ("ac9ad562398c877b", "99608e674c7f1cb3"),
    (3, 2): ("5efdd56c234e77d9", "5efdd56c234e77d9"),
    (4, 3): ("55f9b4fe2394ed37", "d4da4a1d73f5786e"),
    (4, 9): ("727551ee9906d785", "70de0373d8211d4e"),
    (8, 16): ("42856ecfd3ced308", "c9c61b08add32b96"),
    (16, 64): ("5b8d561935c7c279", "764804e215538602"),
}


@pytest.mark.parametrize(("depth", "digests"), FOLDED_ORDERS.items())
def test_folded_orders_are_those_of_choosing_anew_after_every_pass(depth, digests):
    even = evenly(FOLDED, depth[0], UNEVEN)
    uneven = tuple(Costs(1 + c % 3 / 4, 1.25 + c % 5 / 8, 0.75 + c % 2 / 8) for c in range(2 * depth[0]))
    for costs, digest in zip((even, uneven), digests, strict=True):
        orders = order_passes(FOLDED, *depth, costs)
        text = " ".join(f"{kind}{micro_batch}.{chunk}" for order in orders for kind, micro_batch, chunk in order)
        assert blake2b(text.encode(), digest_size=8).hexdigest() == digest
