"""Draws a rank's shards of large parameters, where a family's `_init_weights` says of each how the whole is to be drawn.

The calls that `_init_weights` makes on the meta device are recorded, and made again on the shards. Random numbers come in tiles
of the whole parameter, each from a generator of its own, seeded by the recipe's seed, the parameter's name and the tile's number:
a tile is the same in every layout, and a rank draws those alone that what it holds touches.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes.common.model.sharding import HeldTensor

_TILE = 256  # rows and columns
# torch's generator for CPUs, MT19937, takes 32 bits of a seed, and some tiles of a large model would be equal. Of its state
# it takes all words, eight bytes for each, after the first bytes of `get_state`
_WORDS, _FIRST_WORD = 624, 24
_RANDOM = ("normal_", "uniform_")
_CONSTANT = ("zero_", "fill_")
Spans = tuple[tuple[int, int], ...]  # first and end along each dimension of a whole parameter


@dataclass(frozen=True)
class Call:
    """One in-place operator of torch on a whole parameter."""

    name: str
    numbers: tuple[float, ...]


class _Recorder(TorchDispatchMode):
    """Records by name what is done to `parameters`, and whether `draw_shard` can do it too."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {name: [] for name in parameters}
        self.replayable = True
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._names = {parameter.untyped_storage()._cdata: name for name, parameter in parameters.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        leaves = [each for each in tree_leaves((args, kwargs)) if each is not None]
        tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
        touched = [self._names.get(each.untyped_storage()._cdata) for each in tensors]
        if any(touched) and not func.is_view and func._overloadpacket is not torch.ops.aten.detach:
            name, numbers = func._overloadpacket.__name__, tuple(each for each in leaves if isinstance(each, int | float))
            if name in (*_RANDOM, *_CONSTANT) and len(numbers) + 1 == len(leaves) and self._is_whole(tensors[0], touched[0]):
                self.calls[touched[0]].append(Call(name, numbers))
            else:
                self.replayable = False
        return func(*args, **(kwargs or {}))

    def _is_whole(self, tensor: torch.Tensor, name: str) -> bool:
        return tensor.shape == self._shapes[name] and tensor.is_contiguous() and tensor.dtype == torch.float32


def recorded_calls(causal: Any, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, list[Call]] | None:
    """Return by parameter what `_init_weights` of `causal` does to these modules' parameters, which are on the meta device.

    None where that is more than `draw_shard` can do: a parameter left alone, or read, or drawn in parts.
    """
    modules = list(modules)
    parameters = {f"{name}.{leaf}": p for name, module in modules for leaf, p in module.named_parameters(recurse=False)}
    with _Recorder(parameters) as recorder:
        for _, module in modules:
            causal._init_weights(module)
    complete = all(calls and parameters[name].ndim for name, calls in recorder.calls.items())
    return recorder.calls if recorder.replayable and complete else None


def draw_shard(seed: int, name: str, calls: Iterable[Call], whole: tuple[int, ...], held: HeldTensor) -> torch.Tensor:
    """Return what a rank holds, in fp32, of the parameter `name` of shape `whole`, zero where padded."""
    local = torch.zeros(held.shape(whole))
    for number, call in enumerate(calls):
        for here, spans in held.boxes(whole):
            if call.name in _RANDOM:
                _fill(local[here], f"{seed}:{name}:{number}", whole, spans, call)
            else:
                getattr(local[here], call.name)(*call.numbers)
    return local


def _fill(part: torch.Tensor, key: str, whole: tuple[int, ...], spans: Spans, call: Call) -> None:
    """Fill a part of the whole tensor with its random numbers."""
    generator = torch.Generator()
    state, scratch = generator.manual_seed(0).get_state(), torch.empty(_TILE * _TILE)
    for number, box, inside, outside in tiles(whole, spans):
        words = np.frombuffer(hashlib.shake_128(f"{key}:{number}".encode()).digest(4 * _WORDS), dtype="<u4")
        state[_FIRST_WORD : _FIRST_WORD + 8 * _WORDS] = torch.from_numpy(words.astype("<u8").view(np.uint8))
        generator.set_state(state)
        drawn = scratch[: math.prod(box)]
        getattr(drawn, call.name)(*call.numbers, generator=generator)
        part[outside] = drawn.view(box)[inside]


def tiles(whole: tuple[int, ...], spans: Spans) -> Iterator[tuple[int, tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """Yield of every tile that touches a part of the whole: (number, shape, slices of the tile that are wanted, where they are
    in the part)."""
    last = len(whole) - 1
    lengths = [_TILE * _TILE] if not last else [_TILE if axis >= last - 1 else 1 for axis in range(last + 1)]
    counts = [-(-size // length) for size, length in zip(whole, lengths, strict=True)]
    touched = [range(a // length, -(-b // length)) for (a, b), length in zip(spans, lengths, strict=True)]
    for places in itertools.product(*touched):
        number, box, inside, outside = 0, [], [], []
        for at, length, tiles_along, size, (a, b) in zip(places, lengths, counts, whole, spans, strict=True):
            number = number * tiles_along + at
            first, end = at * length, min((at + 1) * length, size)
            box.append(end - first)
            inside.append(slice(max(a, first) - first, min(b, end) - first))
            outside.append(slice(max(a, first) - a, min(b, end) - a))
        yield number, tuple(box), tuple(inside), tuple(outside)


def drawn_elements(whole: tuple[int, ...], held: HeldTensor) -> int:
    """Return how many random numbers `draw_shard` draws for a rank: its own, and the rest of the tiles at its edges."""
    return sum(math.prod(box) for _, spans in held.boxes(whole) for _, box, _, _ in tiles(whole, spans))
