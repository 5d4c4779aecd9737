"""Gradients go to the rank that owns them, beside the backward passes; weights come back beside the forward passes; and no result
changes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from recipes.common.model.main_grads import main_grad_of
from recipes.common.parallel import gradient_buckets
from recipes.common.recipe import SGD, AdamW, Layout
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer, rank_batches, train_in_layout

ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5, weight_decay=0.1)


def trial_of(bucket, *, precision="bf16", tied=False, family="llama", global_seqs=4, **layout):
    config = fp16_config(initial_scale_power=12) if precision == "fp16" else ds_config(f"zero1_{precision}.json")
    config["zero_optimization"] |= {"reduce_bucket_size": bucket}
    return Trial(
        model=tiny_config(family, num_hidden_layers=4, tie_word_embeddings=tied),
        layout=Layout(**layout),
        world_size=4,
        optimizer=ADAMW,
        deepspeed=config,
        steps=2,
        global_seqs=global_seqs,
    )


def _train(trials):
    """For each trial: losses, norms, weights, and in which order the second step added gradients and sent them."""
    allow_fp16()
    results = []
    for trial in trials:
        trainer, events = build_trial_trainer(trial), []
        small = trial.deepspeed["zero_optimization"]["reduce_bucket_size"] == SMALL
        if small:
            trainer.leave_weights_to_next_step()
        for index, parameter in enumerate(trainer.stage.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda _, events=events: events.append(("visit", 0)))
            if (main_grad := main_grad_of(parameter)) is not None:
                main_grad._adding = _recording(events, "gradient", index, main_grad._adding)
        real = gradient_buckets.start_reduction, dist.all_reduce
        gradient_buckets.start_reduction = _recording(events, "reduction", 0, real[0])
        dist.all_reduce = _recording(events, "all_reduce", 0, real[1])
        steps = []
        for batch in rank_batches(trial, trainer):
            events.clear()
            for parameter in trainer._buckets._unwritten if small else ():  # whatever the step before leaves
                trainer._buckets._part_of[parameter].fill_(torch.nan)
            steps.append(trainer.train_step(batch, 1e-3, trial.global_seqs * trial.seq_len))
        gradient_buckets.start_reduction, dist.all_reduce = real
        events += [("gather", index) for index in trainer._gathers._works]
        place = trainer.grid.pipeline_rank, trainer.grid.tensor_rank
        zero = trainer.engine.optimizer
        flats = zip(getattr(zero, "bf16_groups_flat", None) or zero.bit16_groups_flat, zero.real_dp_process_group, strict=True)
        groups = [flat.numel() for flat, group in flats if dist.get_world_size(group) > 1]  # an expert may be on one rank
        numbers = [(step.loss, step.grad_norm) for step in steps]
        results.append((place, numbers, {n: p.float().clone() for n, p in trainer.hf_shards().items()}, events, groups))
    return results


def _recording(events, name, position, real):
    """Note each call: the size of the tensor at this position, or the position where there are none."""

    def recorded(*tensors, **options):
        events.append((name, [*tensors, options.get("tensor")][position].numel() if tensors or options else position))
        return real(*tensors, **options)

    return recorded


SMALL, WHOLE = 6000, 50_000_000
LAYOUTS = {
    "interleaved": {"pipeline": 2, "chunks": 2},
    "folded, tied": {"tied": True, "pipeline": 2, "pipeline_schedule": "zero_bubble_v"},
    "experts": {"family": "mixtral", "pipeline": 2, "expert": 2, "pipeline_schedule": "zero_bubble"},
    "experts, a micro batch a step": {"family": "mixtral", "pipeline": 2, "pipeline_schedule": "zero_bubble", "global_seqs": 2},
    "zero bubble": {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
    "no pipeline": {"tensor": 2},
    "fp16, tied": {"precision": "fp16", "tied": True, "pipeline": 2},
    "fp32, no pipeline": {"precision": "fp32", "tensor": 2},
}


@pytest.fixture(scope="module")
def trained():
    """Layout -> all ranks' results in small buckets, and in one bucket a kind of parameter."""
    trials = [trial_of(bucket, **layout) for layout in LAYOUTS.values() for bucket in (SMALL, WHOLE)]
    ranks = run_ranks(_train, 4, trials)
    return {name: [[rank[2 * index + i] for rank in ranks] for i in range(2)] for index, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reductions_start_before_the_last_gradient_is_there(trained, layout):
    for place, _, _, events, groups in trained[layout][0]:
        sent = [count for name, count in events if name == "reduction"]
        assert len(groups) > 3
        assert sorted(sent) == sorted(groups), "each gradient once a step, to its owner"
        assert max(count for name, count in events if name == "all_reduce") < SMALL / 4 or "tied" in layout
        kinds = [name for name, _ in events]
        last = len(kinds) - min(kinds[::-1].index(name) for name in ("gradient", "visit"))
        assert "reduction" in kinds[:last], f"stage {place}"


def test_a_zero_bubbles_last_gradients_come_layer_by_layer(trained):
    """On the first stage with the last backward pass, while it visits norms; on the last one, which has deferred both micro
    batches', a layer's of both before those of the layer before."""
    for (stage, _), _, _, events, _ in trained["zero bubble"][0]:
        after = events[[name for name, _ in events].index("reduction") :]
        added = [index for name, index in after if name == "gradient"]
        assert added
        if stage == 0:
            assert ("visit", 0) in after
        else:
            assert all(added.count(index) == 2 for index in added)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updated_weights_are_left_to_the_next_step_where_it_is_asked(trained, layout):
    """In every precision: each flat group of weights is under way after a step, or none is."""
    small, whole = trained[layout]
    for _, _, _, events, groups in small:
        assert sum(name == "gather" for name, _ in events) == len(groups)
    assert all(name != "gather" for _, _, _, events, _ in whole for name, _ in events)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_stage_reduce_in_one_order(trained, layout):
    orders = {}
    for place, _, _, events, _ in trained[layout][0]:
        order = [count for name, count in events if name == "reduction"]
        assert orders.setdefault(place, order) == order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buckets_change_no_bit(trained, layout):
    """The sum of two ranks' gradients does not depend on where in a message they lie, nor a step on when its weights came, or
    on the gradients of the step before."""
    small, whole = trained[layout]
    for (_, numbers, weights, *_), (_, wanted, others, _, groups) in zip(small, whole, strict=True):
        assert numbers == wanted
        assert weights.keys() == others.keys()
        assert all(weights[name].equal(other) for name, other in others.items())
        assert len(groups) <= 3


def _reduced(trials):
    right = []
    for trial in trials:
        trainer = build_trial_trainer(trial)
        flats = trainer.engine.optimizer.fp32_groups_gradients_flat
        assert all(map(trainer._buckets.adding, trainer.stage.parameters())), "nothing is there of this step"
        for index, flat in enumerate(flats):
            flat.copy_(torch.arange(flat.numel()) % 7 + index + 4 * trainer.grid.data_rank)
        trainer.engine.buffered_allreduce_fallback()
        expected = [torch.arange(flat.numel()) % 7 + index + 2.0 for index, flat in enumerate(flats)]
        own = trainer.grid.data_rank
        right += [flat.chunk(2)[own].equal(mean.chunk(2)[own]) for flat, mean in zip(flats, expected, strict=True)]
    return right


def _summed(trial):
    """Gradients of which each element says its rank: are this rank's own the means over the data ranks, and those of replicated
    parameters the sum over the tensor ranks, by one message? And no backward pass has sent them."""
    trainer = build_trial_trainer(trial)
    optimizer, grid, sent, real = trainer.engine.optimizer, trainer.grid, [], dist.all_reduce
    ends = "norm.weight", "o_proj.bias", "down_proj.bias"
    part_of = {parameter for name, parameter in trainer.stage.causal.named_parameters() if name.endswith(ends)}

    def all_reduce(tensor, **options):
        if options.get("group") is grid.tensor_group:
            sent.append((tensor.dtype, tensor.numel()))
        return real(tensor, **options)

    dist.all_reduce = all_reduce
    trainer.train_step(rank_batches(trial, trainer)[0], 1e-3, trial.global_seqs * trial.seq_len)
    in_training = [numel for dtype, numel in sent if dtype == torch.float32 and numel > 2 * trial.chunk_tokens]
    in_16_bits = {numel for dtype, numel in sent if dtype == torch.bfloat16}
    right, flats = [], optimizer.fp32_groups_gradients_flat
    for flat, parameters in zip(flats, optimizer.bf16_groups, strict=True):
        assert all(map(trainer._buckets.adding, parameters)), "nothing is there of this step"
        flat.copy_(torch.arange(flat.numel()) % 7 + 4 * grid.data_rank + 100 * grid.tensor_rank)
    trainer.engine.buffered_allreduce_fallback()
    for flat, parameters in zip(flats, optimizer.bf16_groups, strict=True):
        expected, offset = torch.arange(flat.numel()) % 7 + 2.0 + 100 * grid.tensor_rank, 0
        for parameter in parameters:
            place = slice(offset, offset := offset + parameter.numel())
            if parameter in part_of:
                expected[place] = 2 * (expected[place] - 100 * grid.tensor_rank) + 100
        right.append(flat.chunk(2)[grid.data_rank].equal(expected.chunk(2)[grid.data_rank]))
    return right, in_training, in_16_bits, len(part_of)


def test_norms_and_row_biases_are_summed_over_tensor_ranks_once_a_step():
    config = tiny_config("llama", num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    trial = replace(trial_of(WHOLE, tensor=2, sequence_parallel=True), model=config)
    micro_batch, width = trial.seq_len * config.hidden_size, config.hidden_size
    ranks = run_ranks(_summed, 4, trial)
    for right, in_training, in_16_bits, count in ranks:
        assert right == [True] * 2 and count == 9
        assert len(in_training) == 1, "one message a step"
        assert in_16_bits == {micro_batch}, "the embedding's output and the head's input: no parameter's"
    # tensor ranks of a data rank send as much as each other, and the data ranks together everything
    assert ranks[0][1] == ranks[1][1] and ranks[2][1] == ranks[3][1]
    assert ranks[0][1][0] + ranks[2][1][0] == 9 * width


def _trained(trials):
    allow_fp16()
    return [train_in_layout(trial)["shards"] for trial in trials]


def test_norms_gradients_are_whole_in_fp16():
    """With the sequence shared and without: a step of SGD changes weights by their gradients."""
    apart = replace(trial_of(WHOLE, precision="fp16", tensor=2), optimizer=SGD(lr=1.0), steps=1)
    trials = [apart, replace(apart, layout=Layout(tensor=2, sequence_parallel=True))]
    for wanted, found in run_ranks(_trained, 4, trials)[:2]:
        norms = [name for name in wanted if name.endswith("norm.weight")]
        assert len(norms) == 9
        for name in norms:
            assert (found[name] - wanted[name]).norm() < 0.02 * (wanted[name] - 1.0).norm(), name


def test_a_rank_has_the_mean_of_its_part():
    """Matrices and vectors are two groups, of 2 data ranks: the mean of a number and of 4 more is 2 more."""
    trial = trial_of(WHOLE, pipeline=2)
    divided = [trial.deepspeed | {"gradient_predivide_factor": 2.0}, trial.deepspeed | {"prescale_gradients": True}]
    trials = [trial, *(replace(trial, deepspeed=config) for config in divided)]
    assert run_ranks(_reduced, 4, trials) == [[True] * 6] * 4


def _masters(trial):
    """Are the optimizer's weights the model's own, and do they change together?"""
    trainer = build_trial_trainer(trial)
    optimizer = trainer.engine.optimizer
    masters = optimizer.single_partition_of_fp32_groups
    parts = [parts[dist.get_rank(group)] for parts, group in zip(
        optimizer.parallel_partitioned_bit16_groups, optimizer.real_dp_process_group, strict=True
    )]  # fmt: skip
    before = [master.clone() for master in masters]
    trainer.train_step(rank_batches(trial, trainer)[0], 1e-3, trial.global_seqs * trial.seq_len)
    one = [master.data_ptr() == part.data_ptr() for master, part in zip(masters, parts, strict=True)]
    return all(one), any(not master.equal(old) for master, old in zip(masters, before, strict=True))


def test_fp32_weights_are_their_own_master_weights():
    assert run_ranks(_masters, 4, trial_of(WHOLE, precision="fp32", tensor=2)) == [(True, True)] * 4
