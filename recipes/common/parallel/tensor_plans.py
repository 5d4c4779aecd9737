"""Says which tensor-parallel style each module of a family has: transformers' own plans, and the few lines kept here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.parallel.family_plans import BUILT_IN_DIVIDE, BUILT_IN_TENSOR, VARIANTS, block, head_norms
from recipes.common.parallel.tensor_styles import STYLES

# DeepSeek's latent attention, where transformers' plan leaves it whole: its heads are divided where they leave the latent
_LATENT = {
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
# without a q_lora_rank queries come from one projection
_LATENT_OR_PLAIN = {
    "?layers.*.self_attn.q_proj": "colwise",
    "?layers.*.self_attn.q_b_proj": "colwise",
    **{name: style for name, style in _LATENT.items() if name != "layers.*.self_attn.q_b_proj"},
}

# Entries that transformers' plans lack, or have wrong: found by comparing every family's gradients with one process.
ADDED_TENSOR: dict[str, dict[str, str]] = {
    "axk1": _LATENT,
    "deepseek_v3": _LATENT_OR_PLAIN,
    "youtu": _LATENT_OR_PLAIN,
    "apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"},
    # values decide, by projections and parameters for each head, which keys are seen
    "doge": block("layers.*.self_attn", "q_proj k_proj v_proj", "o_proj", gathered=True)
    | {"layers.*.self_attn.dt_proj": "replicate"},
    # sparse activations: a neuron is on by the mean and spread of all
    "gemma3n_text": block("layers.*.mlp", "gate_proj up_proj", "down_proj", gathered=True),
    "hunyuan_v1_moe": block("layers.*.self_attn", "q_proj k_proj v_proj", "o_proj")
    | head_norms("layers.*.self_attn", "query_layernorm key_layernorm")
    | block("layers.*.mlp.shared_mlp", "gate_proj up_proj", "down_proj"),
    # gate and up lie one after the other in a bank
    "inkling_text": {"layers.*.mlp.experts.gate_up_proj": "packed_colwise"},
    "inkling2_text": {"layers.*.mlp.experts.gate_up_proj": "packed_colwise"},
}
REFUSED_TENSOR: dict[str, str] = {
    "modernbert-decoder": "its _init_weights draws the vocabulary, of which each rank has a part, and then what all have",
    "phimoe": "its experts are drawn at random in training, differently on each rank",
}


def tensor_plan(causal: PreTrainedModel, stack: Stack) -> dict[str, str]:
    """Return module or parameter name -> style. Embedding and head are not in it: they are always sharded by vocabulary.

    What no entry names is whole on every rank, which is right whatever it computes: it reads and gives the same on each. A
    family without a plan has only its embedding and head sharded.
    Raises PlanError for a family that cannot be right so, an unknown style, or an entry of ours that matches nothing.
    """
    family, base = causal.config.model_type, causal.get_submodule(stack.base)
    if family in REFUSED_TENSOR:
        raise PlanError(f"model_type={family} cannot be tensor-parallel: {REFUSED_TENSOR[family]}")
    built_in = _built_in(causal)[0]
    ours = built_in or ADDED_TENSOR.get(family, {})
    patterns = (built_in or getattr(type(causal.config), "base_model_tp_plan", None) or {}) | ours
    unknown = sorted(set(patterns.values()) - set(STYLES))
    if unknown:
        raise PlanError(f"model_type={family}: its plan has the styles {unknown}, which are not in parallel/tensor_styles.py")
    embedding = causal.get_input_embeddings()
    names = [n for n, m in base.named_modules() if n and m is not embedding] + [n for n, _ in base.named_parameters()]
    plan: dict[str, str] = {}
    for pattern, style in patterns.items():
        rule = re.compile(re.escape(pattern.removeprefix("?")).replace(r"\*", r"\d+"))
        matched = [name for name in names if rule.fullmatch(name)]
        # transformers' plans name all variants of a family (dense and expert layers), so only entries of ours must match
        if pattern in ours and not matched and not pattern.startswith("?"):
            raise PlanError(f"model_type={family}: the plan entry {pattern!r} matches nothing in this model")
        plan.update({f"{stack.base}.{name}": style for name in matched})
    return plan


def _built_in(causal: PreTrainedModel) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return our own plan for this config, and the attributes to divide; both empty for a family that has none of ours."""
    family = causal.config.model_type
    if family in VARIANTS and getattr(causal.config, VARIANTS[family][0]):
        return VARIANTS[family][1:]
    return BUILT_IN_TENSOR.get(family, {}), BUILT_IN_DIVIDE.get(family, {})


def divided_attributes(causal: PreTrainedModel, stack: Stack) -> dict[str, tuple[str, ...]]:
    """Return module name -> attributes that count the local shard, to be divided by the tensor size."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, attributes in _built_in(causal)[1].items():
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for name, _ in causal.get_submodule(stack.base).named_modules():
            if rule.fullmatch(name):
                found[f"{stack.base}.{name}"] = attributes
    return found


def whole_matrices(causal: PreTrainedModel, stack: Stack, shards: Mapping[str, object]) -> dict[str, int]:
    """Return the matrices of the layers that every tensor rank holds whole: pattern -> elements in all layers together.

    shards: of the TensorPlan, by parameter.
    """
    found: dict[str, int] = {}
    for name, parameter in causal.get_submodule(stack.layers).named_parameters():
        if parameter.ndim > 1 and f"{stack.layers}.{name}" not in shards:
            pattern = re.sub(r"^\d+", "*", name)
            found[pattern] = found.get(pattern, 0) + parameter.numel()
    return found
