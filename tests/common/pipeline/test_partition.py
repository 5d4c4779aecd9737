"""The partition into stages: what layers cost, and no other partition has a cheaper most expensive rank."""

import itertools
import random

import pytest

from recipes.common.config.placement import Placement
from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import layer_costs
from recipes.common.model.initial_weights import build_empty
from recipes.common.pipeline.partition import balance_folded, balance_rounds, balance_stages, partition_layers, pass_costs
from recipes.common.pipeline.schedules import Costs
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


def most_expensive_stage(layers, head, stages):
    heads = [0.0] * (len(stages) - 1) + [head]
    return max(sum(layers[i] for i in own) + extra for own, extra in zip(stages, heads, strict=True))


def test_no_partition_is_better():
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 8)
        layers, head = [rng.choice((1.0, 2.0, 5.0, rng.random())) for _ in range(count)], rng.choice((0.0, 1.0, 4.0, 30.0))
        for pipeline in range(1, count + 1):
            stages = balance_stages(layers, head, pipeline)
            assert partition_layers(layers, head, Placement("1f1b", pipeline, 1)) == stages
            assert len(stages) == pipeline
            assert all(len(own) > 0 for own in stages)  # a stage without a layer would have nothing to hand on
            assert [i for own in stages for i in own] == list(range(count))
            boundaries = itertools.combinations(range(1, count), pipeline - 1)
            every = ([range(a, b) for a, b in itertools.pairwise((0, *inner, count))] for inner in boundaries)
            assert most_expensive_stage(layers, head, stages) == pytest.approx(
                min(most_expensive_stage(layers, head, option) for option in every)
            )


@pytest.mark.parametrize(
    ("layers", "head", "pipeline", "lengths"),
    [(5, 0.0, 2, [3, 2]), (4, 0.0, 4, [1, 1, 1, 1]), (4, 100.0, 2, [3, 1]), (16, 2.0, 3, [6, 6, 4]), (1, 3.0, 1, [1])],
)
def test_of_equal_layers_the_last_stage_has_fewer(layers, head, pipeline, lengths):
    assert [len(own) for own in balance_stages([1.0] * layers, head, pipeline)] == lengths


def test_costs_count_matrices_attention_and_the_experts_that_a_token_visits():
    dense, mixture = run_ranks(_costs, 1)[0]
    attention = 2 * 4 * 16 * 32 / 2
    windowed = 2 * 4 * 16 * (8 - 8**2 / (2 * 32))  # a window of 8 keys, and the half of the first ones
    projections = 64 * 64 * 2 + 64 * 32 * 2
    assert dense == ([projections + 3 * 64 * 96 + attention] * 4, 64 * 131)
    assert mixture == ([projections + 4 * 64 + 2 * 3 * 64 * 96 + windowed] * 4, 64 * 131)  # router, 2 of 4 experts


def _costs():
    found = []
    for family in ("llama", "mixtral"):
        causal = build_empty(tiny_config(family), "eager")
        found.append(layer_costs(causal, find_stack(causal), seq_len=32))
    return found


def most_expensive_rank(layers, head, chunks):
    costs = [sum(layers[i] for i in chunk) for chunk in chunks]
    costs[-1] += head
    return max(first + last for first, last in zip(costs, costs[::-1], strict=True))


def test_no_fold_is_better():
    rng = random.Random(1)
    for _ in range(150):
        count = rng.randint(2, 9)
        layers, head = [rng.choice((1.0, 2.0, rng.random() + 0.5)) for _ in range(count)], rng.choice((0.0, 1.0, 4.0, 30.0))
        for pipeline in range(1, count // 2 + 1):
            chunks = balance_folded(layers, head, pipeline)
            assert len(chunks) == 2 * pipeline and all(len(own) > 0 for own in chunks)
            assert [i for own in chunks for i in own] == list(range(count))
            boundaries = itertools.combinations(range(1, count), 2 * pipeline - 1)
            every = ([range(a, b) for a, b in itertools.pairwise((0, *inner, count))] for inner in boundaries)
            best = min(most_expensive_rank(layers, head, option) for option in every)
            assert most_expensive_rank(layers, head, chunks) == pytest.approx(best)


@pytest.mark.parametrize(
    ("layers", "head", "pipeline", "lengths"),
    [(8, 0.0, 2, [2, 2, 2, 2]), (8, 2.0, 2, [2, 2, 3, 1]), (4, 9.0, 2, [1, 1, 1, 1]), (80, 0.0, 8, [5] * 16)],
)
def test_a_rank_of_a_fold_has_two_chunks_as_equal_as_can_be(layers, head, pipeline, lengths):
    assert [len(own) for own in balance_folded([1.0] * layers, head, pipeline)] == lengths


@pytest.mark.parametrize(
    ("layers", "head", "lengths"),
    [
        ([1.0] * 8, 0.0, [2, 2, 2, 2]),
        ([1.0] * 10, 0.0, [3, 3, 2, 2]),
        ([1.0] * 10, 1.0, [3, 3, 3, 1]),
        ([1.0, 1.0, 4.0, 1.0, 1.0, 4.0, 1.0, 1.0], 0.0, [2, 2, 2, 2]),  # 2 and 5 against 5 and 2
        ([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.0, [1, 2, 1, 2]),
    ],
)
def test_chunks_that_go_around_are_even_for_the_ranks_and_among_themselves(layers, head, lengths):
    assert [len(own) for own in balance_rounds(layers, head, Placement("1f1b", 2, 2))] == lengths


def test_405bs_rounds():
    """126 layers in 64 chunks: two each, and one beside the head, which takes as long as the other."""
    chunks = balance_rounds([1.0] * 126, 0.65, Placement("zero_bubble", 16, 4))
    assert sorted(map(len, chunks)) == [1] * 2 + [2] * 62 and len(chunks[-1]) == 1
    costs = [sum(len(chunk) for chunk in chunks[rank::16]) + 0.65 * (rank == 15) for rank in range(16)]
    assert max(costs) == 8.0


def test_the_layouts_layers_per_stage_are_taken():
    assert partition_layers([1.0] * 4, 9.0, Placement("1f1b", 2), (1, 3)) == [range(0, 1), range(1, 4)]
    assert partition_layers([1.0] * 4, 9.0, Placement("1f1b", 2)) == [range(0, 3), range(3, 4)]


def test_a_pass_costs_what_it_computes():
    """The head's gradients come with the loss; scores have no weights; what is recomputed runs again for the input's gradient;
    what is no product is a tenth more of a forward pass, and half as much again of the gradient of its input."""
    chunks = [range(0, 2), range(2, 3)]
    found = pass_costs([10.0] * 3, [1.0] * 3, 5.0, chunks, recomputed=range(0, 3, 2), late_head=0.2)
    assert found == (
        Costs(20.0 + 2.0, 20.0 + 2.0 + 3.0 + 10.0 + 1.0, 18.0, 0.0, layers=2, recomputed=True),
        Costs(10.0 + 1.0 + 14.0, 10.0 + 1.0 + 1.5 + 10.0 + 1.0, 9.0, 1.0, layers=1, recomputed=True),
    )
    assert not any(each.recomputed for each in pass_costs([10.0] * 3, [1.0] * 3, 5.0, chunks, range(0), 0.2))
