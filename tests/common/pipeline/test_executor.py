"""Every schedule trains what 1F1B trains, to the last bit."""

from dataclasses import replace

import pytest
import torch

from recipes.common.model.gradient_sums import StepSums
from recipes.common.pipeline.executor import PipelineExecutor
from recipes.common.pipeline.schedules import INPUTS
from recipes.common.recipe import AdamW, Batch, Evaluation, Layout
from recipes.common.run_dir.metrics import read_metrics
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.small_runs import train_run
from tests.support.tiny import ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, batches, build_trial_trainer, rank_batches, train_in_layout

ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)
FILLED, FOLDED = {"pipeline_schedule": "zero_bubble"}, {"pipeline_schedule": "zero_bubble_v"}
TWICE, FILLED_TWICE = {"chunks": 2}, FILLED | {"chunks": 2}  # around the ranks


def trial_of(
    pipeline, tensor=1, data=1, *, family="llama", precision="fp32", tied=False, layers=None, recompute="none", context=1,
    sequence_parallel=False, **fields,
):  # fmt: skip
    layers = layers or 2 * pipeline  # two chunks a rank
    config = fp16_config(initial_scale_power=12) if precision == "fp16" else ds_config(f"zero1_{precision}.json")
    return Trial(
        model=tiny_config(family, num_hidden_layers=layers, tie_word_embeddings=tied),
        layout=Layout(
            pipeline=pipeline, tensor=tensor, recompute=recompute, context=context, sequence_parallel=sequence_parallel
        ),
        world_size=pipeline * tensor * data,
        optimizer=ADAMW,
        deepspeed=config,
        **{"steps": 2, "global_seqs": 4 * data} | fields,
    )


CASES = {
    "2 stages, bf16": (trial_of(2, precision="bf16", layers=7), (FILLED, FOLDED, FILLED | {"chunks": 3})),
    "3 stages, fp32": (trial_of(3, layers=7, global_seqs=6), (FOLDED, FILLED_TWICE)),
    "3 stages, fp16": (trial_of(3, precision="fp16"), (FOLDED, FILLED_TWICE)),
    "4 stages, bf16, tied, fewer micro batches than stages": (
        trial_of(4, precision="bf16", tied=True, global_seqs=2), (FILLED, FOLDED, FILLED_TWICE),
    ),
    "tensor ranks, bf16, recomputed": (
        trial_of(2, 2, precision="bf16", tied=True, recompute="full", global_seqs=2), (FILLED, FILLED_TWICE),
    ),
    "data ranks, recomputed but for products": (
        trial_of(2, 1, 2, tied=True, recompute="selective", global_seqs=4), (FOLDED, TWICE),
    ),
    "context ranks": (trial_of(2, 1, 2, context=2, global_seqs=2), (FOLDED, FILLED_TWICE)),
    # placeholders of other chunks hand on the shape of whole sequences; folded: tests/test_parity.py
    "sequences shared by tensor ranks": (
        trial_of(2, 2, recompute="selective", steps=1, sequence_parallel=True, global_seqs=2), (FILLED_TWICE,),
    ),
    "transposed weights with biases": (trial_of(2, family="gpt2", recompute="selective"), (FILLED, TWICE)),
    "norms of heads, summed over tensor ranks": (
        trial_of(2, 2, family="qwen3", recompute="selective", global_seqs=2), (FOLDED,),
    ),
    "experts": (trial_of(2, family="mixtral", recompute="selective", global_seqs=2), (FOLDED, FILLED_TWICE)),
    "packed linears": (trial_of(2, family="phi3", recompute="selective", global_seqs=2), (FILLED,)),
    # the bench's side is the same schedule
    "torch's own linears": (trial_of(2, torch_linears=True), (FOLDED,)),
    # each chunk of a rank asks for the positions of its own micro batch
    "documents kept apart": (trial_of(2, document_end=5, attention="sdpa", micro_seqs=2, global_seqs=8), (FOLDED, TWICE)),
}  # fmt: skip


def train_each(cases):
    """Train each by 1F1B, then by each of its schedules, in the same process."""
    allow_fp16()
    return [
        [train_in_layout(replace(trial, layout=replace(trial.layout, **schedule))) for schedule in ({}, *schedules)]
        for trial, schedules in cases
    ]


@pytest.fixture(scope="module")
def trained():
    """Name -> what all ranks held after 1F1B and after each schedule."""
    found = {}
    for world_size in (2, 3, 4):
        cases = {name: case for name, case in CASES.items() if case[0].world_size == world_size}
        by_case = zip(*run_ranks(train_each, world_size, list(cases.values())), strict=True)
        found |= {name: [*zip(*ranks, strict=True)] for name, ranks in zip(cases, by_case, strict=True)}
    return found


def weights_of(ranks):
    """(Hugging Face name, tensor rank) -> shard, of all stages."""
    return {(name, rank["held"].tensor_rank): shard for rank in ranks for name, shard in rank["shards"].items()}


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_1f1b(trained, name):
    """Losses, norms, skipped steps and every weight after training are 1F1B's, whichever rank holds them."""
    plain, *others = trained[name]
    wanted = weights_of(plain)
    for schedule, other in zip(CASES[name][1], others, strict=True):
        found = weights_of(other)
        assert found.keys() == wanted.keys()
        assert [key for key, shard in wanted.items() if not shard.equal(found[key])] == []
        for what in ("losses", "norms", "skipped"):
            assert [rank[what] for rank in other] == [rank[what] for rank in plain], (schedule, what)


def test_a_run_with_a_ramp_and_evaluation_goes_on_in_another_schedule(tmp_path):
    write_shards(tmp_path / "data", tokens=4_000)
    batch = Batch(seq_len=16, micro_seqs=1, global_seqs=6, ramp=((4, 2), (8, 4)))
    recipe = tiny_recipe(tmp_path / "data", steps=4, batch=batch, evaluation=Evaluation(every_steps=2, seqs=5))
    layout = Layout(pipeline=2)
    train_run(recipe, tmp_path / "plain", layout, 2, steps=4)
    for name, first, second in (("folded", FILLED, FOLDED), ("interleaved", TWICE, FILLED_TWICE)):
        train_run(recipe, tmp_path / name, replace(layout, **first), 2, steps=2)
        train_run(recipe, tmp_path / name, replace(layout, **second), 2, resume=True, steps=4)
    plain, *others = (list(read_metrics(tmp_path / name)) for name in ("plain", "folded", "interleaved"))
    for key in ("loss", "grad_norm", "val_loss", "consumed_seqs"):
        values = [[record.get(key) for record in records] for records in (plain, *others)]
        assert values[0] == values[1] == values[2], key
        assert any(values[0])


def order_of_the_heads_products(trial):
    """In a step: when the last chunk's gradients are sent, and when what waited of the head's products is computed."""
    trainer, events = build_trial_trainer(trial), []
    deliver, finish = PipelineExecutor._deliver, StepSums.finish
    last = trainer.stage.placement.count - 1

    def delivered(self, message, tensor, mail):
        if message.kind == INPUTS and message.chunk == last - 1:
            events.append("sent")
        deliver(self, message, tensor, mail)

    def finished(self):
        if self.waiting:
            events.append("head")
        finish(self)

    PipelineExecutor._deliver, StepSums.finish = delivered, finished
    try:
        trainer.train_step(rank_batches(trial, trainer)[0], 1e-3, trial.global_seqs * trial.seq_len)
    finally:
        PipelineExecutor._deliver, StepSums.finish = deliver, finish
    return events


def orders_of_each(trials):
    return [order_of_the_heads_products(trial) for trial in trials]


def test_nobody_waits_for_the_heads_weight_gradient():
    """The input's gradient of each micro batch is on its way first. Only one micro batch's logits are kept for it."""
    trial = trial_of(2, data=1, chunk_tokens=2048)
    layouts = [replace(trial.layout, **schedule) for schedule in ({}, FILLED, FOLDED, TWICE)]
    for orders in zip(*run_ranks(orders_of_each, 2, [replace(trial, layout=layout) for layout in layouts]), strict=True):
        assert sorted(orders) == [[], ["sent", "head"] * 4]


def evaluate(trial):
    trainer = build_trial_trainer(trial)
    batch = list(batches(trial)[0].split(trial.micro_seqs))
    rows = torch.ones(trial.micro_seqs, dtype=torch.bool)
    before = trainer.evaluate([(tokens, rows) for tokens in batch[:3]], 3 * trial.micro_seqs * trial.seq_len)
    trainer.train_step(batch, 1e-2, trial.global_seqs * trial.seq_len)
    return before, trainer.evaluate([(batch[0], rows)], trial.micro_seqs * trial.seq_len)


def evaluate_each(trials):
    return [evaluate(trial) for trial in trials]


def test_evaluation_before_and_after_a_step_is_1f1bs():
    trial = trial_of(2)
    layouts = [trial.layout, *(replace(trial.layout, **schedule) for schedule in (FILLED_TWICE, FOLDED))]
    found = [*zip(*run_ranks(evaluate_each, 2, [replace(trial, layout=layout) for layout in layouts]), strict=True)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 1 and found[0][0][0] != found[0][0][1]
