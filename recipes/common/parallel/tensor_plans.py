"""Which tensor-parallel style each module of a family has."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack

STYLES = frozenset(
    {
        "colwise",
        "rowwise",
        "colwise_gather_output",
        "colwise_rep",
        "rowwise_split_input",
        "rowwise_rep",
        "packed_colwise",
        "packed3_colwise",
        "packed_rowwise",
        "moe_tp_experts",
        "replicated_with_grad_allreduce",
        "mla_kv_a_proj",
        "all_reduce",
        "local_params",
        "embedding_rowwise",
    }
)
# Styles that only say how a module talks; the rest cut parameters.
_QUIET = frozenset({"moe_tp_experts", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce", "local_params"})
# Plans of families that transformers gives none. `divide`: attributes that count heads or widths of the local shard.
_GPT2_TENSOR = {
    "h.*.attn.c_attn": "packed3_colwise",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
BUILT_IN_TENSOR: dict[str, dict[str, str]] = {"gpt2": _GPT2_TENSOR}
# What transformers' plans leave out: found by holding every family's gradients to one process.
ADDED_TENSOR: dict[str, dict[str, str]] = {"apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}}
REFUSED_TENSOR: dict[str, str] = {
    "doge": "its plan does not cut the per-head parameters between the projections",
    "phimoe": "its experts are drawn at random in training, differently on each rank",
}
BUILT_IN_DIVIDE: dict[str, dict[str, tuple[str, ...]]] = {"gpt2": {"h.*.attn": ("split_size", "num_heads")}}


def tensor_plan(causal: PreTrainedModel, stack: Stack) -> dict[str, str]:
    """Name of each module or parameter in the plan -> its style. Embedding and head are not in it: always cut by vocabulary.

    Raises PlanError for a family without a plan, a style that is not known here, or a plan of ours that matches nothing.
    """
    family, base = causal.config.model_type, causal.get_submodule(stack.base)
    if family in REFUSED_TENSOR:
        raise PlanError(f"model_type={family} cannot be cut by tensors: {REFUSED_TENSOR[family]}")
    ours = BUILT_IN_TENSOR.get(family) or ADDED_TENSOR.get(family, {})
    patterns = BUILT_IN_TENSOR.get(family) or getattr(type(causal.config), "base_model_tp_plan", None)
    if not patterns:
        raise PlanError(f"model_type={family} has no tensor plan, in transformers or in recipes/common/parallel/tensor_plans.py")
    patterns = patterns | ours
    unknown = sorted(set(patterns.values()) - STYLES)
    if unknown:
        raise PlanError(f"model_type={family}: its tensor plan uses styles {unknown}, which Trifold does not know")
    embedding = causal.get_input_embeddings()
    names = [n for n, m in base.named_modules() if n and m is not embedding] + [n for n, _ in base.named_parameters()]
    plan: dict[str, str] = {}
    for pattern, style in patterns.items():
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        matched = [name for name in names if rule.fullmatch(name)]
        # transformers' plans name the variants of a family side by side (dense and expert layers): only ours must match
        if pattern in ours and not matched:
            raise PlanError(f"model_type={family}: the plan entry {pattern!r} matches nothing in this model")
        plan.update({f"{stack.base}.{name}": style for name in matched})
    if not any(style not in _QUIET for style in plan.values()):
        raise PlanError(f"model_type={family}: none of its tensor plan's entries matches this model")
    return plan


def divided_attributes(causal: PreTrainedModel, stack: Stack) -> dict[str, tuple[str, ...]]:
    """Module name -> attributes that count the local shard and so are divided by the tensor size."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, attributes in BUILT_IN_DIVIDE.get(causal.config.model_type, {}).items():
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for name, _ in causal.get_submodule(stack.base).named_modules():
            if rule.fullmatch(name):
                found[f"{stack.base}.{name}"] = attributes
    return found
