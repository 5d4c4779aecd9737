"""3D training equals plain one-process transformers: loss, gradient norm, every gradient and every parameter."""

import pytest
from transformers import AutoConfig

from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import PIPELINE_SCHEDULES, SGD, AdamW, Layout
from tests.support.parity import ADAMW, assert_same, both_of_each, trial_of
from tests.support.tiny import FAMILIES, ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial, outcome, train_in_layout

LLAMA, TIED = tiny_config("llama", num_hidden_layers=2), tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=True)
DEEPER, DEEPER_TIED = tiny_config("llama"), tiny_config("llama", tie_word_embeddings=True)
# each of {1, 2}^3 beside each other one; and how many micro batches are added up
SIZES = {(2, 2, 1): 4, (2, 1, 2): 2, (1, 2, 2): 1, (1, 1, 1): 4}
ADAMW_TRIALS = {
    **{
        f"AdamW with clipping in every pair of sizes: {sizes}": trial_of(LLAMA, *sizes, global_seqs=accumulated * sizes[2])
        for sizes, accumulated in SIZES.items()
    },
    # what a step may do to a family's parameters beyond its gradients
    "biases go without weight decay": trial_of(tiny_config("gpt2", num_hidden_layers=2), 2, 1, 1, global_seqs=2),
    "experts are one bank": trial_of(tiny_config("mixtral", num_hidden_layers=2), 2, 1, 1, global_seqs=2),
    "tied embeddings on two stages": trial_of(TIED, 2, 1, 2),
    "tied embeddings on tensor ranks": trial_of(TIED, 1, 2, 1, global_seqs=2),
    "a stated cut": trial_of(DEEPER, 2, 1, 1, layers_per_stage=(3, 1)),
    "a stated cut, folded": trial_of(
        tiny_config("llama", num_hidden_layers=6), 2, 1, 1, pipeline_schedule="zero_bubble_v", layers_per_stage=(1, 1, 3, 1)
    ),
    "embeddings kept off weight decay": trial_of(
        TIED, 2, 1, 1, optimizer=AdamW(lr=1e-3, eps=1e-5, weight_decay=0.5, decay_embeddings=False)
    ),
    "SGD with momentum": trial_of(LLAMA, 1, 1, 2, optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=0.1)),
    # beyond the first, which the pairs of sizes have; without tensor ranks: tests/common/checkpoint/test_resume.py
    "ZeRO 2": trial_of(LLAMA, 1, 2, 2, deepspeed=ds_config("zero2_fp32.json")),
    "ZeRO 3, tied": trial_of(TIED, 1, 2, 2, deepspeed=ds_config("zero3_fp32.json")),
}
RECOMPUTED = {
    "nothing": {},
    "every layer": {"recompute": "full"},
    "all but products": {"recompute": "selective", "recompute_every": 3},
}


def shrunk(family, layout, **fields):
    return shrink(AutoConfig.for_model(family, **fields), layout)


GRADIENT_TRIALS = {
    "no accumulation": trial_of(LLAMA, 2, 2, 1, global_seqs=1),
    "three stages, four micro batches": trial_of(DEEPER, 3, 1, 1, global_seqs=4),
    **{
        f"stages and tensor ranks in {family}": trial_of(tiny_config(family, num_hidden_layers=2), 2, 2, 1, global_seqs=2)
        for family in FAMILIES
    },
    # their rotary key goes past the sharded projections, or (deepseek_v3) their projections stay whole
    "latent attention of minicpm3": trial_of(shrunk("minicpm3", Layout(tensor=2)), 1, 2, 1, global_seqs=2),
    "latent attention of deepseek_v2": trial_of(
        shrunk("deepseek_v2", Layout(tensor=2), num_experts_per_tok=2), 1, 2, 1, global_seqs=2
    ),
    "latent attention of deepseek_v3": trial_of(shrunk("deepseek_v3", Layout(tensor=2)), 1, 2, 1, global_seqs=2),
    **{
        f"layers that return tuples, {family} by {schedule}": trial_of(
            shrunk(family, Layout(pipeline=2), attention_dropout=0.0), 2, 1, 1, global_seqs=2, pipeline_schedule=schedule
        )
        for family, schedule in {"gptj": "1f1b", "gpt_neo": "zero_bubble_v"}.items()
    },
    "gpt2, tied across three stages": trial_of(tiny_config("gpt2", tie_word_embeddings=True), 3, 1, 1, global_seqs=2),
    "gemma2, tied across stages of tensor ranks": trial_of(
        tiny_config("gemma2", num_hidden_layers=2, tie_word_embeddings=True), 2, 2, 1, global_seqs=2
    ),
    **{
        f"{heads} key and value heads on four tensor ranks": trial_of(
            tiny_config("qwen3", num_key_value_heads=heads, num_hidden_layers=2), 1, 4, 1, global_seqs=2
        )
        for heads in (1, 2)
    },
    # each schedule and each recomputation beside each other, with the sequence shared and not; two chunks in two of them
    **{
        f"recomputing {again} by {schedule}": trial_of(
            DEEPER_TIED, 2, 2, 1, **options, global_seqs=2,
            pipeline_schedule=schedule, chunks=1 + (i == j + 1), sequence_parallel=(i + j) % 2 == 1,
        )
        for i, (again, options) in enumerate(RECOMPUTED.items())
        for j, schedule in enumerate(PIPELINE_SCHEDULES)
    },
    "a z loss": trial_of(LLAMA, 1, 1, 1, z_loss=1e-2, global_seqs=2),
    "a z loss of tensor ranks": trial_of(LLAMA, 1, 2, 1, z_loss=1e-2, global_seqs=2),
    "sdpa": trial_of(LLAMA, 2, 1, 1, attention="sdpa"),
}  # fmt: skip
DOCUMENTS = {"document_end": 5, "seq_len": 48}
UNMASKED = trial_of(LLAMA, 1, 1, 1, **DOCUMENTS | {"document_end": None}, attention="sdpa")
# the oracle has "sdpa" with a dense mask, whatever the layout has
DOCUMENT_TRIALS = {
    "sdpa in one process": trial_of(LLAMA, 1, 1, 1, **DOCUMENTS, attention="sdpa"),
    "sdpa in stages of tensor ranks": trial_of(LLAMA, 2, 2, 1, **DOCUMENTS, attention="sdpa"),
    "varlen in stages of tensor ranks": trial_of(
        LLAMA, 2, 2, 1, **DOCUMENTS, attention="varlen", recompute="selective", sequence_parallel=True, micro_seqs=2
    ),
}  # fmt: skip
BF16_TRIALS = {
    "zero1_bf16.json": trial_of(LLAMA, 2, 2, 1, deepspeed=ds_config("zero1_bf16.json")),
    "zero2_bf16.json": trial_of(LLAMA, 1, 2, 1, deepspeed=ds_config("zero2_bf16.json")),
    "zero3_offload_bf16.json": trial_of(LLAMA, 1, 2, 1, deepspeed=ds_config("zero3_offload_bf16.json")),
}


@pytest.fixture(scope="module")
def trained():
    """Name -> (what the layout left, what the oracle left), of every trial; those of ZeRO 3, which patches torch, come last."""
    gradients = GRADIENT_TRIALS | DOCUMENT_TRIALS | {"unmasked": UNMASKED}
    trials = {name: gradient_trial(trial) for name, trial in gradients.items()} | BF16_TRIALS | ADAMW_TRIALS
    return both_of_each(dict(sorted(trials.items(), key=lambda t: t[1].deepspeed["zero_optimization"]["stage"])))


@pytest.mark.parametrize("name", ADAMW_TRIALS)
def test_two_steps_change_the_same(trained, name):
    assert_same(*trained[name])


@pytest.mark.parametrize("name", GRADIENT_TRIALS)
def test_gradients(trained, name):
    assert_same(*trained[name])


@pytest.mark.parametrize("name", DOCUMENT_TRIALS)
def test_documents_masked_from_each_other(trained, name):
    assert_same(*trained[name])
    assert abs(trained["unmasked"][1].losses[0] - trained[name][1].losses[0]) > 1e-5  # the mask is not for nothing


@pytest.mark.parametrize("config", BF16_TRIALS)
def test_bf16_tracks_fp32(trained, config):
    """Two steps of lr 1e-3: the loss within 5e-4, relative; a weight within the two steps that rounding may turn around."""
    found, plain = trained[config]
    assert found.losses == pytest.approx(plain.losses, rel=5e-4)
    assert found.grad_norms == pytest.approx(plain.grad_norms, rel=2e-2)
    worst = max((found.parameters[n] - p).abs().max().item() for n, p in plain.parameters.items())
    assert worst <= 2 * BF16_TRIALS[config].steps * ADAMW.lr


def test_fused_operators_in_a_layout(monkeypatch):
    """Uncompiled, which is torch's part: as operators of their own, in what else wraps layers and defers gradients."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    deferred = {"recompute": "selective", "pipeline_schedule": "zero_bubble", "sequence_parallel": True}
    trials = {
        "deferred": trial_of(tiny_config("qwen3", num_hidden_layers=2), 2, 2, 1, global_seqs=2, kernels="compile", **deferred),
        "in parts of the sequence": trial_of(LLAMA, 1, 2, 2, global_seqs=2, kernels="compile", recompute="full", context=2),
    }
    for found, plain in both_of_each({name: gradient_trial(trial) for name, trial in trials.items()}).values():
        assert_same(found, plain)


def test_products_in_fp8_have_the_same_bits_in_stages():
    """Deferred weight gradients and recomputation cast the same numbers. Beside the oracle: tests/tools/verify/test_gate.py."""
    shapes = {name: p.shape for name, p in build_empty(DEEPER, "eager").named_parameters()}

    def trained(pipeline, **options):
        trial = trial_of(
            DEEPER, pipeline, 1, 1, global_seqs=2, precision="fp8", deepspeed=ds_config("zero1_bf16.json"), **options
        )
        return outcome(run_ranks(train_in_layout, pipeline, trial), shapes)

    whole, cut = trained(1), trained(2, pipeline_schedule="zero_bubble", recompute="selective")
    assert (whole.losses, whole.grad_norms) == (cut.losses, pytest.approx(cut.grad_norms, rel=1e-6))
    assert all(cut.parameters[name].equal(wanted) for name, wanted in whole.parameters.items())


def test_bf16_pipeline_and_data_equal_one_process_bit_for_bit():
    deepspeed = ds_config("zero1_bf16.json")
    one, many = (trial_of(LLAMA, *sizes, deepspeed=deepspeed) for sizes in ((1, 1, 1), (2, 1, 2)))
    shapes = {name: p.shape for name, p in build_empty(LLAMA, "eager").named_parameters()}
    alone, cut = (outcome(run_ranks(train_in_layout, t.world_size, t), shapes) for t in (one, many))
    assert cut.losses == alone.losses
    assert all(cut.parameters[name].equal(alone.parameters[name]) for name in shapes)
