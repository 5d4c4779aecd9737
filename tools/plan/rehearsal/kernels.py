"""Says of an operator what a GPU does for it: FLOPs, bytes moved, and which part of a step it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils.flop_counter import flop_registry

from tools.plan.rehearsal.known_values import values
from tools.plan.rehearsal.source_lines import LAYER, Origin
from tools.plan.rehearsal.source_lines import LOSS as LOSS_PLACE

PRODUCTS, ATTENTION, LAYERS, LOSS, OUTSIDE = "products", "attention", "layers", "loss", "outside layers"
GRADIENT_SUMS, OPTIMIZER, MONITOR = "gradient sums", "optimizer", "monitor"
PARTS = {
    PRODUCTS: "matrix products",
    ATTENTION: "attention",
    LAYERS: "elementwise work and copies in the layers",
    OUTSIDE: "embedding, final norm, positions and masks, copies between stages",
    LOSS: "the loss, without its products",
    GRADIENT_SUMS: "adding up gradients over micro batches",
    OPTIMIZER: "norm, clipping, the optimizer, copies for the reduction",
    MONITOR: "the monitor's statistics",
}

# operators that start no kernel and are no views
_FREE = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_", "alias", "_unsafe_view",
    "set_", "lift_fresh", "lift_fresh_copy", "_reshape_alias", "record_stream", "resize_", "is_pinned", "_pin_memory",
    "sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "device", "layout", "_local_scalar_dense", "is_same_size",
    "_has_compatible_shallow_copy_type",
})  # fmt: skip
_ATTENTION = "transformers/integrations/sdpa_attention.py"
_SUMS, _GRADIENT_PATH = "recipes/common/model/main_grads.py", "recipes/common/engine/gradient_path.py"
_VARLEN = frozenset({"_varlen_attn", "_varlen_attn_backward"})
_WRITES_ONLY = frozenset({"zero_", "fill_", "_foreach_zero_", "normal_", "uniform_"})
_PICKS = frozenset({"gather", "index", "index_select", "embedding", "scatter_add_", "scatter_"})
_PUTS = frozenset({"index_put_", "_index_put_impl_"})


def starts_kernel(func: Any, name: str) -> bool:
    return name not in _FREE and not func.is_view


def flops(func: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    if func._overloadpacket is torch.ops.aten._grouped_mm:  # of which torch's table has nothing
        return _grouped_flops(*args[:2])
    if func._overloadpacket is torch.ops.aten._scaled_mm_v2:  # nor of this
        return 2.0 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        return 0.0
    shaped = [each for each in args if not isinstance(each, torch.dtype)]  # torch's formula takes an output's dtype for its shape
    if name in _VARLEN:  # it reads where segments begin
        shaped = [values(each) if _holds_starts(each) else each for each in shaped]
        with no_dispatch():
            return float(count(*shaped, **kwargs, out_val=out))
    return float(count(*shaped, **kwargs, out_val=out))


def _holds_starts(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype == torch.int32


def _grouped_flops(left: torch.Tensor, right: torch.Tensor) -> float:
    """Count products of groups of rows, of columns, or of what is summed over: every row and column is in one group."""
    groups = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return 2.0 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


def moved_bytes(func: Any, name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    """Return the bytes that a kernel reads and writes, each tensor once for each. What it is given as `out` it writes only."""
    written = {id(tensor) for tensor in outputs}
    given_out = sum(argument.is_out for argument in func._schema.arguments)
    read = {id(tensor): _size(tensor) for tensor in inputs[: len(inputs) - given_out]}
    if name in _PUTS:  # rows are read, and what they are added to is read and written
        return 3 * sorted(map(_size, inputs))[-2]
    if name in _PICKS:  # of the large tensor only what is picked
        return 3 * (min(map(_size, [*inputs, *outputs])) if name != "embedding" else _size(outputs[0]))
    if name == "copy_":
        return _size(inputs[0]) + _size(inputs[1])
    if name in _WRITES_ONLY:
        return sum(map(_size, inputs))
    known = {id(tensor): _size(tensor) for tensor in inputs}
    mutated = sum(size for key, size in known.items() if key in written) if func._schema.is_mutable else 0
    new = sum(_size(tensor) for tensor in outputs if not any(tensor is each for each in inputs))
    if func._schema.is_mutable and not outputs:  # _foreach_*_ and fused optimizers return nothing
        mutated = sum(map(_size, inputs)) // 2
    return sum(read.values()) + mutated + new


def _size(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # an expanded tensor is read once


def part_of(name: str, count: float, origin: Origin) -> str:
    """Return the part of a step, a key of PARTS, that an operator with `count` FLOPs belongs to."""
    line = origin.line
    if "attention" in name or name in _VARLEN:
        return ATTENTION
    if line.startswith(_ATTENTION):  # where no fused kernel will do, it is products and a softmax
        return ATTENTION
    if count:
        return PRODUCTS
    if line.startswith(_SUMS) and name not in _WRITES_ONLY:
        return GRADIENT_SUMS
    if origin.place == LOSS_PLACE:
        return LOSS
    if line.startswith("recipes/common/monitor/"):
        return MONITOR
    if line.startswith(("deepspeed/runtime/", _GRADIENT_PATH)) and not line.startswith("deepspeed/runtime/pipe/"):
        return GRADIENT_SUMS if origin.backward else OPTIMIZER
    if line.startswith(("recipes/common/engine/gradient_norm.py", "recipes/common/engine/optimizers.py")):
        return OPTIMIZER
    return LAYERS if origin.place == LAYER else OUTSIDE
