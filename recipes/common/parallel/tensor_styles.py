"""Defines the tensor-parallel styles: how each shards, how it communicates, and what it does under sequence parallelism.

STYLES is the one table: a new style is an entry there, and the functions it names. `tensor_plans` says which module of a family
has which style. A module keeps its class and its parameter names; its parameters become this rank's shards, and its forward
communicates with the other tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from recipes.common.model.decoder import PlanError
from recipes.common.model.linears import linear
from recipes.common.model.look_ups import look_up
from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.collectives import copy_to, gather_from, reduce_from, scatter_sequence, split_to, sum_gradient
from recipes.common.parallel.experts import BANK, CALLED, connect_whole_experts
from recipes.common.parallel.grid import Grid

# A style's place in a block (attention, MLP). Under sequence parallelism a block gathers its input and its rows scatter the sum.
COLUMN = "column"  # reads the whole input on every rank, so the input's gradient is a partial sum on each
ROW = "row"  # gives a partial sum on every rank; its parent is a block
INSIDE = "inside"  # works inside a block, as without sequence parallelism


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The facts about a run that a style's `connect` may need."""

    grid: Grid
    config: PreTrainedConfig
    sequence_parallel: bool


def _keep_whole(module: nn.Module, label: str) -> dict[str, ShardSpec]:
    return {}


@dataclass(frozen=True, kw_only=True)
class TensorStyle:
    """Describes what the tensor ranks do with a module of one style, or with a parameter that a plan names by itself."""

    # How it shards: (module, its name and style for messages) -> a ShardSpec for each sharded parameter of its own, and
    # (parameter, label) -> its ShardSpec. None: the style is not defined for modules, or not for parameters
    shard_module: Callable[[nn.Module, str], dict[str, ShardSpec]] | None = _keep_whole
    shard_parameter: Callable[[nn.Parameter, str], ShardSpec] | None = None
    may_pad: bool = False  # the tensor size need not divide what is sharded
    # How it communicates: changes the forward of a module that holds its shards, or hooks its gradients. None: not by itself
    connect: Callable[[nn.Module, Setting], None] | None = None
    # COLUMN, ROW or INSIDE. None: not supported under sequence parallelism
    in_block: str | None = None

    @property
    def is_sharded(self) -> bool:
        """Return whether it shards any parameter; else it only communicates."""
        return self.shard_module is not _keep_whole

    @property
    def output_stays_sharded(self) -> bool:
        """Return whether what follows reads this rank's outputs alone, so that heads must not be split between ranks."""
        return self.in_block == COLUMN and self.connect is None


def _shard_linear(module: nn.Module, label: str, *, inputs: bool = False, packs: int = 1) -> dict[str, ShardSpec]:
    """Shard a linear by its outputs, the bias with them, or by its `inputs`, the bias whole."""
    if not isinstance(module, nn.Linear | Conv1D):
        raise PlanError(f"{label} is a {type(module).__name__}, not a linear layer")
    out_dim, in_dim = (1, 0) if isinstance(module, Conv1D) else (0, 1)
    if inputs:
        return {"weight": ShardSpec(in_dim)}
    bias = {} if module.bias is None else {"bias": ShardSpec(0, packs)}
    return {"weight": ShardSpec(out_dim, packs)} | bias


def _shard_weight(module: nn.Module, label: str, *, dim: int) -> dict[str, ShardSpec]:
    return {"weight": ShardSpec(dim)}


def _shard_bank(parameter: nn.Parameter, label: str, *, dim: int, packs: int = 1) -> ShardSpec:
    """Shard a bank of matrices [experts, out, in] along `dim`, -2 or -1."""
    if parameter.ndim < 2:
        raise PlanError(f"{label} has shape {tuple(parameter.shape)}, not that of a bank of matrices")
    return ShardSpec(parameter.ndim + dim, packs)


def _shard_outputs(parameter: nn.Parameter, label: str) -> ShardSpec:
    """Shard a bank of matrices by its outputs, or a vector that has one value a head."""
    return ShardSpec(0) if parameter.ndim == 1 else _shard_bank(parameter, label, dim=-2)


def _shard_stack(module: nn.Module, label: str) -> dict[str, ShardSpec]:
    """Shard matrices of all experts that lie one below the other, [experts * width, hidden], by the width of each expert."""
    count = getattr(module, "moe_num_experts", 0)
    if not count:
        raise PlanError(f"{label} is a {type(module).__name__}, which does not say how many experts (moe_num_experts) it stacks")
    return {name: ShardSpec(0, count) for name, _ in module.named_parameters(recurse=False)}


def _gather_columns(module: nn.Module, setting: Setting) -> None:
    forward, group = module.forward, setting.grid.tensor_group
    module.forward = lambda ids: gather_from(forward(ids), group)


def _gather_output(module: nn.Module, setting: Setting) -> None:
    forward, width, group = module.forward, module.out_features, setting.grid.tensor_group
    module.forward = lambda x: gather_from(forward(x), group)[..., :width]  # beyond the whole width lies padding


def _sum_output(module: nn.Module, setting: Setting, *, split_input: bool = False) -> None:
    """Sum over the ranks; under sequence parallelism each rank takes its part of the sequence of the sum."""
    group = setting.grid.tensor_group
    sum_over_ranks = partial(scatter_sequence, partial=True) if setting.sequence_parallel else partial(reduce_from, own=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = sum_over_ranks(linear(module, split_to(x, group) if split_input else x, with_bias=False), group)
        return y if module.bias is None else y + module.bias  # once, not once a rank

    module.forward = run


def _connect_bank(module: nn.Module, setting: Setting, *, split_input: bool) -> None:
    """Let a module that calls a bank as forward(rows, rows of each expert) gather its outputs, or split its inputs and sum."""
    forward, group = module.forward, setting.grid.tensor_group

    def run(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if split_input:
            return reduce_from(forward(split_to(x, group), *args), group)
        return gather_from(forward(copy_to(x, group), *args), group)

    module.forward = run


class _ShardedLookUp(TorchFunctionMode):
    """Looks up this rank's rows of a table, zero elsewhere, and sums over the tensor ranks, where a look-up is called."""

    def __init__(self, first: int, rows: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._first, self._rows, self._group = first, rows, group

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not nn.functional.embedding:
            return func(*args, **(kwargs or {}))
        ids = args[0]
        absent = (ids < self._first) | (ids >= self._first + self._rows)
        # for an absent id any row, not the same for all: their gradients, zeros, are added up row by row
        found = look_up((ids - self._first) % self._rows, *args[1:], **(kwargs or {}))
        return reduce_from(found.masked_fill(absent.unsqueeze(-1), 0.0), self._group)


def shard_embedding(module: nn.Embedding, grid: Grid) -> None:
    """Let the look-up be of all tensor ranks' rows. What a subclass does with what is found (scales, norms) is kept."""
    rows, look_up = module.weight.shape[0], module.forward
    first = grid.tensor_rank * rows
    if module.padding_idx is not None:
        local = module.padding_idx - first
        module.padding_idx = local if 0 <= local < rows else None

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with _ShardedLookUp(first, rows, grid.tensor_group):
            return look_up(ids)

    module.forward = forward


def _connect_embedding(module: nn.Module, setting: Setting) -> None:
    shard_embedding(module, setting.grid)


def _connect_experts(module: nn.Module, setting: Setting) -> None:
    forward, group = module.forward, setting.grid.tensor_group

    def copied(x: torch.Tensor) -> torch.Tensor:
        # routing weights are floats that multiply every rank's shard of the experts; expert indices are integers
        return copy_to(x, group) if x.is_floating_point() else x

    def run(*args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return reduce_from(forward(*map(copied, args), **{name: copied(x) for name, x in named.items()}), group)

    module.forward = run


def _connect_biased_experts(module: nn.Module, setting: Setting, *, bias: str) -> None:
    """Connect experts that add a whole bias to their outputs: each rank adds its share of it, so that the sum has it once."""
    forward, size = module.forward, setting.grid.tensor
    sum_gradient(module.get_parameter(bias), setting.grid.tensor_group)

    def run(*args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        vars(module)[bias] = module.get_parameter(bias) / size  # is found before the parameter
        try:
            return forward(*args, **named)
        finally:
            del vars(module)[bias]

    module.forward = run
    _connect_experts(module, setting)


def _shard_experts(parameter: nn.Parameter, label: str) -> ShardSpec:
    return ShardSpec(0)


def _connect_whole_experts(module: nn.Module, setting: Setting) -> None:
    connect_whole_experts(module, setting.grid)


def _connect_identity_expert(module: nn.Module, setting: Setting) -> None:
    """Let each rank add its share of an expert that computes nothing, so that the sum over the ranks has it once."""
    size = setting.grid.tensor
    module.forward = lambda x: x / size


def _connect_alibi(module: nn.Module, setting: Setting) -> None:
    """Give an attention the biases of its own heads, of those of all heads: `alibi` [sequences * heads, 1, seq_len]."""
    forward, grid = module.forward, setting.grid

    def run(*args: Any, alibi: torch.Tensor, **kwargs: Any) -> Any:
        by_head = alibi.unflatten(0, (-1, module.num_heads * grid.tensor))
        own = by_head.narrow(1, grid.tensor_rank * module.num_heads, module.num_heads)
        return forward(*args, alibi=own.flatten(0, 1), **kwargs)

    module.forward = run


def _connect_latent_key(module: nn.Module, setting: Setting) -> None:
    """Sum the gradient of DeepSeek's rotary key, the end of the latent: each rank's heads use it past the sharded projections."""
    forward, rope, group = module.forward, setting.config.qk_rope_head_dim, setting.grid.tensor_group

    def run(x: torch.Tensor) -> torch.Tensor:
        y = forward(x)
        return torch.cat([y[..., :-rope], copy_to(y[..., -rope:], group)], dim=-1)

    module.forward = run


def _sum_gradients(module: nn.Module, setting: Setting) -> None:
    for parameter in module.parameters(recurse=False):
        sum_gradient(parameter, setting.grid.tensor_group)


_GATHERED_COLUMN = TensorStyle(shard_module=_shard_linear, may_pad=True, connect=_gather_output, in_block=COLUMN)
_SPLITTING_ROW = TensorStyle(
    shard_module=partial(_shard_linear, inputs=True), connect=partial(_sum_output, split_input=True), in_block=ROW
)

# transformers' names (its `distributed/tensor_parallel.py`), and ours: packed3_colwise, bank_gather_output, bank_split_input,
# stacked_experts, biased_experts, alibi_by_head
STYLES: dict[str, TensorStyle] = {
    "colwise": TensorStyle(shard_module=_shard_linear, shard_parameter=_shard_outputs, in_block=COLUMN),
    "packed_colwise": TensorStyle(
        shard_module=partial(_shard_linear, packs=2), shard_parameter=partial(_shard_bank, dim=-2, packs=2), in_block=COLUMN
    ),
    "packed3_colwise": TensorStyle(shard_module=partial(_shard_linear, packs=3), in_block=COLUMN),
    "colwise_gather_output": _GATHERED_COLUMN,
    "colwise_rep": _GATHERED_COLUMN,
    "rowwise": TensorStyle(
        shard_module=partial(_shard_linear, inputs=True),
        shard_parameter=partial(_shard_bank, dim=-1),
        connect=_sum_output,
        in_block=ROW,
    ),
    "packed_rowwise": TensorStyle(shard_module=None, shard_parameter=partial(_shard_bank, dim=-1, packs=2)),
    "rowwise_split_input": _SPLITTING_ROW,
    "rowwise_rep": _SPLITTING_ROW,
    "bank_gather_output": TensorStyle(
        shard_module=partial(_shard_weight, dim=1), connect=partial(_connect_bank, split_input=False)
    ),
    "bank_split_input": TensorStyle(shard_module=partial(_shard_weight, dim=2), connect=partial(_connect_bank, split_input=True)),
    "stacked_experts": TensorStyle(shard_module=_shard_stack),
    "embedding_rowwise": TensorStyle(shard_module=partial(_shard_weight, dim=0), may_pad=True, connect=_connect_embedding),
    "embedding_colwise": TensorStyle(shard_module=partial(_shard_weight, dim=1), connect=_gather_columns),
    "moe_tp_experts": TensorStyle(connect=_connect_experts),
    "moe_identity_expert": TensorStyle(connect=_connect_identity_expert),
    "all_reduce": TensorStyle(connect=_connect_experts),  # shared experts, whose banks a plan names by themselves
    "biased_experts": TensorStyle(connect=partial(_connect_biased_experts, bias="down_proj_bias")),
    BANK: TensorStyle(shard_module=None, shard_parameter=_shard_experts),
    CALLED: TensorStyle(connect=_connect_whole_experts),
    "alibi_by_head": TensorStyle(connect=_connect_alibi),
    "mla_kv_a_proj": TensorStyle(connect=_connect_latent_key),
    "replicated_with_grad_allreduce": TensorStyle(connect=_sum_gradients, in_block=INSIDE),
    "replicate": TensorStyle(in_block=INSIDE),
    "local_params": TensorStyle(),  # parameters named beside it are sharded; nothing is exchanged
}
