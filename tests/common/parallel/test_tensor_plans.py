"""Every plan that ships is for a real family, and a model that cannot be sharded is refused by name, never sharded wrongly."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recipes.common.model import decoder
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel import tensor_plans
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.parallel.tensor_plans import tensor_plan
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks

OURS = sorted({*tensor_plans.BUILT_IN_TENSOR, *tensor_plans.ADDED_TENSOR})
NAMED = sorted({*OURS, *tensor_plans.REFUSED_TENSOR, *tensor_plans.BUILT_IN_DIVIDE, *decoder.BUILT_IN_STACK})
# by default one has no attention, one leaves open how far positions rotate, and one shares keys and values of layers that a small
# model lacks
FIELDS = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
}


# what a model has in which an optional entry matches
OPTIONAL = {"?layers.*.self_attn.q_proj": {"q_lora_rank": None}}


def config_of(family, **fields):
    """Small, where the family's own widths allow it."""
    fields = FIELDS.get(family, {}) | fields
    try:
        return tiny_config(family, **fields)
    except Exception:  # a family whose widths depend on each other
        return AutoConfig.for_model(family, **fields)


def _plan(family, changes, fields=()):
    """(the plan or the refusal, names of modules and parameters). changes: {table of tensor_plans.py: entry of this family}."""
    for table, entry in changes.items():
        getattr(tensor_plans, table)[family] = entry
    causal = build_empty(config_of(family, **dict(fields)), "eager")
    names = {name for name, _ in causal.named_modules()} | {name for name, _ in causal.named_parameters()}
    try:
        return tensor_plan(causal, find_stack(causal)), names
    except PlanError as error:
        return str(error), names


def plan_of(family, **changes):
    return run_ranks(_plan, 1, family, changes)[0]


@pytest.mark.parametrize("family", NAMED)
def test_a_family_that_is_named_exists(family):
    assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.mark.parametrize("family", OURS)
def test_every_entry_of_ours_matches(family):
    plan, names = plan_of(family)
    assert isinstance(plan, dict), plan
    assert set(plan) <= names
    for pattern, style in (tensor_plans.BUILT_IN_TENSOR.get(family) or tensor_plans.ADDED_TENSOR[family]).items():
        entries = run_ranks(_plan, 1, family, {}, OPTIONAL[pattern])[0][0] if pattern in OPTIONAL else plan
        rule = re.compile(r"\w+\." + re.escape(pattern.removeprefix("?")).replace(r"\*", r"\d+"))
        matched = [name for name in entries if rule.fullmatch(name)]
        layers = config_of(family).num_hidden_layers
        assert 1 <= len(matched) <= layers if pattern.startswith("?") else len(matched) == layers, pattern
        assert {entries[name] for name in matched} == {style}


@pytest.mark.parametrize("family", sorted(tensor_plans.BUILT_IN_TENSOR))
def test_a_plan_of_ours_is_for_a_family_that_transformers_gives_none(family):
    assert not getattr(type(AutoConfig.for_model(family)), "base_model_tp_plan", None)


@pytest.mark.parametrize("family", sorted(tensor_plans.BUILT_IN_DIVIDE))
def test_divided_attributes_exist(family):
    assert run_ranks(_divided, 1, family) == [True]


def _divided(family):
    causal = build_empty(config_of(family), "eager")
    found = tensor_plans.divided_attributes(causal, find_stack(causal))
    modules = dict(causal.named_modules())
    whole = all(isinstance(getattr(modules[name], attribute), int) for name, names in found.items() for attribute in names)
    return whole and len(found) == causal.config.num_hidden_layers * len(tensor_plans.BUILT_IN_DIVIDE[family])


@pytest.mark.parametrize("family", sorted(tensor_plans.REFUSED_TENSOR))
def test_a_refused_family_says_why(family):
    refusal, _ = plan_of(family)
    assert refusal == f"model_type={family} cannot be tensor-parallel: {tensor_plans.REFUSED_TENSOR[family]}"


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_a_family_without_a_plan_has_its_vocabulary_sharded_and_the_rest_whole(family):
    assert run_ranks(_whole, 1, family) == [[True, True, f"model_type={family}: no block of its layers is sharded, which "
                                             "sequence_parallel needs"]]  # fmt: skip


def _whole(family):
    """[only the vocabulary is sharded, every matrix of the layers is told, why sequence parallelism is refused]"""
    causal = build_empty(config_of(family), "eager")
    stack = find_stack(causal)
    shards = plan_tensor_parallel(causal, stack, 2).shards
    matrices = sum(p.numel() for p in causal.get_submodule(stack.layers).parameters() if p.ndim > 1)
    told = sum(tensor_plans.whole_matrices(causal, stack, shards).values()) == matrices
    with pytest.raises(PlanError) as refusal:
        plan_tensor_parallel(causal, stack, 2, sequence_parallel=True)
    return [set(shards) == {f"{stack.embedding}.weight", f"{stack.head}.weight"}, told, str(refusal.value)]


def test_blocks_within_a_block_are_refused_under_sequence_parallelism():
    """The MLP of opt is not a module: its norm is beside its linears, and must not see the whole sequence."""
    assert "model.decoder.layers.0 holds a block and its norm" in run_ranks(_nested, 1)[0]


def _nested():
    causal = build_empty(config_of("opt"), "eager")
    with pytest.raises(PlanError) as refusal:
        plan_tensor_parallel(causal, find_stack(causal), 2, sequence_parallel=True)
    return str(refusal.value)


def test_a_config_with_a_norm_for_each_head_has_its_own_plan():
    """stablelm's heads may each have a norm: its attention is then gathered, and no count of heads is divided."""
    styles, divided = run_ranks(_variants, 1)[0]
    assert styles == ["colwise", "colwise_gather_output"]
    assert divided == [True, False]


def _variants():
    styles, divided = [], []
    for norms in (False, True):
        causal = build_empty(tiny_config("stablelm", qk_layernorm=norms), "eager")
        stack = find_stack(causal)
        styles.append(tensor_plan(causal, stack)["model.layers.0.self_attn.q_proj"])
        divided.append(bool(tensor_plans.divided_attributes(causal, stack)))
    return styles, divided


def test_an_unknown_style_is_refused():
    refusal, _ = plan_of("gpt2", BUILT_IN_TENSOR={"h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "diagonal"})
    assert refusal == "model_type=gpt2: its plan has the styles ['diagonal'], which are not in parallel/tensor_styles.py"


@pytest.mark.parametrize(("family", "table"), [("gpt2", "BUILT_IN_TENSOR"), ("llama", "ADDED_TENSOR")])
def test_an_entry_of_ours_that_matches_nothing_is_refused(family, table):
    layers = "h" if family == "gpt2" else "layers"
    refusal, _ = plan_of(family, **{table: {f"{layers}.*.mlp.up_porj": "colwise"}})
    assert refusal == f"model_type={family}: the plan entry '{layers}.*.mlp.up_porj' matches nothing in this model"


STACKS = {
    "llama": ("model.layers", ("model.embed_tokens",), ("model.norm",), "model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.h", ("transformer.wte", "transformer.wpe"), ("transformer.ln_f",), "transformer.wte", "lm_head"),
    "gpt_neox": ("gpt_neox.layers", ("gpt_neox.embed_in",), ("gpt_neox.final_layer_norm",), "gpt_neox.embed_in", "lm_head"),
    "bloom": (
        "transformer.h",
        ("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        ("transformer.ln_f",),
        "transformer.word_embeddings",
        "lm_head",
    ),
}


@pytest.mark.parametrize("family", STACKS)
def test_where_the_parts_of_a_decoder_are(family):
    stack = run_ranks(_stack, 1, family)[0]
    found = (stack["layers"], stack["before"], stack["after"], stack["embedding"], stack["head"])
    layers, before, after, embedding, head = STACKS[family]
    # dropouts that a plan names beside the embedding may be there too
    assert (found[0], found[2], found[3], found[4]) == (layers, after, embedding, head)
    assert set(before) <= set(found[1])


def _stack(family):
    return vars(find_stack(build_empty(config_of(family), "eager")))


def test_a_model_with_two_stacks_is_refused():
    message = run_ranks(_two_stacks, 1)[0]
    assert message == "model_type=llama: expected one list of 4 layers, found ['left', 'right']"


def _two_stacks():
    causal = build_empty(tiny_config("llama"), "eager")
    base = causal.model
    base.left, base.right = base.layers, nn.ModuleList([nn.Linear(2, 2, device=torch.device("meta")) for _ in range(4)])
    del base.layers
    try:
        find_stack(causal)
    except PlanError as error:
        return str(error)
