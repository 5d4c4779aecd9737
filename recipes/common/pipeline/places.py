"""Finds and exchanges single tensors among the arguments of a layer, which may be in dicts, tuples and tuples in dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Key = str | int
HIDDEN_STATES = "hidden_states"


class Place(NamedTuple):
    """One tensor among a layer's arguments."""

    layer: int
    path: tuple[Key, ...]  # of what holds all: a number for one by position, a name for one by keyword; then keys and indices


Member = tuple[Place, ...]  # one tensor, and all places that get it


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """What crosses the cuts, and what of the model is outside its layers."""

    # by the chunk that they enter, the first one's empty: hidden states, ids (which no layer need be given), and what else there
    # is. Empty: hidden states alone, everywhere
    messages: tuple[tuple[Member, ...], ...] = ()
    outputs: int = 0  # of a layer that returns a tuple, hidden states first
    # parameters outside the layers that a `Stack` does not name: those that the first stage computes with, and the last
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()


HIDDEN_ALONE = Crossings()


def hidden_path(args: tuple, kwargs: dict[str, Any]) -> tuple[Key, ...]:
    """Return where a layer is given the hidden states."""
    return (0,) if args else (HIDDEN_STATES,)


def leaves(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Yield (path, value) of everything that is no dict, tuple or list."""
    yield from _leaves(dict(enumerate(args)) | kwargs, ())


def _leaves(value: Any, path: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], (*path, key))
    elif isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from _leaves(each, (*path, index))
    else:
        yield path, value


def leaf(args: tuple, kwargs: dict[str, Any], path: tuple[Key, ...]) -> Any:
    """Return what stands at `path`; None where nothing does."""
    value: Any = dict(enumerate(args)) | kwargs
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def put(
    args: tuple, kwargs: dict[str, Any], path: tuple[Key, ...], value: torch.Tensor, *, overwrite: bool = True
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments with `value` at `path`.

    overwrite: where it can, it overwrites the tensor that is there, and it changes dicts in place: what the base model keeps and
    gives to later layers, or makes something else of, is right from then on.
    """
    others = {_memory(each) for at, each in leaves(args, kwargs) if at != path} if overwrite else set()
    old = leaf(args, kwargs, path)
    if overwrite and _memory(old) not in others and _can_overwrite(old, value):
        old.copy_(value)
        return args, kwargs
    together = _put(dict(enumerate(args)) | kwargs, path, value)
    return tuple(together[index] for index in range(len(args))), {name: each for name, each in together.items() if name in kwargs}


def _put(holder: Any, path: tuple[Key, ...], value: torch.Tensor) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(holder, MutableMapping):
        holder[key] = _put(holder.get(key), rest, value)
        return holder
    assert isinstance(key, int), (key, type(holder))
    items = list(holder or ())
    items += [None] * (key + 1 - len(items))
    items[key] = _put(items[key], rest, value)
    return tuple(items)


def _can_overwrite(old: Any, value: torch.Tensor) -> bool:
    """Return whether `old` is a tensor of the same form that no gradient goes to, and whose elements have memory of their own."""
    if not isinstance(old, torch.Tensor) or old.requires_grad or old.device != value.device:
        return False
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(old.stride(), old.shape, strict=True))
    return old.shape == value.shape and old.dtype == value.dtype and not overlaps


def _memory(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None
