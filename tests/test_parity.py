"""3D training equals plain one-process transformers: loss, gradient norm, every gradient and every parameter."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import PIPELINE_SCHEDULES, SGD, AdamW, Layout
from tests.support.parity import ADAMW, assert_equal, both, trial_of
from tests.support.tiny import FAMILIES, ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial, outcome, train_in_layout, train_plain

CUBE = [(2, 2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2)]  # of {1, 2}^3: each size beside each other one


@pytest.mark.parametrize(("pipeline", "tensor", "data"), CUBE)
def test_adamw_with_clipping_in_every_pair_of_sizes(pipeline, tensor, data):
    assert_equal(trial_of(tiny_config("llama"), pipeline, tensor, data))


@pytest.mark.parametrize(("pipeline", "tensor", "data", "accumulation"), [(2, 2, 1, 1), (3, 1, 1, 4), (2, 1, 2, 2)])
def test_gradients_of_plain_sgd(pipeline, tensor, data, accumulation):
    trial = trial_of(tiny_config("llama"), pipeline, tensor, data, global_seqs=accumulation * data)
    assert_equal(gradient_trial(trial))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family):
    config = tiny_config(family, num_hidden_layers=2)
    assert_equal(gradient_trial(trial_of(config, 2, 2, 1, global_seqs=2)))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_adamw_of_biases_and_of_experts(family):
    """What a step may do to a family's parameters beyond its gradients: biases go without weight decay, experts are one bank."""
    assert_equal(trial_of(tiny_config(family), 2, 1, 1, global_seqs=2))


@pytest.mark.parametrize(
    ("family", "fields"), [("minicpm3", {}), ("deepseek_v2", {"num_experts_per_tok": 2}), ("deepseek_v3", {})]
)
def test_gradients_of_latent_attention(family, fields):
    """Its rotary key goes past the sharded projections (minicpm3, deepseek_v2), or its projections stay whole (deepseek_v3)."""
    config = shrink(AutoConfig.for_model(family, **fields), Layout(tensor=2))
    assert_equal(gradient_trial(trial_of(config, 1, 2, 1, global_seqs=2)))


@pytest.mark.parametrize(("family", "schedule"), [("gptj", "1f1b"), ("gpt_neo", "zero_bubble_v")])
def test_gradients_of_layers_that_return_tuples(family, schedule):
    config = shrink(AutoConfig.for_model(family, attention_dropout=0.0), Layout(pipeline=2))
    assert_equal(gradient_trial(trial_of(config, 2, 1, 1, global_seqs=2, pipeline_schedule=schedule)))


@pytest.mark.parametrize(("family", "pipeline", "tensor"), [("gpt2", 3, 1), ("gemma2", 2, 2)])
def test_gradients_of_tied_embeddings_across_stages(family, pipeline, tensor):
    assert_equal(gradient_trial(trial_of(tiny_config(family, tie_word_embeddings=True), pipeline, tensor, 1)))


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(2, 1, 2), (1, 2, 1)])
def test_adamw_of_tied_embeddings(pipeline, tensor, data):
    assert_equal(trial_of(tiny_config("llama", tie_word_embeddings=True), pipeline, tensor, data))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_key_value_heads_than_tensor_ranks(kv_heads):
    config = tiny_config("qwen3", num_key_value_heads=kv_heads)
    assert_equal(gradient_trial(trial_of(config, 1, 4, 1, global_seqs=2)))


@pytest.mark.parametrize(("zero", "tensor", "tied"), [(2, 2, False), (3, 2, True)])
def test_zero_stages_without_a_pipeline(zero, tensor, tied):
    """Beyond the first, which the cube has. Without tensor ranks: tests/common/checkpoint/test_resume.py."""
    config = tiny_config("llama", tie_word_embeddings=tied)
    assert_equal(trial_of(config, 1, tensor, 2, deepspeed=ds_config(f"zero{zero}_fp32.json"), steps=2))


RECOMPUTED = {
    "nothing": {},
    "every layer": {"recompute": "full"},
    "all but products": {"recompute": "selective", "recompute_every": 3},
}


@pytest.mark.parametrize(("schedule", "cut"), [("1f1b", (3, 1)), ("zero_bubble_v", (1, 1, 3, 1))])
def test_a_stated_cut_changes_nothing(schedule, cut):
    config = tiny_config("llama", num_hidden_layers=sum(cut))
    assert_equal(trial_of(config, 2, 1, 1, pipeline_schedule=schedule, layers_per_stage=cut))


@pytest.mark.parametrize(
    ("recomputed", "schedule", "chunks", "sequence_parallel"),
    [
        (
            again,
            schedule,
            1 + (i == j + 1),
            (i + j) % 2 == 1,
        )  # two chunks in two of them
        for i, again in enumerate(RECOMPUTED)
        for j, schedule in enumerate(PIPELINE_SCHEDULES)
    ],
)
def test_options_of_a_layout_change_nothing(recomputed, schedule, chunks, sequence_parallel):
    """Every option beside every other one: each schedule and each recomputation with the sequence shared and not."""
    config = tiny_config("llama", tie_word_embeddings=True)
    options = RECOMPUTED[recomputed] | {"sequence_parallel": sequence_parallel, "pipeline_schedule": schedule, "chunks": chunks}
    assert_equal(gradient_trial(trial_of(config, 2, 2, 1, **options)))


@pytest.mark.parametrize(
    ("family", "pipeline", "tensor", "options"),
    [
        ("qwen3", 2, 2, {"recompute": "selective", "pipeline_schedule": "zero_bubble", "sequence_parallel": True}),
        ("llama", 1, 2, {"recompute": "full", "context": 2}),
    ],
)
def test_fused_operators_in_a_layout(family, pipeline, tensor, options, monkeypatch):
    """Uncompiled, which is torch's part: as operators of their own, in what else wraps layers and defers gradients."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    data = options.get("context", 1)
    assert_equal(
        gradient_trial(trial_of(tiny_config(family), pipeline, tensor, data, global_seqs=4, kernels="compile", **options))
    )


def test_products_in_fp8_have_the_same_bits_in_stages():
    """Deferred weight gradients and recomputation cast the same numbers. Beside the oracle: tests/tools/verify/test_gate.py."""
    shapes = {name: p.shape for name, p in build_empty(tiny_config("llama"), "eager").named_parameters()}

    def trained(pipeline, **options):
        trial = trial_of(tiny_config("llama"), pipeline, 1, 1, precision="fp8", deepspeed=ds_config("zero1_bf16.json"), **options)
        return outcome(run_ranks(train_in_layout, pipeline, trial), shapes)

    whole, cut = trained(1), trained(2, pipeline_schedule="zero_bubble", recompute="selective")
    assert (whole.losses, whole.grad_norms) == (cut.losses, pytest.approx(cut.grad_norms, rel=1e-6))
    assert all(cut.parameters[name].equal(wanted) for name, wanted in whole.parameters.items())


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (1, 2)])
def test_z_loss(pipeline, tensor):
    assert_equal(gradient_trial(trial_of(tiny_config("llama"), pipeline, tensor, 1, z_loss=1e-2)))


def test_embeddings_kept_off_weight_decay():
    optimizer = AdamW(lr=1e-3, eps=1e-5, weight_decay=0.5, decay_embeddings=False)
    assert_equal(trial_of(tiny_config("llama", tie_word_embeddings=True), 2, 1, 1, optimizer=optimizer))


def test_momentum_sgd():
    assert_equal(trial_of(tiny_config("llama"), 1, 1, 2, optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=0.1)))


def test_sdpa_attention():
    assert_equal(gradient_trial(trial_of(tiny_config("llama"), 2, 1, 1, attention="sdpa")))


@pytest.mark.parametrize(("pipeline", "tensor", "attention"), [(1, 1, "sdpa"), (2, 2, "sdpa"), (2, 2, "varlen")])
def test_documents_masked_from_each_other(pipeline, tensor, attention):
    """The oracle has "sdpa" with a dense mask, whatever the layout has."""
    options = {"recompute": "selective", "sequence_parallel": True, "micro_seqs": 2} if attention == "varlen" else {}
    trial = trial_of(tiny_config("llama"), pipeline, tensor, 1, attention=attention, document_end=5, seq_len=48, **options)
    plain = assert_equal(gradient_trial(trial))
    unmasked = run_ranks(train_plain, 1, gradient_trial(replace(trial, document_end=None)))[0]
    assert abs(unmasked.losses[0] - plain.losses[0]) > 1e-5  # the mask is not for nothing


@pytest.mark.parametrize("config", ["zero1_bf16.json", "zero2_bf16.json", "zero3_offload_bf16.json"])
def test_bf16_tracks_fp32(config):
    """Two steps of lr 1e-3: the loss within 5e-4, relative; a weight within the two steps that rounding may turn around."""
    pipeline = 2 if config == "zero1_bf16.json" else 1
    trial = trial_of(tiny_config("llama"), pipeline, 2, 1, deepspeed=ds_config(config), steps=2)
    trained, plain = both(trial)
    assert trained.losses == pytest.approx(plain.losses, rel=5e-4)
    assert trained.grad_norms == pytest.approx(plain.grad_norms, rel=2e-2)
    worst = max((trained.parameters[n] - p).abs().max().item() for n, p in plain.parameters.items())
    assert worst <= 2 * trial.steps * ADAMW.lr


def test_bf16_pipeline_and_data_equal_one_process_bit_for_bit():
    deepspeed = ds_config("zero1_bf16.json")
    one = trial_of(tiny_config("llama"), 1, 1, 1, deepspeed=deepspeed)
    many = trial_of(tiny_config("llama"), 2, 1, 2, deepspeed=deepspeed)
    shapes = {name: tensor.shape for name, tensor in run_ranks(train_plain, 1, replace(one, steps=1))[0].parameters.items()}
    alone, cut = (outcome(run_ranks(train_in_layout, t.world_size, t), shapes) for t in (one, many))
    assert cut.losses == alone.losses
    assert all(cut.parameters[name].equal(alone.parameters[name]) for name in shapes)
