"""Schedules on NCCL's streams: which run, which wait for ever, and that what is played is what the executor does."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from recipes.common.config.placement import FOLDED, ONE_PASS, ZERO_BUBBLE, Placement, coordinates, placement_of
from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import attention_costs, layer_costs
from recipes.common.model.gradient_sums import StepSums
from recipes.common.model.initial_weights import build_empty
from recipes.common.pipeline import executor, stage_messages
from recipes.common.pipeline.partition import partition_layers, pass_costs
from recipes.common.pipeline.schedules import FORWARD, INPUTS, Costs, Message, Pass, finish_times, order_passes
from recipes.common.pipeline.streams import (
    AHEAD,
    GROUP,
    PAIR,
    STREAMS,
    Operation,
    deadlock,
    evaluation_programs,
    schedule_problem,
    training_programs,
)
from recipes.common.pipeline.streams import finish_times as played_times
from recipes.common.recipe import ROOT, Layout, derive_sizes
from tests.support.shelf import read_shelf
from tools.common.recipe_io import load_recipe

DEPTHS = [(2, 1), (2, 5), (3, 2), (3, 8), (4, 3), (4, 12), (5, 20), (8, 6), (8, 20), (16, 20)]  # stages, micro batches
COSTS = [(1.0, 1.0, 1.0), (1.0, 1.6, 1.0), (1.0, 2.0, 1.0), (1.0, 1.25, 0.75)]


def evenly(placement, costs):
    return (Costs(*costs),) * placement.count


@pytest.mark.parametrize("schedule", [ONE_PASS, ZERO_BUBBLE])
@pytest.mark.parametrize(("pipeline", "micro_batches"), DEPTHS)
def test_schedules_without_a_fold_run_where_each_pair_has_a_stream(pipeline, micro_batches, schedule):
    """Whatever passes cost; with one chunk a rank, also where all of a group share a stream."""
    for chunks, streams in [(1, GROUP), (1, PAIR), (2, PAIR), (3, PAIR)]:
        placement = Placement(schedule, pipeline, chunks)
        costs = evenly(placement, COSTS[0])
        for ahead in (0, AHEAD):
            assert deadlock(training_programs(placement, micro_batches, costs, streams, ahead)) is None
        assert deadlock(evaluation_programs(placement, micro_batches, streams)) is None


@pytest.mark.parametrize(("pipeline", "micro_batches"), DEPTHS)
def test_a_folded_schedule_runs_where_each_pair_has_a_stream(pipeline, micro_batches):
    placement = Placement(FOLDED, pipeline, 2)
    for costs in COSTS if pipeline < 8 else COSTS[1:2]:
        assert schedule_problem(placement, [micro_batches], evenly(placement, costs), PAIR) is None
    for streams in STREAMS:
        assert deadlock(evaluation_programs(placement, micro_batches, streams)) is None


def test_a_folded_schedule_that_one_stream_a_group_cannot_run_is_named():
    placement = Placement(FOLDED, 4, 2)
    costs = evenly(placement, (1.0, 1.6, 1.0))
    problem = schedule_problem(placement, [8, 20, 20], costs, GROUP)
    assert problem.startswith(
        "pipeline_schedule='zero_bubble_v' with pipeline=4 and 20 micro batches in a step would wait for ever on one stream for "
        "each group: the message for F8 to chunk 1 before F8 in chunk 1 before the message for B3 to chunk 1 before "
    )
    assert schedule_problem(placement, [8], costs, GROUP) is None
    assert schedule_problem(placement, [8, 20], costs, PAIR) is None


@pytest.mark.parametrize(
    ("placement", "counts", "told"),
    [
        (Placement(ZERO_BUBBLE, 4, 2), [12], "chunks=2 with pipeline=4 and 12 micro batches in a step would wait for ever"),
        (Placement(ONE_PASS, 8, 2), [16], "micro batches in an evaluation would wait for ever on one stream for each group: "),
    ],
)
def test_an_interleaved_schedule_that_one_stream_a_group_cannot_run_is_named(placement, counts, told):
    costs = evenly(placement, COSTS[0])
    assert told in schedule_problem(placement, counts, costs, GROUP)
    assert schedule_problem(placement, counts, costs, PAIR) is None


def test_messages_in_the_wrong_order_are_a_deadlock():
    first, second = (Operation(Message(FORWARD, i, 1), (("down", 0, 1),)) for i in (0, 1))
    assert deadlock([[first, second], [first, second]]) is None
    assert deadlock([[first, second], [second, first]]) is not None


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("schedule", [ONE_PASS, ZERO_BUBBLE])
def test_free_messages_take_the_time_of_the_plan(schedule, streams):
    """What is played ends when the schedule's own arithmetic says, where no message waits for another."""
    for chunks in (1, 2):
        placement = Placement(schedule, 4, chunks)
        costs = evenly(placement, (1.0, 1.5, 0.5 if schedule == ZERO_BUBBLE else 0.0))
        played = played_times(training_programs(placement, 8, costs, PAIR), costs)
        assert played == pytest.approx(finish_times(order_passes(placement, 8, costs), costs))


@pytest.mark.parametrize(("schedule", "chunks"), [(ONE_PASS, 1), (ZERO_BUBBLE, 1), (FOLDED, 1), (ONE_PASS, 2), (ZERO_BUBBLE, 3)])
@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 1), (2, 4), (3, 5), (4, 6)])
def test_what_is_played_is_what_the_executor_does(monkeypatch, pipeline, micro_batches, schedule, chunks):
    """Its passes, sends and receives, in its order and groups, on every rank; a pass takes the message that it is said to."""
    layout = Layout(pipeline=pipeline, pipeline_schedule=schedule, chunks=chunks)
    placement = placement_of(layout)
    costs = evenly(placement, COSTS[1])
    for rank, program in enumerate(training_programs(placement, micro_batches, costs, PAIR)):
        done = []
        monkeypatch.setattr(
            stage_messages.dist, "irecv", lambda tensor, peer, group, done=done: done.append(("message", peer, group))
        )
        monkeypatch.setattr(
            stage_messages.dist, "isend", lambda tensor, peer, group, done=done: done.append(("message", peer, group))
        )
        own = vars(coordinates(rank, pipeline, layout))
        grid = SimpleNamespace(**own, down_group="down", up_group="up", rank_of_stage=lambda stage: stage)
        _Recorder(grid, placement, costs, micro_batches, done).train()
        assert done == [_seen(operation, rank) for operation in program]


def _seen(operation, rank):
    if isinstance(operation.event, Pass):
        return operation.event, operation.after
    [(group, low, high)] = operation.streams
    return "message", low + high - rank, group


class _Recorder(executor.PipelineExecutor):
    """Runs no layers, and waits for nothing that a message would bring."""

    def __init__(self, grid, placement, costs, micro_batches, done):
        stage = SimpleNamespace(placement=placement, pass_costs=costs, weight_grad_stores=(), head_sums=StepSums())
        super().__init__(SimpleNamespace(micro_batches=micro_batches, data_iterator=None), stage, grid)
        self._tensor, self._done = torch.empty(1, device="meta"), done
        self._templates, self._told = dict.fromkeys(range(placement.count), self._tensor), set(range(placement.count))

    def _pass(self, step, mail, following):
        message = self._message(step)
        if message is not None:
            mail._receiving.pop(message)  # an error if it was not posted before
        self._done.append((step, message))
        if following is not None and 0 <= following.chunk < self._placement.count:
            mail._sending.clear()
            self._deliver(following, self._tensor, mail)
            mail._sending.clear()

    def _forward(self, step, mail):
        self._pass(step, mail, Message(FORWARD, step.micro_batch, step.chunk + 1))

    def _backward(self, step, mail, at_once):
        self._pass(step, mail, Message(INPUTS, step.micro_batch, step.chunk - 1))

    def _weight_gradients(self, step, micro_batches):
        self._done.append((step, None))


@pytest.mark.parametrize("name", read_shelf())
def test_every_recipe_of_the_shelf_runs_where_each_pair_has_a_stream(name):
    """With one chunk a rank, also where all messages of a group share one: what waits there includes what waits elsewhere.

    A step of more than eight laps is one of eight with its steady part repeated.
    """
    recipe = load_recipe(str(ROOT / "recipes" / f"{name}.py"))
    counts = defaultdict(set)
    for world, layout in recipe.layouts.items():
        if layout.pipeline > 1:
            most = 8 * layout.pipeline
            counts[layout] |= {min(count, most + count % layout.pipeline) for count in micro_batch_counts(recipe, layout, world)}
    for layout, of_layout in counts.items():
        alone = layout.chunks == 1 and layout.pipeline_schedule != FOLDED
        found = problems_by_streams(recipe, layout, of_layout, GROUP if alone else PAIR)
        assert not any(found.values()), layout


@pytest.mark.parametrize("placement", [Placement(ONE_PASS, 8), Placement(ZERO_BUBBLE, 8), Placement(ZERO_BUBBLE, 8, 4)])
def test_a_longer_step_repeats_its_steady_part(placement):
    """A step with a lap more begins as the shorter one begins, and ends as that ends."""
    costs, lap = evenly(placement, COSTS[1]), placement.pipeline
    for shorter, longer in zip(*(order_passes(placement, laps * lap, costs) for laps in (8, 9)), strict=True):
        later = [step._replace(micro_batch=step.micro_batch + lap) for step in shorter]
        differ = (place for place, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b)
        alike = next(differ, len(shorter))
        assert longer[len(longer) - len(shorter) + alike :] == later[alike:]


def test_the_largest_recipe_may_be_folded():
    """405B at 16 stages, with the costs of its layers: it runs as we start NCCL, and is refused where a device is bound."""
    recipe = load_recipe(str(ROOT / "recipes" / "llama_405b.py"))
    world, layout = max(recipe.layouts.items())
    assert layout.pipeline == 16
    layout = replace(layout, pipeline_schedule=FOLDED, chunks=1, layers_per_stage=())
    found = problems_by_streams(recipe, layout, micro_batch_counts(recipe, layout, world), *STREAMS)
    assert found[PAIR] is None
    assert "pipeline_schedule='zero_bubble_v' with pipeline=16 and 32 micro batches in a step would wait for ever" in found[GROUP]


def micro_batch_counts(recipe, layout, world):
    counts = {derive_sizes(recipe, layout, world).accumulation}
    for _, global_seqs in recipe.batch.ramp:
        counts.add(
            derive_sizes(replace(recipe, batch=replace(recipe.batch, global_seqs=global_seqs)), layout, world).accumulation
        )
    return counts


def problems_by_streams(recipe, layout, counts, *streams):
    causal = build_empty(recipe.model)
    stack = find_stack(causal)
    costs, head_cost = layer_costs(causal, stack, recipe.batch.seq_len)
    chunks = partition_layers(costs, head_cost, placement_of(layout), layout.layers_per_stage)
    attention, recomputed = attention_costs(causal, stack, recipe.batch.seq_len), layout.recomputed_layers(len(costs))
    of_chunks = pass_costs(costs, attention, head_cost, chunks, recomputed, 0.25)
    return {each: schedule_problem(placement_of(layout), counts, of_chunks, each) for each in streams}
