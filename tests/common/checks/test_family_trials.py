"""Trials of a family: those that can be partitioned pass at any depth, others are refused by name; masking likewise."""

import pytest
import torch
from transformers import AutoConfig, GlmMoeDsaConfig

from recipes.common.checks.family_trials import masking_problems, partition_problems, varlen_problems
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize("pipeline", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "apertus"])
def test_families_that_can_be_partitioned(family, pipeline):
    assert run_ranks(partition_problems, 1, tiny_config(family), Layout(pipeline=pipeline, tensor=2), "eager") == [[]]


def test_a_family_whose_layers_hand_on_more_than_hidden_states():
    assert run_ranks(partition_problems, 1, GlmMoeDsaConfig(), Layout(pipeline=2), "eager") == [[]]


@pytest.mark.parametrize("fault", ["a look at the layer before", "one parameter in two layers"])
def test_a_partition_that_would_train_something_else_is_refused(fault):
    """Faults planted in llama: the layers pass something on beside their hidden states, or share a weight."""
    (problem,) = run_ranks(_with_fault, 1, fault)[0]
    assert problem.startswith("model_type=llama cannot be partitioned into stages: its layers share more than hidden states")
    assert problem.endswith("use pipeline=1 (ZeRO 1 to 3 and tensor parallelism remain)")


def _with_fault(fault):
    from transformers.models.llama import modeling_llama

    layer, model = modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaModel
    forward, init = layer.forward, model.__init__

    def look_back(self, hidden_states, *args, **kwargs):
        """Every layer adds what the one before it was given, read off that layer itself."""
        index = self.self_attn.layer_idx
        before = getattr(self.peers[0][index - 1], "given", None) if index else None
        self.given = hidden_states
        out = forward(self, hidden_states, *args, **kwargs)
        return out if before is None else out + 0.1 * before

    def build(self, config):
        init(self, config)
        for part in self.layers:
            part.peers = (self.layers,)  # in a tuple, so that it is no submodule
        if fault == "one parameter in two layers":
            self.layers[3].mlp.up_proj = self.layers[0].mlp.up_proj

    model.__init__ = build
    if fault == "a look at the layer before":
        layer.forward = look_back
    return partition_problems(tiny_config("llama"), Layout(pipeline=2), "eager")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gpt2"])
def test_families_of_plain_attention_keep_documents_apart(family, attention):
    assert run_ranks(_masking, 1, family, attention) == [[]]


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_mamba"])
def test_families_that_carry_state_over_a_document_are_refused_by_name(family):
    problems = run_ranks(_masking, 1, family, "eager")[0]
    assert len(problems) == 1
    assert family in problems[0]
    assert problems[0].startswith("mask_documents=True: ")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "deepseek_v3"])
def test_families_whose_masks_are_documents_and_windows_need_none(family):
    """OPT among them, whose own masks know no documents."""
    assert run_ranks(_varlen, 1, family) == [[[], []]]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", "model_type=llama4_text masks more than what is later or beyond a window"),
        ("inkling_text", "InklingAttention changes the scores by a soft cap or adds a bias to them"),
        ("falcon", "unsupported operand type(s) for +: 'Tensor' and "),
        ("jamba", "it does not call attention through transformers' table of attention functions"),
    ],
)
def test_families_with_other_masks_are_refused_by_name(family, reason):
    masking, (problem,) = run_ranks(_varlen, 1, family)[0]
    assert masking  # nor with documents
    assert problem.startswith(f"attention='varlen': {'a tiny falcon' if family == 'falcon' else f'model_type={family}: '}")
    assert reason in problem and problem.endswith("use attention='sdpa'")


def test_an_attention_that_is_more_than_causal_is_refused():
    (problem,) = run_ranks(_with_its_own_window, 1)[0]
    assert problem.startswith("attention='varlen': attention of model_type=llama is more than causal with a window (a tiny model")


def _with_its_own_window():
    """A llama whose attention sees three keys, wherever it is asked for a mask, and does not say so."""
    from transformers import masking_utils

    def near(*, q_length, **options):
        every = torch.ones(q_length, q_length, dtype=torch.bool)
        return every.tril().triu(-2)[None, None]

    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = near
    return varlen_problems(tiny_config("llama"), "varlen", mask_documents=False)


def _varlen(family: str) -> list[list[str]]:
    config = AutoConfig.for_model(family)
    documents = masking_problems(config, "varlen") or varlen_problems(config, "varlen", mask_documents=True)
    return [documents, varlen_problems(config, "varlen", mask_documents=family == "falcon")]


def _masking(family: str, attention: str) -> list[str]:
    return masking_problems(AutoConfig.for_model(family), attention)
