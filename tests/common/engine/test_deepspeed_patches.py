"""What replaces DeepSpeed's functions belongs to one engine: several may take turns in one process."""

from dataclasses import replace

import pytest
import torch

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import TOO_HIGH
from recipes.common.recipe import AdamW, Layout
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer, rank_batches

STEPS = 4
REFUSED = (1, 2)  # steps under a ceiling that no norm passes


def _step(trainer, trial, index):
    """One step of `trainer`; the first trial's ceiling is 0 for some steps."""
    ceiling = 0.0 if trial.seed == 1 and index in REFUSED else torch.inf
    batch = rank_batches(trial, trainer)[index]
    result = trainer.train_step(batch, 1e-3, trial.global_seqs * trial.seq_len, norm_ceiling=ceiling)
    return result.loss, result.grad_norm, result.skip_reason


def _taking_turns(trials):
    trainers = [build_trial_trainer(trial) for trial in trials]
    rounds = [[_step(*pair, index) for pair in zip(trainers, trials, strict=True)] for index in range(STEPS)]
    return [list(steps) for steps in zip(*rounds, strict=True)]


@pytest.fixture(scope="module")
def alone():
    """Return what a trial does by itself, run once."""
    found = {}

    def run(trial):
        key = repr(trial)
        if key not in found:
            found[key] = run_ranks(_taking_turns, 2, [trial])[0][0]
        return found[key]

    return run


@pytest.mark.parametrize(
    ("own", "other"),
    [("zero1_bf16.json", "zero1_bf16.json"), ("zero1_bf16.json", "zero3_fp32.json"), ("zero1_fp32.json", "zero1_bf16.json")],
)
def test_two_trainers_in_one_process_keep_their_own_norm_and_gate(alone, own, other):
    """A pipeline, whose norm is summed over stages, and then data parallelism: each as when it is alone, to the last bit."""
    first = Trial(
        model=tiny_config("llama", num_hidden_layers=2),
        layout=Layout(pipeline=2),
        world_size=2,
        optimizer=AdamW(lr=1e-3),
        deepspeed=ds_config(own),
        steps=STEPS,
        global_seqs=4,
        seed=1,
    )
    second = replace(first, layout=Layout(), deepspeed=ds_config(other), seed=2)
    together = run_ranks(_taking_turns, 2, [first, second])[0]
    assert together == [alone(trial) for trial in (first, second)]
    assert [reason for _, _, reason in together[0]] == [TOO_HIGH if i in REFUSED else None for i in range(STEPS)]
    assert [reason for _, _, reason in together[1]] == [None] * STEPS


def _refused_step(trial):
    trainer = build_trial_trainer(trial)
    batches, tokens = rank_batches(trial, trainer), trial.global_seqs * trial.seq_len
    kept = [[t.clone() for t in _state(trainer)]]
    refused = trainer.train_step(batches[0], 1e-3, tokens, norm_ceiling=1e-9)
    kept.append([t.clone() for t in _state(trainer)])
    passed = trainer.train_step(batches[0], 1e-3, tokens, norm_ceiling=1e9)
    same, moved = (all(a.equal(b) for a, b in zip(kept[0], other, strict=True)) for other in (kept[1], _state(trainer)))
    return same, moved, (refused.skip_reason, passed.skip_reason), refused.grad_norm, passed.grad_norm


def _state(trainer):
    return [states[zero_state.MASTER] for states in (p.states for p in zero_state.partitions(trainer))]


@pytest.mark.parametrize(
    "config",
    ["zero1_bf16.json", "zero1_fp32.json", "zero2_bf16.json", "zero2_fp32.json", "zero3_fp32.json", "zero3_offload_bf16.json"],
)
def test_a_step_over_the_ceiling_changes_no_weight_and_says_its_norm(config):
    """The same batch passes afterwards, with the norm that was refused."""
    model = tiny_config("llama", num_hidden_layers=2)
    trial = Trial(
        model=model, layout=Layout(), world_size=2, optimizer=AdamW(lr=1e-3), deepspeed=ds_config(config), steps=1, global_seqs=4
    )
    for same, moved, reasons, refused, passed in run_ranks(_refused_step, 2, trial):
        assert (same, moved, reasons) == (True, False, (TOO_HIGH, None))
        assert refused == passed > 1e-9
