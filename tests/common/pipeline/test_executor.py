"""Every schedule trains what 1F1B trains, to the last bit."""

from dataclasses import replace

import pytest
import torch

from recipes.common.recipe import AdamW, Batch, Evaluation, Layout
from recipes.common.run_dir.metrics import read_metrics
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.small_runs import train_run
from tests.support.tiny import ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, batches, build_trial_trainer, train_in_layout

ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)
FILLED, FOLDED = {"pipeline_schedule": "zero_bubble"}, {"pipeline_schedule": "zero_bubble_v"}
TWICE, FILLED_TWICE = {"chunks": 2}, FILLED | {"chunks": 2}  # around the ranks


def trial_of(
    pipeline, tensor=1, data=1, *, family="llama", precision="fp32", recompute="none", tied=False, layers=None, **fields
):
    layers = layers or 2 * pipeline  # two chunks a rank
    config = fp16_config(initial_scale_power=12) if precision == "fp16" else ds_config(f"zero1_{precision}.json")
    return Trial(
        model=tiny_config(family, num_hidden_layers=layers, tie_word_embeddings=tied),
        layout=Layout(pipeline=pipeline, tensor=tensor, recompute=recompute),
        world_size=pipeline * tensor * data,
        optimizer=ADAMW,
        deepspeed=config,
        **{"steps": 2, "global_seqs": 4 * data} | fields,
    )


def train(trial, schedules):
    """Train by 1F1B, then by each schedule, in the same process."""
    allow_fp16()
    return [train_in_layout(replace(trial, layout=replace(trial.layout, **schedule))) for schedule in ({}, *schedules)]


def weights_of(ranks):
    """(Hugging Face name, tensor rank) -> shard, of all stages."""
    return {(name, rank["held"].tensor_rank): shard for rank in ranks for name, shard in rank["shards"].items()}


def assert_same_bits(trial, *schedules):
    """Losses, norms, skipped steps and every weight after training are 1F1B's, whichever rank holds them."""
    plain, *others = zip(*run_ranks(train, trial.world_size, trial, schedules), strict=True)
    wanted = weights_of(plain)
    for schedule, other in zip(schedules, others, strict=True):
        found = weights_of(other)
        assert found.keys() == wanted.keys()
        assert [key for key, shard in wanted.items() if not shard.equal(found[key])] == []
        for what in ("losses", "norms", "skipped"):
            assert [rank[what] for rank in other] == [rank[what] for rank in plain], (schedule, what)


@pytest.mark.parametrize(
    ("pipeline", "precision", "schedules"),
    [
        (2, "bf16", (FILLED, FOLDED, {"chunks": 3}, FILLED | {"chunks": 3})),
        (3, "fp32", (FOLDED, FILLED_TWICE)),
        (4, "bf16", (FOLDED, FILLED_TWICE)),  # the others: fewer micro batches than stages, below
    ],
)
def test_same_bits_at_every_depth(pipeline, precision, schedules):
    assert_same_bits(trial_of(pipeline, precision=precision, layers=max(7, 2 * pipeline), global_seqs=6), *schedules)


@pytest.mark.parametrize(
    ("tensor", "data", "precision", "recompute", "schedules"),
    [(2, 1, "bf16", "full", (FILLED, FILLED_TWICE)), (1, 2, "fp32", "selective", (FOLDED, TWICE))],
)
def test_same_bits_with_tensor_or_data_ranks_ties_and_recomputation(tensor, data, precision, recompute, schedules):
    """Folded and interleaved with tensor ranks: the families below."""
    assert_same_bits(trial_of(2, tensor, data, precision=precision, tied=True, recompute=recompute), *schedules)


@pytest.mark.parametrize(
    ("family", "tensor", "schedules"),
    [("gpt2", 1, (FILLED, TWICE)), ("qwen3", 2, (FOLDED,)), ("mixtral", 1, (FOLDED, FILLED_TWICE)), ("phi3", 1, (FILLED,))],
)
def test_same_bits_in_other_families(family, tensor, schedules):
    """Transposed weights with biases, per-head norms whose gradients are summed over tensor ranks, experts, packed linears."""
    assert_same_bits(trial_of(2, tensor, family=family, recompute="selective"), *schedules)


def test_same_bits_with_fewer_micro_batches_than_stages():
    assert_same_bits(trial_of(4, global_seqs=2, tied=True), FILLED, FOLDED, TWICE)


def test_same_bits_in_fp16():
    assert_same_bits(trial_of(3, precision="fp16"), FOLDED, FILLED_TWICE)


def test_torchs_own_products_wait_too():
    """The bench's side with torch's linears is the same schedule."""
    assert_same_bits(trial_of(2, torch_linears=True), FOLDED)


def test_same_bits_with_context_ranks():
    trial = trial_of(2, 1, 2, global_seqs=4)
    assert_same_bits(replace(trial, layout=replace(trial.layout, context=2)), FOLDED, FILLED_TWICE)


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


def test_a_run_whose_documents_are_kept_apart_is_the_same():
    """Each chunk of a rank asks for the positions of its own micro batch."""
    assert_same_bits(trial_of(2, document_end=5, attention="sdpa", micro_seqs=2, global_seqs=8), FOLDED, TWICE)


def evaluate(trial):
    trainer = build_trial_trainer(trial)
    batch = list(batches(trial)[0].split(trial.micro_seqs))
    rows = torch.ones(trial.micro_seqs, dtype=torch.bool)
    before = trainer.evaluate([(tokens, rows) for tokens in batch[:3]], 3 * trial.micro_seqs * trial.seq_len)
    trainer.train_step(batch, 1e-2, trial.global_seqs * trial.seq_len)
    return before, trainer.evaluate([(batch[0], rows)], trial.micro_seqs * trial.seq_len)


def evaluate_each(trials):
    return [evaluate(trial) for trial in trials]


@pytest.mark.parametrize(("pipeline", "schedules"), [(2, (FILLED, FILLED_TWICE)), (3, (FOLDED, TWICE))])
def test_evaluation_before_and_after_a_step_is_1f1bs(pipeline, schedules):
    trial = trial_of(pipeline)
    layouts = [trial.layout, *(replace(trial.layout, **schedule) for schedule in schedules)]
    found = [*zip(*run_ranks(evaluate_each, pipeline, [replace(trial, layout=layout) for layout in layouts]), strict=True)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 1 and found[0][0][0] != found[0][0][1]


def test_sequences_shared_by_tensor_ranks():
    """Placeholders of other chunks hand on the shape of whole sequences. Folded: test_context_parallel.py."""
    trial = trial_of(2, 2, recompute="selective", steps=1)
    trial = replace(trial, layout=replace(trial.layout, sequence_parallel=True))
    assert_same_bits(trial, FILLED_TWICE)
