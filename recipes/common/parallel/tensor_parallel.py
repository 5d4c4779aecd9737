"""The tensor-parallel substitution: each entry of a plan swaps a linear, an embedding or an expert bank for its split form.

A module keeps its class, its place and its parameter names; its parameters become this rank's shards and its forward talks to
the other tensor ranks. `ShardSpec` says how a parameter's shard lies in the whole tensor: it is all that initialisation and
checkpoints need to know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.linears import linear
from recipes.common.model.sharding import ShardSpec, TensorPlan
from recipes.common.parallel.collectives import copy_to, gather_from, reduce_from, split_to, sum_gradient
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.sequence_parallel import SEQUENCE_STYLES, find_blocks
from recipes.common.parallel.tensor_plans import divided_attributes, tensor_plan

Forward = Callable[..., torch.Tensor]

# Projections whose output is heads: they may only be cut between heads. Exact names of transformers 5.
_QUERY_NAMES = frozenset({"q_proj", "qkv_proj", "query_key_value", "c_attn", "q_b_proj", "kv_b_proj"})
_KEY_VALUE_NAMES = frozenset({"k_proj", "v_proj"})


def plan_tensor_parallel(causal: PreTrainedModel, stack: Stack, size: int, *, sequence_parallel: bool = False) -> TensorPlan:
    """How to cut `causal` (on the meta device) over `size` tensor ranks.

    Raises PlanError for a family without a plan, for one that sequence parallelism does not know, and for shapes that `size`
    does not divide.
    """
    cuts = {f"{stack.embedding}.weight": ShardSpec(0)}
    cuts.update({f"{stack.head}.{name}": ShardSpec(0) for name, _ in causal.get_submodule(stack.head).named_parameters()})
    if size == 1:
        return TensorPlan(1, {}, {}, {}, frozenset(), 1)
    plan = tensor_plan(causal, stack)
    embedding = causal.get_submodule(stack.embedding)
    if not isinstance(embedding, nn.Embedding) or len(list(embedding.parameters())) > 1:
        raise PlanError(f"{stack.embedding} is a {type(embedding).__name__} that does more than look up: it cannot be cut")
    modules, styles, shares, shared = dict(causal.named_modules()), {}, set(), set()
    for name, style in plan.items():
        if name not in modules:
            cuts[name] = _parameter_cut(style, causal.get_parameter(name), name)
            continue
        styles[name] = style
        cuts.update({f"{name}.{k}": cut for k, cut in _module_cuts(style, modules[name], name).items()})
        leaf = name.rpartition(".")[2]
        if style == "colwise" and leaf in _KEY_VALUE_NAMES:
            share = _kv_share(modules[name.rpartition(".")[0]], modules[name], name, size)
            if share > 1:
                shares.add(share)
                shared.add(name)
        if style in ("colwise", "packed3_colwise") and leaf in _QUERY_NAMES and causal.config.num_attention_heads % size:
            raise PlanError(f"num_attention_heads={causal.config.num_attention_heads} is not a multiple of tensor={size}")
    if len(shares) > 1:
        raise PlanError(f"layers differ in key/value heads: tensor={size} would share them {sorted(shares)} ways at once")
    _check_lengths(causal, cuts, styles, stack, size)
    blocks = find_blocks(plan, causal.config.model_type) if sequence_parallel else frozenset()
    return TensorPlan(size, styles, cuts, divided_attributes(causal, stack), frozenset(shared), max(shares, default=1), blocks)


def _kv_share(attention: nn.Module, projection: nn.Module, name: str, size: int) -> int:
    heads = projection.weight.shape[0] // attention.head_dim
    if heads % size == 0:
        return 1
    if size % heads:
        raise PlanError(f"{name} has {heads} key/value heads: tensor={size} must divide them or be a multiple of them")
    return size // heads


def _module_cuts(style: str, module: nn.Module, name: str) -> dict[str, ShardSpec]:
    """Cuts of a module's own parameters under a style."""
    if style in ("moe_tp_experts", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce", "local_params"):
        return {}
    if style == "embedding_rowwise":
        return {"weight": ShardSpec(0)}
    if not isinstance(module, nn.Linear | Conv1D):
        raise PlanError(f"{name} is a {type(module).__name__}: the style {style!r} is known for linear layers only")
    out_dim, in_dim = (1, 0) if isinstance(module, Conv1D) else (0, 1)
    if style in ("rowwise", "rowwise_split_input", "rowwise_rep"):
        return {"weight": ShardSpec(in_dim)}
    packs = {"packed_colwise": 2, "packed3_colwise": 3}.get(style, 1)
    cuts = {"weight": ShardSpec(out_dim, packs)}
    if module.bias is not None:
        cuts["bias"] = ShardSpec(0, packs)
    return cuts


def _parameter_cut(style: str, parameter: nn.Parameter, name: str) -> ShardSpec:
    """The cut of a bare parameter named by a plan: an expert bank [experts, out, in], or one value a head."""
    if parameter.ndim == 1 and style == "colwise":
        return ShardSpec(0)
    dims = {"colwise": -2, "packed_colwise": -2, "rowwise": -1, "packed_rowwise": -1}
    if parameter.ndim < 2 or style not in dims:
        raise PlanError(f"{name} has shape {tuple(parameter.shape)}: the style {style!r} is not known for it")
    return ShardSpec(parameter.ndim + dims[style], 2 if style.startswith("packed") else 1)


def _check_lengths(causal: nn.Module, cuts: dict[str, ShardSpec], styles: dict[str, str], stack: Stack, size: int) -> None:
    shapes = {name: parameter.shape for name, parameter in causal.named_parameters(remove_duplicate=False)}
    for name, cut in cuts.items():
        owner = name.rpartition(".")[0]
        padded = owner in (stack.embedding, stack.head) or styles.get(owner) in ("colwise_gather_output", "embedding_rowwise")
        length = shapes[name][cut.dim] // cut.packs
        if length % size and not padded:
            raise PlanError(f"{name} has length {length} in its cut dimension: not a multiple of tensor={size}")


def apply_tensor_parallel(causal: PreTrainedModel, split: TensorPlan, stack: Stack, grid: Grid) -> None:
    """Make every module that this stage holds talk as its style says. Its parameters are this rank's shards already."""
    if split.size == 1:
        return
    for name, parameter in causal.named_parameters(remove_duplicate=False):
        if name in split.cuts:  # norms and clipping then count each element of the model once
            parameter.tensor_model_parallel = parameter.model_parallel = True
    modules = dict(causal.named_modules())
    forwards = SEQUENCE_STYLES if split.blocks else _STYLES
    columns: dict[str, list[nn.Module]] = {}  # by the module that calls them
    for name, style in split.styles.items():
        if name not in modules:  # on another stage
            continue
        module = modules[name]
        if style == "mla_kv_a_proj":
            module.qk_rope_head_dim = causal.config.qk_rope_head_dim
        if style == "replicated_with_grad_allreduce":
            for parameter in module.parameters(recurse=False):
                sum_gradient(parameter, grid.tensor_group)
        elif style == "embedding_rowwise":
            split_embedding(module, grid)
        elif style != "local_params":
            module.forward = forwards[style](module, module.forward, grid)
        _shrink(module)
        if name in split.kv_shared:
            module.forward = _share_heads(module.forward, grid)
            attention = modules[name.rpartition(".")[0]]
            # one key/value head is here, however many query heads this rank has
            attention.num_key_value_groups = causal.config.num_attention_heads // grid.tensor
        if style in _COLUMNS and not split.blocks:
            columns.setdefault(name.rpartition(".")[0], []).append(module)
    for name, own in columns.items():
        _share_copy(modules[name], own, grid)
    for name, attributes in split.divided.items():
        for attribute in attributes if name in modules else ():
            setattr(modules[name], attribute, getattr(modules[name], attribute) // grid.tensor)
    if isinstance(modules[stack.embedding], nn.Embedding):  # else it is on the first stage
        split_embedding(modules[stack.embedding], grid)


def split_embedding(module: nn.Embedding, grid: Grid) -> None:
    """Look up the rows that are here, zero elsewhere, and sum over the tensor ranks. A subclass's own scaling is kept."""
    rows = module.weight.shape[0]
    first = grid.tensor_rank * rows
    if module.padding_idx is not None:
        local = module.padding_idx - first
        module.padding_idx = local if 0 <= local < rows else None
    look_up = module.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        absent = (ids < first) | (ids >= first + rows)
        found = look_up((ids - first).masked_fill(absent, 0))
        return reduce_from(found.masked_fill(absent.unsqueeze(-1), 0.0), grid.tensor_group)

    module.forward = forward


def _shrink(module: nn.Module) -> None:
    """A linear's stated widths follow its shard (Conv1D computes with them)."""
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _share_copy(parent: nn.Module, columns: list[nn.Module], grid: Grid) -> None:
    """Projections that read one tensor (q, k and v; gate and up) sum its gradient here before it is summed over the ranks: once.

    Each call of `parent` remembers the last input and its copy; one that reads another tensor makes a copy of its own.
    """
    last: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copied(x: torch.Tensor) -> torch.Tensor:
        if not last or last[0][0] is not x:
            last[:] = [(x, copy_to(x, grid.tensor_group))]
        return last[0][1]

    def on_copy(forward: Forward) -> Forward:
        return lambda x: forward(copied(x))

    for module in columns:
        module.forward = on_copy(module.forward)
    # also where recomputation stops a call half-way; what is kept longer would be memory
    parent.register_forward_hook(lambda *_: last.clear(), always_call=True)


def _column(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    return forward  # its input is copied to the ranks by _share_copy


def _column_gather(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    width = module.out_features  # of the whole: what lies beyond is padding
    return lambda x: gather_from(forward(x), grid.tensor_group)[..., :width]


def _row(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = reduce_from(linear(module, x, with_bias=False), grid.tensor_group)
        return y if module.bias is None else y + module.bias  # once, not once a rank

    return run


def _row_split(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    row = _row(module, forward, grid)
    return lambda x: row(split_to(x, grid.tensor_group))


def _experts(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    def run(hidden: torch.Tensor, *routing: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        group = grid.tensor_group
        # routing weights are floats that multiply every rank's part of the experts; expert indices are integers
        routing = tuple(copy_to(r, group) if r.is_floating_point() else r for r in routing)
        named = {k: copy_to(r, group) if r.is_floating_point() else r for k, r in named.items()}
        return reduce_from(forward(copy_to(hidden, group), *routing, **named), group)

    return run


def _all_reduce_output(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    return lambda *args, **kwargs: reduce_from(forward(*args, **kwargs), grid.tensor_group)


def _mla_key_value(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    """DeepSeek's compressed key: its rotary part goes past the split projections, so each rank has part of its gradient."""

    def run(x: torch.Tensor) -> torch.Tensor:
        y = forward(x)
        rope = module.qk_rope_head_dim
        return torch.cat([y[..., :-rope], copy_to(y[..., -rope:], grid.tensor_group)], dim=-1)

    return run


def _share_heads(forward: Forward, grid: Grid) -> Forward:
    return lambda x: gather_from(forward(x), grid.kv_group, partial=True)


_COLUMNS = frozenset({"colwise", "packed_colwise", "packed3_colwise", "colwise_gather_output", "colwise_rep"})

_STYLES: dict[str, Callable[[nn.Module, Forward, Grid], Forward]] = {
    "colwise": _column,
    "packed_colwise": _column,
    "packed3_colwise": _column,
    "colwise_gather_output": _column_gather,
    "colwise_rep": _column_gather,
    "rowwise": _row,
    "rowwise_split_input": _row_split,
    "rowwise_rep": _row_split,
    "moe_tp_experts": _experts,
    "all_reduce": _all_reduce_output,
    "mla_kv_a_proj": _mla_key_value,
}
