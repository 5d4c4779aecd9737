"""Adds Megatron's sequence parallelism (arXiv 2205.05198, section 4.2.2) to unmodified Hugging Face layers.

Between the blocks that tensor parallelism shards (attention, MLP) each tensor rank holds and computes its part of the sequence
alone: norms, residual sums, dropout, and what is sent to the next stage. A block's input is gathered and its output
reduce-scattered, which together move as much as the all-reduce they replace. Inside a block nothing changes: the base model makes
rotary embeddings and masks for whole sequences. Parameters used outside the blocks see part of the tokens, so their gradients
are summed over the tensor ranks.

Of a block's input, its linears keep this rank's part for the backward pass, where it is gathered a second time, beside the
products that give its gradient; so they do of the factors of deferred weight gradients.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.linears import Linear, is_plain, keep_factors
from recipes.common.model.sharding import TensorPlan
from recipes.common.model.shared_inputs import SharedInput
from recipes.common.parallel.collectives import gather_sequence, scatter_sequence, sum_gradient
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.kept_rows import KeptInput, RowKeeper
from recipes.common.parallel.summed_inputs import gather_shared
from recipes.common.parallel.tensor_styles import COLUMN, ROW, STYLES


def find_blocks(styles: dict[str, str], family: str) -> frozenset[str]:
    """Return the names of the modules whose input is gathered: those that hold a row-parallel linear.

    styles: the tensor-parallel plan. Raises PlanError for a family that shards more than pairs of column and row.
    """
    unknown = sorted({style for style in styles.values() if STYLES[style].in_block is None})
    if unknown:
        raise PlanError(f"model_type={family}: its tensor-parallel plan has {unknown}, which sequence_parallel does not support")
    blocks = frozenset(name.rpartition(".")[0] for name, style in styles.items() if STYLES[style].in_block == ROW)
    if not blocks:
        raise PlanError(f"model_type={family}: no block of its layers is sharded, which sequence_parallel needs")
    nested = sorted(name for name in blocks if any(other.startswith(f"{name}.") for other in blocks))
    if nested:
        raise PlanError(f"model_type={family}: {nested[0]} holds a block and its norm, which sequence_parallel must part")
    outside = sorted(n for n, s in styles.items() if STYLES[s].in_block == COLUMN and n.rpartition(".")[0] not in blocks)
    if outside:
        raise PlanError(f"model_type={family}: {outside[0]} has no row-parallel linear beside it, which sequence_parallel needs")
    return blocks


def shard_sequence(
    causal: nn.Module,
    stack: Stack,
    plan: TensorPlan,
    chunks: tuple[range, ...],
    placeholders: dict[str, nn.Module],
    grid: Grid,
    recomputed: range,
) -> None:
    """Let this stage's layers, and the final norm, run on this rank's part of the sequence.

    chunks, placeholders: as in Stage. Call it after `apply_tensor_parallel` and before `recompute` wraps the layers.
    """
    layers = causal.get_submodule(stack.layers)
    own = [index for chunk in chunks for index in chunk]
    keep_inputs, keep_gradients = RowKeeper(grid.tensor_group), RowKeeper(grid.tensor_group)
    for index in own:
        blocks, columns = {}, defaultdict(list)
        for name, module in layers[index].named_modules(prefix=f"{stack.layers}.{index}"):
            place = STYLES[plan.styles[name]].in_block if name in plan.styles and isinstance(module, Linear) else None
            if name in plan.blocks:
                blocks[name] = module
            if place == COLUMN:
                keep_factors(module, inputs=keep_inputs)
                columns[name.rpartition(".")[0]] += [module] if is_plain(module) else []
            elif place == ROW:
                keep_factors(module, gradients=keep_gradients)
        for name, module in blocks.items():
            _gather_input(module, columns[name], grid.tensor_group, keep_part=index not in recomputed)
    if grid.is_first_stage:
        layers[own[0]].register_forward_pre_hook(partial(_scatter_input, grid.tensor_group), with_kwargs=True)
    for chunk in chunks:
        if grid.is_last_stage and chunk is chunks[-1]:
            last = causal.get_submodule(stack.after[-1]) if stack.after else layers[chunk[-1]]
            last.register_forward_hook(partial(_gather_output, grid.tensor_group))
        else:
            following = placeholders.get(f"{stack.layers}.{chunk[-1] + 1}", layers[chunk[-1] + 1])
            following.register_forward_pre_hook(partial(_whole_shape, grid.tensor), with_kwargs=True)
    outside = [f"{stack.layers}.{index}." for index in own] + [f"{name}." for name in stack.after]
    inside = [f"{name}." for name in plan.blocks]
    for name, parameter in causal.named_parameters():
        in_block = any(name.startswith(prefix) for prefix in inside)
        owner = name.removesuffix(".bias")
        row_bias = owner in plan.styles and STYLES[plan.styles[owner]].in_block == ROW
        if any(name.startswith(prefix) for prefix in outside) and (row_bias or not in_block):
            sum_gradient(parameter, grid.tensor_group)


def _scatter_input(group: dist.ProcessGroup, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return _with_hidden(args, kwargs, scatter_sequence(_hidden(args, kwargs), group))


def _whole_shape(size: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Give what follows this chunk hidden states of a whole sequence's shape: some families read the shape, nobody the values."""
    seqs, length, width = _hidden(args, kwargs).shape
    return _with_hidden(args, kwargs, _hidden(args, kwargs).new_zeros(()).expand(seqs, length * size, width))


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(args: tuple, kwargs: dict[str, Any], hidden: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _gather_output(group: dist.ProcessGroup, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Gather for the head and the loss, which are the same on every rank of the group."""
    return gather_sequence(output, group)


def _gather_input(block: nn.Module, columns: list[nn.Module], group: dist.ProcessGroup, *, keep_part: bool) -> None:
    """Let `block` gather its input. keep_part: save this rank's part of it for the backward pass, not the whole.

    columns: of its column-parallel linears, those that are plain.
    """
    forward, shared = block.forward, SharedInput(columns)

    def run(*args: Any, **kwargs: Any) -> Any:
        part = _hidden(args, kwargs)
        if not (torch.is_grad_enabled() and part.requires_grad):
            args, kwargs = _with_hidden(args, kwargs, gather_sequence(part, group, partial=True))
            return forward(*args, **kwargs)
        kept = KeptInput(part.detach(), group) if keep_part else None
        whole = gather_shared(part, group, shared, kept)
        args, kwargs = _with_hidden(args, kwargs, whole)
        hooks = contextlib.nullcontext() if kept is None else torch.autograd.graph.saved_tensors_hooks(*_keep_part(whole, kept))
        try:
            with hooks:
                return forward(*args, **kwargs)
        finally:
            shared.forget()

    block.forward = run


def _keep_part(whole: torch.Tensor, kept: KeptInput) -> tuple[Callable, Callable]:
    """Return autograd's (pack, unpack): they save the shape of `whole` in place of `whole`, which `kept` gathers again.

    Invariant: while the block's forward pass runs, `whole` is alive in its caller, so no other tensor has its storage; a
    contiguous tensor of as many elements at that address is `whole` itself or a view of it with the same elements in the same
    order (a projection saves [tokens, width]). The address is kept, not the tensor, so that it can be freed after the forward
    pass; by then autograd packs nothing more. `whole` is dropped once its own gradient has been summed.
    """
    address, numel = whole.untyped_storage().data_ptr(), whole.numel()

    def pack(saved: torch.Tensor) -> torch.Tensor | torch.Size:
        same = saved.untyped_storage().data_ptr() == address and saved.numel() == numel and saved.is_contiguous()
        return saved.shape if same else saved

    def unpack(saved: torch.Tensor | torch.Size) -> torch.Tensor:
        return saved if isinstance(saved, torch.Tensor) else kept.whole().view(saved)

    return pack, unpack
