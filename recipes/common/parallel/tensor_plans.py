"""Says which tensor-parallel style each module of a family has: transformers' own plans, and the few lines kept here."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.parallel.tensor_styles import STYLES

# Plans of families that transformers gives none.
_GPT2_TENSOR = {
    "h.*.attn.c_attn": "packed3_colwise",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
BUILT_IN_TENSOR: dict[str, dict[str, str]] = {"gpt2": _GPT2_TENSOR}
# Entries that transformers' plans lack: found by comparing every family's gradients with one process.
ADDED_TENSOR: dict[str, dict[str, str]] = {"apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}}
REFUSED_TENSOR: dict[str, str] = {
    "doge": "its plan does not shard the per-head parameters between the projections",
    "phimoe": "its experts are drawn at random in training, differently on each rank",
}
# Attributes that count heads or widths of the local shard.
BUILT_IN_DIVIDE: dict[str, dict[str, tuple[str, ...]]] = {"gpt2": {"h.*.attn": ("split_size", "num_heads")}}


def tensor_plan(causal: PreTrainedModel, stack: Stack) -> dict[str, str]:
    """Return module or parameter name -> style. Embedding and head are not in it: they are always sharded by vocabulary.

    Raises PlanError for a family without a plan, a style that is not in STYLES, or an entry of ours that matches nothing.
    """
    family, base = causal.config.model_type, causal.get_submodule(stack.base)
    if family in REFUSED_TENSOR:
        raise PlanError(f"model_type={family} cannot be tensor-parallel: {REFUSED_TENSOR[family]}")
    ours = BUILT_IN_TENSOR.get(family) or ADDED_TENSOR.get(family, {})
    patterns = BUILT_IN_TENSOR.get(family) or getattr(type(causal.config), "base_model_tp_plan", None)
    if not patterns:
        raise PlanError(f"model_type={family} has no plan in transformers, nor in recipes/common/parallel/tensor_plans.py")
    patterns = patterns | ours
    unknown = sorted(set(patterns.values()) - set(STYLES))
    if unknown:
        raise PlanError(f"model_type={family}: its plan has the styles {unknown}, which are not in parallel/tensor_styles.py")
    embedding = causal.get_input_embeddings()
    names = [n for n, m in base.named_modules() if n and m is not embedding] + [n for n, _ in base.named_parameters()]
    plan: dict[str, str] = {}
    for pattern, style in patterns.items():
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        matched = [name for name in names if rule.fullmatch(name)]
        # transformers' plans name all variants of a family (dense and expert layers), so only entries of ours must match
        if pattern in ours and not matched:
            raise PlanError(f"model_type={family}: the plan entry {pattern!r} matches nothing in this model")
        plan.update({f"{stack.base}.{name}": style for name in matched})
    if not any(STYLES[style].is_sharded for style in plan.values()):
        raise PlanError(f"model_type={family}: no entry of its plan shards anything in this model")
    return plan


def divided_attributes(causal: PreTrainedModel, stack: Stack) -> dict[str, tuple[str, ...]]:
    """Return module name -> attributes that count the local shard, to be divided by the tensor size."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, attributes in BUILT_IN_DIVIDE.get(causal.config.model_type, {}).items():
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for name, _ in causal.get_submodule(stack.base).named_modules():
            if rule.fullmatch(name):
                found[f"{stack.base}.{name}"] = attributes
    return found
