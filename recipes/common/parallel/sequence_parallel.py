"""Megatron's sequence parallelism (arXiv 2205.05198, section 4.2.2) in unmodified Hugging Face layers.

Between the blocks that tensor parallelism cuts (attention, MLP) each tensor rank holds and computes its part of the sequence
alone: norms, residual sums, dropout, and what is handed to the next stage. A block's input is gathered and its output
reduce-scattered, which together move as much as the all-reduce they replace. Inside a block all is as without: rotary
embeddings and masks are made by the base model for whole sequences. Parameters used outside the blocks see part of the tokens,
so their gradients are summed over the tensor ranks.

What a block's linears keep of its input for the backward pass is this rank's part; it is gathered a second time there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.linears import linear
from recipes.common.parallel.collectives import (
    all_gather_sequence,
    gather_from,
    gather_sequence,
    scatter_sequence,
    split_to,
    sum_gradient,
)
from recipes.common.parallel.grid import Grid

if TYPE_CHECKING:
    from recipes.common.model.sharding import TensorPlan

Forward = Callable[..., torch.Tensor]

_ROWS = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
_COLUMNS = frozenset({"colwise", "packed_colwise", "packed3_colwise", "colwise_gather_output", "colwise_rep"})
_INSIDE = frozenset({"replicated_with_grad_allreduce"})


def find_blocks(styles: dict[str, str], family: str) -> frozenset[str]:
    """Names of the modules whose input is gathered: those that hold a row-cut linear. `styles`: the tensor plan.

    Raises PlanError for a family that cuts more than plain pairs of column and row.
    """
    unknown = sorted(set(styles.values()) - _ROWS - _COLUMNS - _INSIDE)
    if unknown:
        raise PlanError(f"model_type={family}: its tensor plan uses {unknown}, which sequence_parallel does not know")
    blocks = frozenset(name.rpartition(".")[0] for name, style in styles.items() if style in _ROWS)
    outside = sorted(n for n, s in styles.items() if s in _COLUMNS and n.rpartition(".")[0] not in blocks)
    if outside:
        raise PlanError(f"model_type={family}: {outside[0]} has no row-cut linear beside it, as sequence_parallel needs")
    return blocks


def _column(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    return forward


def _column_gather(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    width = module.out_features  # of the whole: what lies beyond is padding
    return lambda x: gather_from(forward(x), grid.tensor_group)[..., :width]


def _row(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = scatter_sequence(linear(module, x, with_bias=False), grid.tensor_group, partial=True)
        return y if module.bias is None else y + module.bias

    return run


def _row_split(module: nn.Module, forward: Forward, grid: Grid) -> Forward:
    row = _row(module, forward, grid)
    return lambda x: row(split_to(x, grid.tensor_group))


# The sum over ranks of what a column's gradient and a row's output are moves to the bounds of the block.
SEQUENCE_STYLES: dict[str, Callable[[nn.Module, Forward, Grid], Forward]] = {
    "colwise": _column,
    "packed_colwise": _column,
    "packed3_colwise": _column,
    "colwise_gather_output": _column_gather,
    "colwise_rep": _column_gather,
    "rowwise": _row,
    "rowwise_split_input": _row_split,
    "rowwise_rep": _row_split,
}


def shard_sequence(
    causal: nn.Module,
    stack: Stack,
    split: TensorPlan,
    chunks: tuple[range, ...],
    stand_ins: dict[str, nn.Module],
    grid: Grid,
    recomputed: range,
) -> None:
    """Let this stage's layers, and the final norm, run on this rank's part of the sequence.

    chunks, stand_ins: as in Stage. After the tensor-parallel substitution and before recomputation is put around the layers.
    """
    layers = causal.get_submodule(stack.layers)
    own = [index for chunk in chunks for index in chunk]
    for index in own:
        for name, module in layers[index].named_modules(prefix=f"{stack.layers}.{index}"):
            if name in split.blocks:
                _gather_input(module, grid.tensor_group, keep_part=index not in recomputed)
    if grid.is_first_stage:
        layers[own[0]].register_forward_pre_hook(partial(_scatter_input, grid.tensor_group), with_kwargs=True)
    for chunk in chunks:
        if grid.is_last_stage and chunk is chunks[-1]:
            last = causal.get_submodule(stack.after[-1]) if stack.after else layers[chunk[-1]]
            last.register_forward_hook(partial(_gather_output, grid.tensor_group))
        else:
            following = stand_ins.get(f"{stack.layers}.{chunk[-1] + 1}", layers[chunk[-1] + 1])
            following.register_forward_pre_hook(partial(_whole_shape, grid.tensor), with_kwargs=True)
    outside = [f"{stack.layers}.{index}." for index in own] + [f"{name}." for name in stack.after]
    inside = [f"{name}." for name in split.blocks]
    for name, parameter in causal.named_parameters():
        of_block = any(name.startswith(prefix) for prefix in inside)
        row_bias = split.styles.get(name.removesuffix(".bias")) in _ROWS
        if any(name.startswith(prefix) for prefix in outside) and (row_bias or not of_block):
            sum_gradient(parameter, grid.tensor_group)


def _scatter_input(group: dist.ProcessGroup, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return _with_hidden(args, kwargs, scatter_sequence(_hidden(args, kwargs), group))


def _whole_shape(size: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Past this stage's layers nothing counts but the shape, which some families state anew: a whole sequence's."""
    seqs, length, width = _hidden(args, kwargs).shape
    return _with_hidden(args, kwargs, _hidden(args, kwargs).new_zeros(()).expand(seqs, length * size, width))


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(args: tuple, kwargs: dict[str, Any], hidden: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _gather_output(group: dist.ProcessGroup, module: nn.Module, args: tuple, output: Any) -> Any:
    """What follows, the head and the loss, is the same on every rank of the group."""
    if isinstance(output, tuple):
        return gather_sequence(output[0], group), *output[1:]
    return gather_sequence(output, group)


def _gather_input(block: nn.Module, group: dist.ProcessGroup, *, keep_part: bool) -> None:
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        part = _hidden(args, kwargs)
        whole = gather_sequence(part, group, partial=True)
        args, kwargs = _with_hidden(args, kwargs, whole)
        if not (keep_part and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(*_keep_part(whole, part.detach(), group)):
            return forward(*args, **kwargs)

    block.forward = run


def _keep_part(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> tuple[Callable, Callable]:
    """(pack, unpack) for autograd: where `whole` is to be saved, its shape is; it is gathered again once, at the first use."""
    address, numel = whole.untyped_storage().data_ptr(), whole.numel()  # not `whole` itself: it is to be freed
    gathered: list[torch.Tensor] = []
    uses = 0

    def pack(saved: torch.Tensor) -> torch.Tensor | torch.Size:
        nonlocal uses
        if saved.untyped_storage().data_ptr() != address or saved.numel() != numel or not saved.is_contiguous():
            return saved
        uses += 1
        return saved.shape

    def unpack(saved: torch.Tensor | torch.Size) -> torch.Tensor:
        nonlocal uses
        if isinstance(saved, torch.Tensor):
            return saved
        if not gathered:
            gathered.append(all_gather_sequence(part, group))
        uses -= 1
        return (gathered[0] if uses > 0 else gathered.pop()).view(saved)

    return pack, unpack
