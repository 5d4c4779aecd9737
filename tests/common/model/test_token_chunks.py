"""MLPs by parts and layer inputs on the host train what plain transformers trains, and keep less between the passes."""

import pytest

from recipes.common.checks.family_trials import chunk_problems
from recipes.common.checks.recipe_checks import option_problems
from recipes.common.recipe import Layout
from tests.support.parity import assert_equal, trial_of
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import build_trial_trainer, gradient_trial, rank_batches
from tools.throughput.step_memory import count_step

TRIALS = {
    "tensor ranks": ("llama", (1, 2, 1), {"mlp_chunk_tokens": 5}),
    "everything on the host": (
        "gpt2", (2, 1, 1),
        {"mlp_chunk_tokens": 5, "recompute": "full", "pipeline_schedule": "zero_bubble_v", "offload_activations": True},
    ),
    "experts, context ranks": ("mixtral", (1, 1, 2), {"mlp_chunk_tokens": 5, "context": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIALS)
def test_gradients(name):
    family, sizes, options = TRIALS[name]
    assert_equal(gradient_trial(trial_of(tiny_config(family), *sizes, seq_len=64, micro_seqs=2, global_seqs=2, **options)))


def activations(trial):
    trainer = build_trial_trainer(trial)
    with count_step(trainer) as found:
        trainer.train_step(rank_batches(trial, trainer)[0], 1e-3, trial.global_seqs * trial.seq_len)
    return found["activations"]


def activations_with(data=1, **options):
    """Count what a rank keeps of a llama of a published shape's proportions, between the passes."""
    widths = {"max_position_embeddings": 512, "intermediate_size": 224, "num_key_value_heads": 4, "num_hidden_layers": 8}
    trial = trial_of(tiny_config("llama", **widths), 1, 1, data, seq_len=512, global_seqs=1, attention="sdpa", **options)
    return run_ranks(activations, data, trial)[0]


def test_memory_between_the_passes():
    whole = activations_with()
    assert activations_with(4, context=4) == pytest.approx(whole / 4, rel=0.05)
    hidden = 512 * 64 * 4
    of_mlp = 8 * 4 * 512 * 224 * 4  # gate, its activation, up and their product
    assert activations_with(mlp_chunk_tokens=64) == pytest.approx(whole - of_mlp, rel=0.05)
    recomputed = activations_with(recompute="full")
    assert activations_with(recompute="full", offload_activations=True) == pytest.approx(recomputed - 8 * hidden, abs=hidden)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (Layout(mlp_chunk_tokens=-1), "mlp_chunk_tokens=-1 must be a whole number from 1, or 0, for all tokens at once"),
        (Layout(mlp_chunk_tokens=8, recompute="selective"), "with recompute='selective', which keeps the products"),
        (Layout(mlp_chunk_tokens=8, tensor=2, sequence_parallel=True), "with sequence_parallel=True, whose MLPs scatter"),
        (Layout(offload_activations=True), "offload_activations=True with recompute='none': it keeps on the host"),
    ],
)
def test_what_cannot_be_is_refused(layout, problem):
    (found,) = option_problems(layout, 16)
    assert problem in found


def problems(family, mixing=False):
    if mixing:
        from transformers.models.llama.modeling_llama import LlamaMLP

        forward = LlamaMLP.forward
        LlamaMLP.forward = lambda self, x: forward(self, x) + x.mean(dim=1, keepdim=True)
    return chunk_problems(tiny_config(family), Layout(mlp_chunk_tokens=1024), "eager")


def test_families_whose_mlps_mix_tokens_or_have_no_known_name_are_refused():
    for family in ("gpt2", "mixtral", "gemma2"):
        assert run_ranks(problems, 1, family) == [[]]
    (line,) = run_ranks(problems, 1, "llama", True)[0]
    assert line.startswith("mlp_chunk_tokens=1024: MLPs of model_type=llama mix tokens")
    (line,) = run_ranks(problems, 1, "opt")[0]
    assert line.startswith("mlp_chunk_tokens=1024: model_type=opt: OPTDecoderLayer has no MLP by one of the names")
