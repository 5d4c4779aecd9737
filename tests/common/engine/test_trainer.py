"""An evaluation is plain transformers' in evaluation mode, over the rows that count, and training goes on after it."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.parity import trial_of
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import batches, build_trial_trainer, initial_model

ROWS = [[True, False], [True, True], [False, True], [True, True]]  # of each micro batch, those that count


def _evaluate(trial):
    """The loss of two evaluations with a training step between, and whether the model trains in that step's passes."""
    trainer, modes = build_trial_trainer(trial), []
    micro = list(zip(batches(trial)[0].split(trial.micro_seqs), map(torch.tensor, ROWS), strict=True))
    own, scored = micro[trainer.grid.data_rank :: trainer.grid.data], sum(map(sum, ROWS)) * trial.seq_len
    before = trainer.evaluate(own, scored)
    hook = trainer.stage.register_forward_pre_hook(lambda stage, args: modes.append(stage.training))
    trainer.train_step([tokens for tokens, _ in own], 1e-2, trial.global_seqs * trial.seq_len)
    hook.remove()
    return before, trainer.evaluate(own, scored), modes


def _evaluate_plain(trial):
    model, tokens, rows = initial_model(trial).eval(), batches(trial)[0], torch.tensor(ROWS).view(-1)
    with torch.no_grad():
        logits = model(input_ids=tokens[rows, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[rows, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("pipeline", "tensor", "data", "schedule"),
    [(1, 1, 1, "1f1b"), (1, 2, 2, "1f1b"), (2, 1, 1, "1f1b"), (2, 1, 2, "zero_bubble"), (2, 1, 1, "zero_bubble_v")],
)
def test_an_evaluation_drops_nothing_and_counts_its_rows(pipeline, tensor, data, schedule):
    config = tiny_config("llama", attention_dropout=0.5)
    trial = trial_of(config, pipeline, tensor, data, pipeline_schedule=schedule, micro_seqs=2, z_loss=1e-2)
    wanted = run_ranks(_evaluate_plain, 1, trial)[0]
    ranks = run_ranks(_evaluate, trial.world_size, trial)
    assert [before for before, _, _ in ranks] == pytest.approx([wanted] * len(ranks), rel=1e-6)
    assert all(after < before and modes and all(modes) for before, after, modes in ranks)
