"""Plans tensor parallelism for a model, and applies the plan to the modules of a stage.

Every module that a plan names becomes its sharded form, as its style in `tensor_styles` says. The plan's `ShardSpec`s are all
that initial weights and checkpoints need to know of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.linears import is_plain
from recipes.common.model.sharding import ShardSpec, TensorPlan
from recipes.common.model.shared_inputs import SharedInput
from recipes.common.parallel.collectives import copy_to, gather_from
from recipes.common.parallel.experts import with_whole_experts
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.sequence_parallel import find_blocks
from recipes.common.parallel.summed_inputs import copy_shared
from recipes.common.parallel.tensor_plans import divided_attributes, tensor_plan
from recipes.common.parallel.tensor_styles import COLUMN, STYLES, Setting, shard_embedding

# Projections whose output is heads: they may only be sharded between heads. Exact names of transformers 5.
_QUERY_NAMES = frozenset({"q_proj", "qkv_proj", "query_key_value", "c_attn", "q_b_proj", "kv_b_proj", "Wq"})
_KEY_VALUE_NAMES = frozenset({"k_proj", "v_proj"})


def plan_tensor_parallel(
    causal: PreTrainedModel, stack: Stack, size: int, *, sequence_parallel: bool = False, whole_experts: bool = False
) -> TensorPlan:
    """Plan how to shard `causal` (on the meta device) over `size` tensor ranks.

    whole_experts: a tensor rank has whole experts of a mixture, not a slice of each.
    Raises PlanError for a family that cannot be sharded so, or that sequence parallelism does not support, and for shapes that
    `size` does not divide.
    """
    shards = {f"{stack.embedding}.weight": ShardSpec(0)}
    shards.update({f"{stack.head}.{name}": ShardSpec(0) for name, _ in causal.get_submodule(stack.head).named_parameters()})
    if size == 1:
        return TensorPlan(size=1, styles={}, shards={}, divided={}, split_heads=frozenset(), ranks_per_kv_head=1)
    plan = tensor_plan(causal, stack)
    if whole_experts:
        plan = with_whole_experts(plan, causal, stack)
    embedding = causal.get_submodule(stack.embedding)
    if not isinstance(embedding, nn.Embedding):
        raise PlanError(
            f"{stack.embedding} is a {type(embedding).__name__}, not an embedding: it cannot be sharded by vocabulary"
        )
    modules, styles, ranks_per_head, split_heads = dict(causal.named_modules()), {}, set(), set()
    for name, style in plan.items():
        shards.update(_shards_of(causal, modules, name, style))
        if name not in modules:
            continue
        styles[name] = style
        leaf, of_heads = name.rpartition(".")[2], STYLES[style].output_stays_sharded
        if of_heads and leaf in _KEY_VALUE_NAMES:
            ranks = _ranks_per_head(modules[name.rpartition(".")[0]], modules[name], name, size)
            if ranks > 1:
                ranks_per_head.add(ranks)
                split_heads.add(name)
        if of_heads and leaf in _QUERY_NAMES and causal.config.num_attention_heads % size:
            raise PlanError(f"num_attention_heads={causal.config.num_attention_heads} is not a multiple of tensor={size}")
    if len(ranks_per_head) > 1:
        raise PlanError(f"layers differ in key/value heads: with tensor={size}, {sorted(ranks_per_head)} ranks would share one")
    _check_lengths(causal, shards, styles, stack, size)
    return TensorPlan(
        size=size,
        styles=styles,
        shards=shards,
        divided=divided_attributes(causal, stack),
        split_heads=frozenset(split_heads),
        ranks_per_kv_head=max(ranks_per_head, default=1),
        blocks=find_blocks(plan, causal.config.model_type) if sequence_parallel else frozenset(),
    )


def _ranks_per_head(attention: nn.Module, projection: nn.Module, name: str, size: int) -> int:
    heads = projection.weight.shape[0] // attention.head_dim
    if heads % size == 0:
        return 1
    if size % heads:
        raise PlanError(f"{name} has {heads} key/value heads: tensor={size} must divide them or be a multiple of them")
    return size // heads


def _shards_of(causal: PreTrainedModel, modules: dict[str, nn.Module], name: str, style: str) -> dict[str, ShardSpec]:
    """Return how a style shards the parameters of a module, or one parameter that the plan names by itself."""
    label = f"{name} (style {style!r})"
    if name in modules:
        shard = STYLES[style].shard_module
        found = {f"{name}.{leaf}": spec for leaf, spec in shard(modules[name], label).items()} if shard else None
    else:
        shard = STYLES[style].shard_parameter
        found = {name: shard(causal.get_parameter(name), label)} if shard else None
    if found is None:
        kind = f"modules, and {name} is one" if name in modules else f"single parameters, and {name} is one"
        raise PlanError(f"the style {style!r} is not defined for {kind}")
    return found


def _check_lengths(causal: nn.Module, shards: dict[str, ShardSpec], styles: dict[str, str], stack: Stack, size: int) -> None:
    shapes = {name: parameter.shape for name, parameter in causal.named_parameters(remove_duplicate=False)}
    for name, shard in shards.items():
        owner = name.rpartition(".")[0]
        may_pad = owner in (stack.embedding, stack.head) or (owner in styles and STYLES[styles[owner]].may_pad)
        length = shapes[name][shard.dim] // shard.packs
        if length % size and not may_pad:
            raise PlanError(f"{name} has length {length} in the dimension to shard: not a multiple of tensor={size}")


def apply_tensor_parallel(causal: PreTrainedModel, plan: TensorPlan, stack: Stack, grid: Grid) -> None:
    """Connect every module of this stage to the other tensor ranks, as its style says. Its parameters are shards already."""
    if plan.size == 1:
        return
    for name, parameter in causal.named_parameters(remove_duplicate=False):
        if name in plan.shards:  # norms and clipping then count each element of the model once
            parameter.tensor_model_parallel = parameter.model_parallel = True
    modules = dict(causal.named_modules())
    setting = Setting(grid=grid, config=causal.config, sequence_parallel=bool(plan.blocks))
    columns: dict[str, list[nn.Module]] = {}  # by the module that calls them
    for name, style in plan.styles.items():
        if name not in modules:  # on another stage
            continue
        module, parent = modules[name], name.rpartition(".")[0]
        if connect := STYLES[style].connect:
            connect(module, setting)
        _state_local_widths(module)
        if name in plan.split_heads:
            _gather_head(module, grid)
            # this rank then has one whole key/value head, however many query heads it has
            modules[parent].num_key_value_groups = causal.config.num_attention_heads // grid.tensor
        if STYLES[style].in_block == COLUMN and not plan.blocks:  # with sequence parallelism the block gathers its input
            columns.setdefault(parent, []).append(module)
    for name, own in columns.items():
        _share_input_copy(modules[name], own, grid)
    for name, attributes in plan.divided.items():
        for attribute in attributes if name in modules else ():
            # where ranks share a key/value head, each has that one
            setattr(modules[name], attribute, max(getattr(modules[name], attribute) // grid.tensor, 1))
    if isinstance(modules[stack.embedding], nn.Embedding):  # else it is on the first stage
        shard_embedding(modules[stack.embedding], grid)


def _state_local_widths(module: nn.Module) -> None:
    """Set a linear's widths to its shard's (Conv1D computes with them)."""
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _gather_head(module: nn.Module, grid: Grid) -> None:
    forward = module.forward
    module.forward = lambda x: gather_from(forward(x), grid.kv_group, partial=True)


def _share_input_copy(parent: nn.Module, columns: list[nn.Module], grid: Grid) -> None:
    """Let projections that read one tensor (q, k and v; gate and up) share one copy of it: one all-reduce of its gradient.

    Invariant: during one call of `parent`, `last` holds at most one input and its copy. An input is the same if it is the same
    object, and an object that `last` holds cannot be freed, so no other tensor can take its identity. A projection that reads
    another tensor makes a copy of its own, which is only slower. Between calls `last` is empty, so that it keeps no memory: also
    after one that recomputation stops half-way by an exception.
    """
    last: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = [module for module in columns if is_plain(module)]
    shared, alone = SharedInput(plain), len(plain) == len(columns)

    def copied(x: torch.Tensor) -> torch.Tensor:
        if not last or last[0][0] is not x:
            beside = bool(plain) and torch.is_grad_enabled() and x.requires_grad
            group = grid.tensor_group
            last[:] = [(x, copy_shared(x, group, shared, alone=alone) if beside else copy_to(x, group))]
        return last[0][1]

    inner = parent.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:
            last.clear()
            shared.forget()

    def read_copy(module: nn.Module) -> None:
        forward = module.forward
        module.forward = lambda x: forward(copied(x))

    for module in columns:
        read_copy(module)
    parent.forward = run
