"""Copies that should be equal are, after training in every layout; one that is not is named at the first check."""

from dataclasses import replace

import pytest
import torch

from recipes.common.monitor.replica_drift import checksum, find_drift
from recipes.common.recipe import AdamW, Layout
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer, rank_batches

NORM = "model.layers.1.input_layernorm.weight"
BANK = "model.layers.2.mlp.experts.down_proj"
EMBEDDING = "model.embed_tokens.weight"


def trial_of(pipeline, tensor, data, config="zero1_fp32.json", family="llama", **fields):
    return replace(
        Trial(
            model=tiny_config(family, tie_word_embeddings=True),
            layout=Layout(pipeline=pipeline, tensor=tensor),
            world_size=pipeline * tensor * data,
            optimizer=AdamW(lr=1e-3, clip=0.01),
            deepspeed=ds_config(config),
            global_seqs=2 * data,
        ),
        **fields,
    )


def drift_after_training(trial, plant):
    """What a check finds after each step, with what `plant` does to one rank after the second."""
    trainer = build_trial_trainer(trial)
    found = []
    for index, micro in enumerate(rank_batches(trial, trainer)):
        trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        if index == 1:
            plant(trainer)
        found.append(find_drift(trainer))
    return found


def nothing(trainer):
    pass


LAYOUTS = [(2, 2, 1, "zero1_bf16.json"), (1, 1, 2, "zero2_bf16.json"), (1, 2, 2, "zero3_fp32.json")]


@pytest.mark.parametrize(("pipeline", "tensor", "data", "config"), LAYOUTS)
def test_copies_stay_equal(pipeline, tensor, data, config):
    model = tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=True)
    trial = trial_of(pipeline, tensor, data, config, model=model)
    assert run_ranks(drift_after_training, trial.world_size, trial, nothing) == [[[], [], []]] * trial.world_size


def test_routers_stay_equal():
    trial = trial_of(1, 2, 1, family="mixtral")
    assert run_ranks(drift_after_training, 2, trial, nothing) == [[[], [], []]] * 2


def unclipped_norms(trainer):
    """BLOOM's bug: from now on tensor rank 1 does not clip what is not cut."""
    if trainer.grid.tensor_rank != 1:
        return

    def undo(optimizer, args, options):
        for group in optimizer.param_groups:
            if group["weight_decay"] == 0.0:
                for flat in group["params"]:
                    flat.grad.mul_(50.0)

    trainer.optimizer.register_step_pre_hook(undo)


def test_norms_that_one_tensor_rank_does_not_clip_are_caught_at_the_first_check():
    trial = trial_of(1, 2, 1)
    for before, planted, after in run_ranks(drift_after_training, 2, trial, unclipped_norms):
        assert (before, planted) == ([], [])  # nothing has happened yet
        layers = {f"model.layers.{i}.{norm}.weight" for i in range(4) for norm in ("input_layernorm", "post_attention_layernorm")}
        assert {drift.name for drift in after} == layers | {"model.norm.weight"}
        assert {(drift.across, drift.ranks, drift.group) for drift in after} == {("tensor", (0, 1), (0, 1))}
        assert all(0 < drift.largest < 0.01 for drift in after)
        assert str(next(d for d in after if d.name == NORM)).startswith(f"{NORM} differs across tensor ranks: rank 0, 1 of 0, 1")


def flip_one_bit(trainer):
    """In the working copy of global rank 1, which the next update would write over."""
    if trainer.grid.rank == 1:
        weight = trainer.hf_shards()[NORM]
        weight.view(torch.int16)[5] ^= 1


def test_a_flipped_bit_on_one_of_three_data_ranks_is_pinned_to_it():
    trial = trial_of(1, 1, 3, "zero1_bf16.json")
    for found in run_ranks(drift_after_training, 3, trial, flip_one_bit):
        assert [len(drifts) for drifts in found] == [0, 1, 0]  # gone with the next update
        (drift,) = found[1]
        assert (drift.name, drift.across, drift.ranks, drift.group) == (NORM, "data", (1,), (0, 1, 2))
        assert drift.largest == 2.0**-7  # the last bit of 1 in bf16


def change_an_expert(trainer):
    """A weight of one expert on one of the two ranks that have it; the ranks beside them have others."""
    if trainer.grid.rank == 3:
        trainer.hf_shards()[BANK][1, 5, 7] += 1e-6


def test_copies_of_experts_that_ranks_share_stay_equal_and_are_caught_where_they_part():
    trial = trial_of(1, 1, 4, family="mixtral", layout=Layout(expert=2), steps=2)
    for before, planted in run_ranks(drift_after_training, 4, trial, change_an_expert):
        assert before == []
        (drift,) = planted
        assert (drift.name, drift.across, drift.ranks, drift.group) == (BANK, "data", (1, 3), (1, 3))
        assert drift.largest == pytest.approx(1e-6, rel=0.1)


def change_the_head(trainer):
    if trainer.grid.is_last_stage:
        trainer.hf_shards()[EMBEDDING][7, 3] += 1e-6


def test_tied_embeddings_that_part_are_caught():
    trial = trial_of(2, 1, 1)
    for found in run_ranks(drift_after_training, 2, trial, change_the_head):
        (drift,) = found[1]
        assert (drift.name, drift.across, drift.group) == (EMBEDDING, "pipeline", (0, 1))


def test_a_checksum_sees_every_bit_and_every_place():
    assert run_ranks(_checksums, 1) == [True]


def _checksums():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn((1 << 20) + 77, generator=generator).to(dtype)
        same = checksum(x)
        assert same.equal(checksum(x.clone()))
        for place in (0, 5, (1 << 20) - 1, 1 << 20, len(x) - 1):
            other = x.clone()
            other.view(torch.uint8)[place * x.element_size()] ^= 1
            assert not checksum(other).equal(same)
        assert not checksum(x.roll(1)).equal(same)
        assert not checksum(torch.cat([x[1 << 20 :], x[: 1 << 20]])).equal(same)
    assert not checksum(torch.tensor([0.0])).equal(checksum(torch.tensor([-0.0])))
    return True
