"""Schedules as data: every pass once, in an order that no message can block, with the bubble and the memory that they promise."""

from collections import Counter
from hashlib import blake2b
from itertools import accumulate

import pytest

from recipes.common.config.placement import FOLDED, ONE_PASS, ZERO_BUBBLE, Placement
from recipes.common.pipeline.schedules import (
    FORWARD,
    INPUTS,
    MOST_DEFERRED,
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

DEPTHS = [(2, 1), (2, 4), (3, 2), (3, 6), (4, 3), (4, 4), (4, 9), (8, 16)]  # stages, micro batches
KINDS = [(ONE_PASS, 1), (ONE_PASS, 2), (ONE_PASS, 3), (ZERO_BUBBLE, 1), (ZERO_BUBBLE, 2), (ZERO_BUBBLE, 4), (FOLDED, 2)]
EACH = [(Placement(name, ranks, chunks), count) for name, chunks in KINDS for ranks, count in DEPTHS]
UNEVEN = (1.0, 1.25, 0.75)


def evenly(placement, costs):
    return (Costs(*costs),) * placement.count


@pytest.mark.parametrize(("placement", "micro_batches"), EACH)
def test_every_pass_is_run_once_by_its_rank_and_micro_batches_in_order(placement, micro_batches):
    """In order by chunk: gradients are added up as 1F1B adds them."""
    for rank, order in enumerate(order_passes(placement, micro_batches, evenly(placement, UNEVEN))):
        kinds = (FORWARD, INPUTS) if placement.schedule == ONE_PASS else (FORWARD, INPUTS, WEIGHTS)
        own = placement.chunks_of(rank)
        assert len(own) == placement.per_rank and all(placement.rank_of(chunk) == rank for chunk in own)
        assert len(order) == len(kinds) * len(own) * micro_batches
        for kind in kinds:
            for chunk in own:
                assert [i for k, i, c in order if (k, c) == (kind, chunk)] == list(range(micro_batches))


@pytest.mark.parametrize(("placement", "micro_batches"), EACH)
@pytest.mark.parametrize("ahead", [0, 1])
def test_no_order_of_messages_can_block(placement, micro_batches, ahead):
    """As on NCCL: between two ranks, what goes one way moves one message after another, when both have come to it."""
    plan = order_passes(placement, micro_batches, evenly(placement, UNEVEN))
    runs_to_its_end(plan, placement, ahead)


@pytest.mark.parametrize(("placement", "micro_batches"), EACH)
def test_an_evaluation_cannot_block(placement, micro_batches):
    plan = [forward_passes(placement, rank, micro_batches) for rank in range(placement.pipeline)]
    runs_to_its_end(plan, placement, 1)
    assert Counter(step for order in plan for step in order) == Counter(
        Pass(FORWARD, i, chunk) for i in range(micro_batches) for chunk in range(placement.count)
    )


def runs_to_its_end(plan, placement, ahead):
    done, places, sent = [set() for _ in plan], [0] * len(plan), {}
    coming = {}  # (sender, receiver) -> messages in the sender's order
    for sender, order in enumerate(plan):
        for receiver, message in sent_messages(order, placement):
            coming.setdefault((sender, receiver), []).append(message)
    asked, moved_on = dict.fromkeys(coming, 0), dict.fromkeys(coming, 0)

    def message_of(step):
        before = needs(step, placement.count)
        if before is None or placement.rank_of(before.chunk) == placement.rank_of(step.chunk):
            return None
        return placement.rank_of(before.chunk), Message(step.kind, step.micro_batch, step.chunk)

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
                wanted, before = message_of(step), needs(step, placement.count)
                if wanted is not None and coming[wanted[0], rank].index(wanted[1]) >= moved_on[wanted[0], rank]:
                    break
                assert wanted is not None or before is None or before in done[rank], step  # its own earlier pass
                done[rank].add(step)
                for receiver, _ in sent_messages([step], placement):
                    sent[rank, receiver] = sent.get((rank, receiver), 0) + 1
                places[rank] += 1
                moved = True
        for link in coming:
            if moved_on[link] < min(sent.get(link, 0), asked[link]):
                moved_on[link] += 1
                moved = True
    assert places == [len(order) for order in plan], "a rank waits for ever"
    assert all(moved_on[link] == len(messages) for link, messages in coming.items())


def bubble(placement, micro_batches, costs):
    """Time that the last rank to end lost, where every chunk takes the same."""
    of_chunks = evenly(placement, costs)
    work = micro_batches * sum(costs) * placement.per_rank
    return max(finish_times(order_passes(placement, micro_batches, of_chunks), of_chunks)) - work


FULL = [depth for depth in DEPTHS if depth[1] >= depth[0]]


@pytest.mark.parametrize(
    ("placement", "layers", "spans"),
    [
        (Placement(ONE_PASS, 2), (5, 3), (72.9, 69.6)),
        (Placement(ZERO_BUBBLE, 2), (5, 3), (66.9, 64.3)),
        (Placement(FOLDED, 2, 2), (2, 2, 3, 1), (63.95, 62.3)),
    ],
)
def test_nobody_waits_for_what_is_late(placement, layers, spans):
    """Four micro batches of eight layers; a head that costs 1.65 of them, whose weight gradient comes at once or is late.

    The rank of five layers has 60 to do. With a late one it waits for 5 + 3 + 2 x 1.65 + 3 of the first micro batch less two
    forward passes of 5 (zero bubble), or for its first input, 2, and 2 + 5 + 1 + 2 x 1.65 + 1 less 2 + 10 (folded).
    """
    for wanted, late in zip(spans, (0.0, 1.65), strict=True):
        costs = [Costs(count, count, count) for count in layers]
        if placement.schedule == ONE_PASS:
            costs = [Costs(count, 2.0 * count, 0.0) for count in layers]
        costs[-1] = costs[-1]._replace(forward=costs[-1].forward + 3 * 1.65 - late, late=late)
        ends = finish_times(order_passes(placement, 4, tuple(costs)), tuple(costs))
        assert max(ends) == pytest.approx(wanted)


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), UNEVEN])
@pytest.mark.parametrize(("pipeline", "micro_batches"), FULL)
def test_the_bubble_is_the_papers(pipeline, micro_batches, costs):
    """Of costs a chunk: with v of them to a rank, a v-th of what the same layers in one chunk lose."""
    forward, inputs, weights = costs
    for chunks in (1, 2, 3) if micro_batches % pipeline == 0 else (1,):
        filled = Placement(ZERO_BUBBLE, pipeline, chunks)
        assert bubble(filled, micro_batches, costs) == pytest.approx((pipeline - 1) * (forward + inputs - weights))
        plain = Placement(ONE_PASS, pipeline, chunks)
        lost = (pipeline - 1) * (forward + inputs + weights)
        assert bubble(plain, micro_batches, (forward, inputs + weights, 0.0)) == pytest.approx(lost)


@pytest.mark.parametrize(("pipeline", "micro_batches"), FULL)
def test_a_folded_pipeline_waits_only_for_its_first_activation(pipeline, micro_batches):
    """A chunk is half of a rank's layers: with F = B = W of 1 a chunk, a sixth of 1F1B's (p - 1) x 6."""
    assert bubble(Placement(FOLDED, pipeline, 2), micro_batches, (1.0, 1.0, 1.0)) == pytest.approx(pipeline - 1)


@pytest.mark.parametrize("costs", [UNEVEN, (1.0, 1.6, 1.0), (1.0, 2.0, 1.0)])
@pytest.mark.parametrize(("pipeline", "micro_batches"), FULL)
def test_a_folded_pipeline_is_no_worse_than_one_run_of_layers(pipeline, micro_batches, costs):
    one_run = bubble(Placement(ZERO_BUBBLE, pipeline), micro_batches, tuple(2 * cost for cost in costs))
    assert bubble(Placement(FOLDED, pipeline, 2), micro_batches, costs) <= one_run + 1e-9


@pytest.mark.parametrize(("placement", "micro_batches"), EACH)
def test_a_rank_keeps_no_more_than_the_papers_say(placement, micro_batches):
    """In chunks' activations: with a zero bubble of several chunks a rank, until their weights' gradients are computed."""
    (_, pipeline, chunks), one_pass = vars(placement).values(), placement.schedule == ONE_PASS
    for rank, order in enumerate(order_passes(placement, micro_batches, evenly(placement, UNEVEN))):
        way = pipeline - 1 - rank if chunks == 1 or one_pass else pipeline - 1
        limit = (chunks - 1) * pipeline + way * (2 if one_pass and chunks > 1 else 1) + 1
        last = INPUTS if one_pass or chunks == 1 else WEIGHTS
        kept = max(accumulate((kind == FORWARD) - (kind == last) for kind, _, _ in order))
        assert kept <= min(limit, micro_batches * chunks)
        if micro_batches % pipeline == 0 and not placement.folded:
            assert kept == min(limit, micro_batches * chunks)
        owed = accumulate({FORWARD: 0, INPUTS: 1, WEIGHTS: -1}[kind] for kind, _, _ in order)
        if placement.schedule == ZERO_BUBBLE:
            assert max(value for value, step in zip(owed, order, strict=True) if step.kind == FORWARD) <= rank


def of_layers(chunks, **options):
    """Costs of chunks with so many layers, all of which cost the same."""
    return tuple(Costs(*(cost * len(chunk) for cost in UNEVEN), layers=len(chunk), **options) for chunk in chunks)


@pytest.mark.parametrize("micro_batches", [2, 7, 16])
@pytest.mark.parametrize(
    "counts", [(3, 1, 2, 1), (1, 3, 2, 2), (1, 9, 9, 1), (9, 1, 1, 9), (4, 4, 4, 4, 5, 5, 5, 1), (1, 2, 3, 7, 1, 5, 2, 2)]
)
def test_a_folded_rank_keeps_no_more_layers_than_the_first_stage_of_1f1b(counts, micro_batches):
    """Those of as many micro batches as there are ranks, however its layers are divided among its two chunks."""
    ranks = len(counts) // 2
    placement, costs = Placement(FOLDED, ranks, 2), of_layers([range(count) for count in counts])
    orders = order_passes(placement, micro_batches, costs)
    assert sum(map(len, orders)) == 3 * len(counts) * micro_batches
    runs_to_its_end(orders, placement, 1)
    for rank, order in enumerate(orders):
        changes = (((kind == FORWARD) - (kind == WEIGHTS)) * counts[chunk] for kind, _, chunk in order)
        assert max(accumulate(changes)) <= ranks * (counts[rank] + counts[-1 - rank])


def test_a_folded_rank_that_recomputes_defers_few_weight_gradients():
    """Others defer more where that is faster."""
    most = {True: [], False: []}
    for ranks in (2, 4, 8):
        for recomputed, found in most.items():
            costs = of_layers([range(3)] * (2 * ranks), recomputed=recomputed)
            orders = order_passes(Placement(FOLDED, ranks, 2), 2 * ranks, costs)
            owed = [accumulate({FORWARD: 0, INPUTS: 1, WEIGHTS: -1}[kind] for kind, _, _ in order) for order in orders]
            found.append(max(max(each) for each in owed))
    assert max(most[True]) <= MOST_DEFERRED + 1 < max(most[False])  # one more until the next pass


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
    placement = Placement(FOLDED, depth[0], 2)
    even = evenly(placement, UNEVEN)
    uneven = tuple(Costs(1 + c % 3 / 4, 1.25 + c % 5 / 8, 0.75 + c % 2 / 8) for c in range(2 * depth[0]))
    for costs, digest in zip((even, uneven), digests, strict=True):
        orders = order_passes(placement, depth[1], costs)
        text = " ".join(f"{kind}{micro_batch}.{chunk}" for order in orders for kind, micro_batch, chunk in order)
        assert blake2b(text.encode(), digest_size=8).hexdigest() == digest
