"""What layers are given beside hidden states crosses the cuts, with its gradients: pipelines train what transformers trains."""

import pytest
from transformers import DeepseekV4Config, Gemma3nTextConfig, GlmMoeDsaConfig

from recipes.common.checks.family_trials import sequence_problems
from recipes.common.config.placement import coordinates
from recipes.common.model.decoder import PlanError
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.grid import Grid, one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline import crossings
from recipes.common.pipeline.crossings import find_crossings
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.parity import assert_same, both_of_each, trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial, outcome, train_in_layout

# embeddings for each layer; the last four layers use keys and values of the third and fourth; hidden states are four streams
# before the sequences; and projections outside the layers, before and after them
GEMMA_3N = Gemma3nTextConfig(
    **{"vocab_size": 131, "vocab_size_per_layer_input": 131, "hidden_size": 32, "hidden_size_per_layer_input": 8},
    **{"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "laurel_rank": 8},
    **{"num_hidden_layers": 8, "num_kv_shared_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 4},
    **{"activation_sparsity_pattern": [0.0] * 8, "sliding_window": 8, "max_position_embeddings": 64},
)


TRIALS = {
    # an indexer's choices: integers
    "choices": trial_of(shrink(GlmMoeDsaConfig(), Layout(pipeline=2)), 2, 1, 1, global_seqs=2, recompute="full"),
    "ids": trial_of(shrink(DeepseekV4Config(), Layout(pipeline=2)), 2, 1, 1, global_seqs=2, pipeline_schedule="zero_bubble"),
    # the stage in the middle hands on what it does not need
    "three stages": gradient_trial(trial_of(GEMMA_3N, 3, 1, 1, global_seqs=3, recompute="full")),
    "folded": gradient_trial(trial_of(GEMMA_3N, 2, 2, 1, global_seqs=2, pipeline_schedule="zero_bubble_v")),
}


@pytest.fixture(scope="module")
def trained():
    """Name -> (what the layout left, what the oracle left)."""
    return both_of_each(TRIALS)


@pytest.mark.parametrize("name", TRIALS)
def test_a_pipeline_trains_what_plain_transformers_trains(trained, name):
    assert_same(*trained[name])


def test_bf16_pipeline_equals_one_process_bit_for_bit():
    """Untied: of a tied weight, one process rounds the sum of both gradients to bf16."""
    config = Gemma3nTextConfig(**GEMMA_3N.to_diff_dict() | {"tie_word_embeddings": False})
    one, two = (trial_of(config, p, 1, 1, global_seqs=2, deepspeed=ds_config("zero1_bf16.json")) for p in (1, 2))
    ((shapes, part),) = run_ranks(_trained_with_shapes, 1, one)
    alone, cut = outcome([part], shapes), outcome(run_ranks(train_in_layout, 2, two), shapes)
    assert cut.losses == alone.losses
    assert [name for name in shapes if not cut.parameters[name].equal(alone.parameters[name])] == []


def _trained_with_shapes(trial):
    shapes = {name: parameter.shape for name, parameter in build_empty(trial.model, "eager").named_parameters()}
    return shapes, train_in_layout(trial)


def test_what_crosses_is_found_and_named():
    """Of four chunks of two layers each, and of a family whose layers are given hidden states alone."""
    messages, alone = run_ranks(_messages, 1)[0]
    layers_and_words = [{(place[0], *place[1][:2]) for member in message[2:] for place in member} for message in messages]
    # each layer's embedding comes from the first chunk, through those between; keys and values come once they are computed
    assert layers_and_words[1] == {(layer, 2) for layer in range(2, 8)}
    shared = {(4, "shared_kv_states", kind) for kind in ("sliding_attention", "full_attention")}
    assert layers_and_words[2] == {(layer, 2) for layer in range(4, 8)} | shared
    assert {word for word in layers_and_words[3] if len(word) == 3} == {(6, *word[1:]) for word in shared}
    assert [len(message) for message in messages] == [0, 8, 10, 8]  # hidden states and ids before them
    assert alone == ()


def _messages():
    chunks = [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    planned = plan_model(GEMMA_3N, attention="eager")
    found = find_crossings(planned.causal, planned.stack, "eager", chunks)
    plain = plan_model(tiny_config("llama"), attention="eager")
    alone = find_crossings(plain.causal, plain.stack, "eager", [range(0, 1), range(1, 2)]).messages
    return [[[tuple(place) for place in member] for member in message] for message in found.messages], alone


def test_every_parameter_is_on_one_stage_also_outside_the_layers():
    """The tied embedding aside, which the first and the last stage share."""
    names = run_ranks(_names, 1)[0]
    doubled = {name for name in names[0] + names[1] + names[2] if sum(map([*names[0], *names[1], *names[2]].count, [name])) > 1}
    assert doubled == {"model.embed_tokens.weight"}
    assert "model.embed_tokens_per_layer.weight" in names[0]
    assert "model.altup_unembed_projections.0.weight" in names[2]
    assert all(name.startswith("model.layers.") for name in names[1])


def _names():
    names, layout = [], Layout(pipeline=3)
    for index in range(3):
        grid = Grid(**(vars(one_process()) | vars(coordinates(index, 3, layout))))
        stage = build_stage(plan_model(GEMMA_3N, layout, attention="eager"), grid, layout, seq_len=16, draw=False)
        names.append([name for name, _ in stage.hf_named_parameters()])
    return names


def test_with_sequence_parallelism_nothing_but_hidden_states_is_handed_on():
    """By the checks, and by a start that no check came before."""
    problems, raised = run_ranks(_shared_sequences, 1)[0]
    more = "its layers hand on more than hidden states, which sequence_parallel does not share between tensor ranks"
    assert problems == [f"sequence_parallel=True with pipeline=2: model_type=gemma3n_text: {more}; use sequence_parallel=False"]
    assert raised == f"model_type=gemma3n_text: {more}"


def _shared_sequences():
    layout = Layout(tensor=2, pipeline=2, sequence_parallel=True)
    grid = Grid(**(vars(one_process()) | vars(coordinates(0, 4, layout))))
    with pytest.raises(PlanError) as refused:
        build_stage(plan_model(GEMMA_3N, layout, attention="eager"), grid, layout, seq_len=16, draw=False)
    return sequence_problems(Gemma3nTextConfig(num_kv_shared_layers=0), layout, "eager"), str(refused.value)


def _refusals():
    """What is said where a part of the model raises, an error of its family's and one of ours."""
    planned, said = plan_model(GEMMA_3N, attention="eager"), []
    for error in (ValueError("planted"), PlanError("its layers cannot be parted")):

        def fail(self, chunks, *, more, error=error):
            raise error

        crossings._Whole.try_chunks = fail
        with pytest.raises(PlanError) as refused:
            find_crossings(planned.causal, planned.stack, "eager", [range(0, 4), range(4, 8)])
        said.append(str(refused.value).removeprefix("model_type=gemma3n_text cannot be partitioned into stages: "))
    return said


def test_what_cannot_be_handed_on_is_refused_with_the_reason():
    assert run_ranks(_refusals, 1)[0] == ["ValueError: planted", "its layers cannot be parted"]


def _changed_between():
    """What is said of a model that changes hidden states between its layers."""
    planned = plan_model(GEMMA_3N, attention="eager")

    def changing(config, attention):
        causal = build_empty(config, attention)
        for layer in causal.model.layers:
            layer.register_forward_pre_hook(lambda module, args: (args[0] + 1.0, *args[1:]))
        return causal

    crossings.build_empty = changing
    with pytest.raises(PlanError) as refused:
        find_crossings(planned.causal, planned.stack, "eager", [range(0, 1), range(1, 8)])
    return str(refused.value)


def test_hidden_states_that_change_between_layers_are_refused():
    reason = "layer 1 is not given what layer 0 returns"
    assert run_ranks(_changed_between, 1)[0] == f"model_type=gemma3n_text cannot be partitioned into stages: {reason}"
