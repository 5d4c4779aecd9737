"""The zero-bubble schedule trains what 1F1B trains, to the last bit, with the bubble that its paper states."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.linears import postpone, take_over
from recipes.common.metrics import read_metrics
from recipes.common.recipe import AdamW, Batch, Evaluation, Layout
from recipes.common.weight_queue import WeightQueue
from recipes.common.zero_bubble import Forward, InputGradients, TradeNext, TradePrevious, WeightGradients, ZeroBubbleSchedule
from tests.small_runs import train_run
from tests.test_fp16 import allow_fp16, fp16_config
from tests.tiny import ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.local_ranks import run_ranks
from tools.common.numerics import Trial, train_in_layout

ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)
DEPTHS = [(2, 1), (2, 4), (3, 2), (3, 6), (4, 3), (4, 4), (4, 9), (8, 16)]  # stages, micro batches


def trial_of(pipeline, tensor=1, data=1, *, family="llama", precision="fp32", recompute_every=0, tied=False, **fields):
    config = fp16_config(initial_scale_power=12) if precision == "fp16" else ds_config(f"zero1_{precision}.json")
    return Trial(
        model=tiny_config(family, num_hidden_layers=8, tie_word_embeddings=tied),
        layout=Layout(pipeline=pipeline, tensor=tensor, recompute_every=recompute_every),
        world_size=pipeline * tensor * data,
        optimizer=ADAMW,
        deepspeed=config,
        steps=2,
        **{"global_seqs": 6 * data} | fields,
    )


def compare(trial):
    """On each rank: whatever is not equal, bit for bit, after training by both schedules."""
    allow_fp16()
    plain = train_in_layout(trial)
    filled = train_in_layout(replace(trial, layout=replace(trial.layout, schedule="zero_bubble")))
    differing = [name for name, shard in plain["shards"].items() if not shard.equal(filled["shards"][name])]
    return differing + [what for what in ("losses", "norms", "skipped") if plain[what] != filled[what]]


def assert_same_bits(trial):
    assert run_ranks(compare, trial.world_size, trial) == [[]] * trial.world_size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_same_bits_at_every_depth(pipeline, precision):
    assert_same_bits(trial_of(pipeline, precision=precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_bits_with_tensor_and_data_ranks_ties_and_recomputation(precision):
    assert_same_bits(trial_of(2, 2, 2, precision=precision, tied=True, recompute_every=1))


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral", "phi3"])
def test_same_bits_in_other_families(family):
    """Transposed weights with biases, per-head norms whose gradients are summed over tensor ranks, experts, packed linears."""
    assert_same_bits(trial_of(2, 2, family=family, global_seqs=4, recompute_every=3))


def test_same_bits_with_fewer_micro_batches_than_stages():
    assert_same_bits(trial_of(4, global_seqs=2, tied=True))


def test_same_bits_in_fp16():
    assert_same_bits(trial_of(3, precision="fp16"))


def gradients_of_a_linear_used_twice():
    """A norm-like bias, a transposed weight, a frozen one, and a shared weight."""
    torch.manual_seed(0)
    first, second, frozen = nn.Linear(5, 5), Conv1D(5, 5), nn.Linear(5, 5)
    frozen.weight.requires_grad_(False)
    block = nn.ModuleList([first, second, frozen])
    queue = WeightQueue()

    def gradients():
        x = torch.arange(30.0).view(2, 3, 5).requires_grad_()
        queue.begin()
        first(frozen(second(first(x)))).square().sum().backward()
        waiting = [first.weight.grad is None, second.weight.grad is None]
        queue.make_up()
        grads = [x.grad, *(p.grad for p in block.parameters() if p.requires_grad)]
        block.zero_grad()
        return grads, waiting

    take_over(block)
    plain, _ = gradients()
    postpone(block, queue)
    late, waiting = gradients()
    return waiting, len(queue), [a.equal(b) for a, b in zip(plain, late, strict=True)]


def test_weight_gradients_wait_and_are_the_same():
    waiting, left, equal = run_ranks(gradients_of_a_linear_used_twice, 1)[0]
    assert (waiting, left, equal) == ([True, True], 0, [True] * 6)


def test_a_run_with_a_ramp_evaluation_and_a_resume_is_the_same(tmp_path):
    write_shards(tmp_path / "data", tokens=4_000)
    batch = Batch(seq_len=16, micro_seqs=1, global_seqs=6, ramp=((4, 2), (8, 4)))
    recipe = tiny_recipe(tmp_path / "data", steps=4, batch=batch, evaluation=Evaluation(every_steps=2, seqs=5))
    layout = Layout(pipeline=2)
    filled = replace(layout, schedule="zero_bubble")
    train_run(recipe, tmp_path / "plain", layout, 2, steps=4)
    train_run(recipe, tmp_path / "filled", filled, 2, steps=2)
    train_run(recipe, tmp_path / "filled", filled, 2, resume=True, steps=4)
    plain, late = (list(read_metrics(tmp_path / name)) for name in ("plain", "filled"))
    for key in ("loss", "grad_norm", "val_loss", "consumed_seqs"):
        values = [[record.get(key) for record in records] for records in (plain, late)]
        assert values[0] == values[1], key
        assert any(values[0])


def instructions(stages, micro_batches):
    return [
        [instruction for step in ZeroBubbleSchedule(micro_batches, stages, stage).steps() for instruction in step]
        for stage in range(stages)
    ]


@pytest.mark.parametrize(("stages", "micro_batches"), DEPTHS)
def test_neighbours_post_their_trades_in_one_order(stages, micro_batches):
    """NCCL runs what two ranks post between them in order: another order on the other side never ends."""
    ranks = instructions(stages, micro_batches)
    for stage in range(stages - 1):
        downward = [(i.send, i.receive) for i in ranks[stage] if isinstance(i, TradeNext)]
        upward = [(i.receive, i.send) for i in ranks[stage + 1] if isinstance(i, TradePrevious)]
        assert downward == upward
        assert [a for a, _ in downward if a is not None] == list(range(micro_batches))
        assert [g for _, g in downward if g is not None] == list(range(micro_batches))


@pytest.mark.parametrize(("stages", "micro_batches"), DEPTHS)
def test_trades_end_even_where_a_rank_runs_them_one_after_another(stages, micro_batches):
    """As on one NCCL stream: a trade is over when both sides have come to it, and a pass waits for the trades that it needs."""
    ranks = instructions(stages, micro_batches)
    posted = [[] for _ in ranks]  # by stage: (lower stage of the two, activation, gradient), in order
    places, over = [0] * stages, set()
    moved = True
    while moved:
        moved = False
        for stage, rank in enumerate(ranks):
            while places[stage] < len(rank) and not waits(rank[places[stage]], stage, stages, over):
                trade = trade_of(rank[places[stage]], stage, stages)
                posted[stage] += [trade] if trade else []
                places[stage] += 1
                moved = True
        for lower in range(stages - 1):
            heads = [next((t for t in posted[stage] if t not in over), None) for stage in (lower, lower + 1)]
            if heads[0] is not None and heads[0] == heads[1]:
                over.add(heads[0])
                moved = True
    assert [place == len(rank) for place, rank in zip(places, ranks, strict=True)] == [True] * stages


def trade_of(instruction, stage, stages):
    down, up = isinstance(instruction, TradeNext), isinstance(instruction, TradePrevious)
    if (down and stage < stages - 1) or (up and stage > 0):
        i = instruction
        trade = (stage, i.send, i.receive) if down else (stage - 1, i.receive, i.send)
        return trade if trade[1:] != (None, None) else None
    return None


def waits(instruction, stage, stages, over):
    """Whether the pass lacks its activation or its gradient."""
    if isinstance(instruction, Forward) and stage > 0:
        return not any(lower == stage - 1 and activation == instruction.micro_batch for lower, activation, _ in over)
    if isinstance(instruction, InputGradients) and stage < stages - 1:
        return not any(lower == stage and gradient == instruction.micro_batch for lower, _, gradient in over)
    return False


def finish_time(stages, micro_batches, costs):
    """When the last stage is done if a pass of each kind takes costs[kind] and messages take no time. Fails on a deadlock."""
    ranks, done, clocks = instructions(stages, micro_batches), {}, [0.0] * stages
    places, waited = [0] * stages, [0] * stages
    moved = True
    while moved:
        moved = False
        for stage, rank in enumerate(ranks):
            while places[stage] < len(rank):
                instruction = rank[places[stage]]
                kind, start = type(instruction), clocks[stage]
                if kind in costs:
                    i = getattr(instruction, "micro_batch", None)
                    neighbour = {Forward: stage - 1, InputGradients: stage + 1}.get(kind, -1)
                    if 0 <= neighbour < stages:
                        if (kind, i, neighbour) not in done:
                            break
                        start = max(start, done[kind, i, neighbour])
                    if kind is WeightGradients:
                        waited[stage] += 1
                        assert (InputGradients, waited[stage] - 1, stage) in done
                    clocks[stage] = done[kind, i, stage] = start + costs[kind]
                places[stage] += 1
                moved = True
    assert all(place == len(rank) for place, rank in zip(places, ranks, strict=True)), "deadlock"
    assert waited == [micro_batches] * stages
    return max(clocks)


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), (1.0, 1.25, 0.75)])
@pytest.mark.parametrize(("stages", "micro_batches"), [depth for depth in DEPTHS if depth[1] >= depth[0]])
def test_the_bubble_is_the_papers(stages, micro_batches, costs):
    forward, inputs, weights = costs
    work = micro_batches * (forward + inputs + weights)
    bubble = finish_time(stages, micro_batches, dict(zip((Forward, InputGradients, WeightGradients), costs, strict=True))) - work
    assert bubble == pytest.approx((stages - 1) * (forward + inputs - weights))


@pytest.mark.parametrize(("stages", "micro_batches"), DEPTHS)
def test_a_stage_keeps_as_much_as_in_1f1b_and_owes_no_more_than_its_index(stages, micro_batches):
    for stage in range(stages):
        in_flight = owed = most_in_flight = most_owed = 0
        for kind, _ in ZeroBubbleSchedule(micro_batches, stages, stage).passes():
            in_flight += {"F": 1, "B": -1, "W": 0}[kind]
            owed += {"F": 0, "B": 1, "W": -1}[kind]
            most_in_flight = max(most_in_flight, in_flight)
            most_owed = max(most_owed, owed if kind == "F" else 0)
        assert most_in_flight == min(stages - stage, micro_batches)
        assert most_owed <= stage
