"""Keeps the values of small tensors while large ones have none: what decides the program's course is computed for real.

Norms, votes, shapes, positions, step counters: each small FakeTensor has a real twin on the CPU, and what is done to it is done
to the twin. Where a small tensor comes from a large one its values are those of a healthy run: 1, true for `all`, false for
`any`. So `item()`, a NaN check, a comparison with a ceiling, an agreement of ranks all go as on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

LARGEST = 1 << 17  # elements: the positions of a sequence of 131,072 tokens
_TWIN = "_rehearsed_values"
_WITHOUT_VALUES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_TRUE_WITHOUT = frozenset({"all", "isfinite"})


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Return the tensors among an operator's arguments or results, in order."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= LARGEST


def known(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor's values, on the CPU; None where nobody knows them."""
    return getattr(tensor, _TWIN, None) if isinstance(tensor, FakeTensor) else tensor if small(tensor) else None


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a small tensor's values, those of a healthy run where nobody knows them."""
    found = known(tensor)
    if found is None or found.dtype != tensor.dtype or found.shape != tensor.shape:  # .data was exchanged
        found = healthy(tensor)
        set_values(tensor, found)
    return found


def scalar(tensor: torch.Tensor) -> bool | int | float:
    with no_dispatch():
        return values(tensor).item()


def healthy(tensor: torch.Tensor, op: str = "") -> torch.Tensor:
    with no_dispatch():
        fill = op in _TRUE_WITHOUT if tensor.dtype == torch.bool else 1
        return torch.full(tensor.shape, fill, dtype=tensor.dtype)


def set_values(tensor: torch.Tensor, found: torch.Tensor) -> None:
    assert not isinstance(found, FakeTensor), "a twin must have values"
    setattr(tensor, _TWIN, found)


def follow(
    func: Any, name: str, args: tuple, kwargs: dict[str, Any], inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> None:
    """Do to the twins what `func` has done to the tensors."""
    if not any(isinstance(each, FakeTensor) and small(each) for each in outputs):
        return
    if name not in _WITHOUT_VALUES and all(map(small, inputs)):
        found = compute(func, args, kwargs)
        if found is not None:
            for tensor, twin in zip(outputs, tensors_in(found), strict=True):
                if isinstance(tensor, FakeTensor) and small(tensor):
                    set_values(tensor, twin)
            return
    for tensor in outputs:
        if isinstance(tensor, FakeTensor) and small(tensor) and known(tensor) is None:
            set_values(tensor, healthy(tensor, name))


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the values of its small inputs; None where CPUs have no such operator."""
    real_args, real_kwargs = tree_map(_to_cpu, (args, kwargs))
    with no_dispatch():
        try:
            return func(*real_args, **{name: value for name, value in real_kwargs.items() if name != "pin_memory"})
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            return None


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return values(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value
