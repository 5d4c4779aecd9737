"""Compares two traces of one step, whatever their layouts, and names the first tensor that differs and the module it is of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.replay.compute import RankResult
from tools.replay.fingerprint import Fingerprint
from tools.replay.rank_trace import (
    AFTER,
    BEFORE,
    DIVIDED,
    GRADIENT,
    IDS,
    INPUT,
    INPUT_GRADIENT,
    LOSS,
    OUTPUT,
    OUTPUT_GRADIENT,
    PartSeen,
    TensorPart,
)

TRIALS, FACTOR = 2, 8.0  # trials that differ by rounding alone; so many times the largest difference of a tensor is rounding
LEAST = 4 * 2.0**-23
OUTLYING = 100.0  # times what most tensors have drifted: nothing that drifts
Key = tuple[str, str]  # kind, name


@dataclass(frozen=True)
class TracedTensor:
    """A whole tensor, put together from the ranks' parts."""

    order: tuple[int, int, int]
    print: Fingerprint
    copies: str  # which ranks' copies of a part differ; empty where they are equal
    places: frozenset[str] | None  # of parts that could not be placed; None where all were


@dataclass(frozen=True, kw_only=True)
class FirstTensor:
    """The first tensor of a step that is not the same on both sides."""

    step: int
    kind: str
    name: str  # of the module or parameter that holds it
    module: str  # by whose doing it differs, by its Hugging Face name
    difference: float  # of the tensors, relative to their length
    rounding: float  # what rounding makes of it, measured
    largest: float | None = None  # largest difference of an element
    copies: str = ""

    def __str__(self) -> str:
        numbers = f"relative {self.difference:.1e}, rounding {self.rounding:.1e}"
        if self.largest is not None:
            numbers = f"max {self.largest:.1e}, {numbers}"
        return f"{self.module}: {self._what()} ({numbers}){'; ' + self.copies if self.copies else ''}"

    def _what(self) -> str:
        own = self.name == self.module
        if self.kind == IDS:
            return "differ first: the data, not the model"
        if self.kind == LOSS:
            return "differs first, though no activation does"
        if self.kind == OUTPUT:
            return "forward output differs first"
        if self.kind == INPUT:
            return "forward input differs first" if own else f"what it computes before {self.name} differs first"
        if self.kind == INPUT_GRADIENT:
            return "its backward pass differs first"
        if self.kind == OUTPUT_GRADIENT:
            return f"the gradient of the output of {self.name} differs first"
        if self.kind == GRADIENT:
            return f"the gradient of {self.name} differs first, though no activation or gradient of one does"
        if self.kind.endswith(AFTER):
            return f"the optimizer's update differs first ({self.kind.removesuffix(AFTER).strip()} of {self.name})"
        return f"{self.kind.removesuffix(BEFORE).strip()} of {self.name} differs before the step"


def put_together(results: Sequence[RankResult]) -> dict[Key, TracedTensor]:
    """Return (kind, name) -> the whole tensor, of what all ranks saw."""
    parts: dict[Key, dict[str, list[PartSeen]]] = {}
    for result in results:
        for part in result.seen:
            parts.setdefault((part.kind, part.name), {}).setdefault(part.place, []).append(part)
    return {key: _whole(key[0], by_place) for key, by_place in parts.items()}


def _whole(kind: str, by_place: Mapping[str, Sequence[PartSeen]]) -> TracedTensor:
    whole, copies = None, ""
    for seen in by_place.values():
        one = seen[0].print
        other = next((part for part in seen if part.print.bits != one.bits), None)
        if other is not None and kind in (OUTPUT_GRADIENT, INPUT_GRADIENT):
            # each tensor rank has a partial sum (of what its own heads or features give); their sum is the gradient
            for part in seen[1:]:
                one = one + part.print
        elif other is not None:
            copies = copies or f"its copies on ranks {seen[0].rank} and {other.rank} differ"
        whole = one if whole is None else whole + one
    order = min(part.order for seen in by_place.values() for part in seen)
    placed = all(part.is_placed for seen in by_place.values() for part in seen)
    return TracedTensor(order, whole, copies, None if placed else frozenset(by_place))


def first_tensor(
    step: int,
    before: Mapping[Key, TracedTensor],
    after: Mapping[Key, TracedTensor],
    stirred: Sequence[Mapping[Key, TracedTensor]],
    *,
    bitwise: bool,
) -> FirstTensor | None:
    """Return the first tensor of `after` that is not that of `before`; None where all are equal.

    stirred: trials that differ from `before` by rounding alone. bitwise: both are cut alike, so that any bit counts; else what is
    beyond rounding. Gradients that were clipped by other norms are compared as they were before, which rounds.
    """
    floors = _floors(before, stirred)
    divisors = [side[DIVIDED, "clipping"].print.bits for side in (before, after) if (DIVIDED, "clipping") in side]
    clipped_otherwise = len(set(divisors)) > 1
    for key in sorted(before.keys() | after.keys(), key=lambda k: (before.get(k) or after[k]).order):
        kind, name = key
        if kind == DIVIDED:
            continue
        ours, theirs = before.get(key), after.get(key)
        if ours is None or theirs is None:
            if kind == GRADIENT or kind.endswith(AFTER):  # a step that one side skipped
                return FirstTensor(step=step, kind=kind, name=name, module=_owner(name), difference=math.inf, rounding=0.0)
            continue
        if ours.places != theirs.places:  # cut otherwise, and nobody knows how
            continue
        apart, rounding = _apart(ours, theirs), floors[key]
        bits = ours.print.bits != theirs.print.bits or ours.copies != theirs.copies
        exact = (bitwise and not (kind == GRADIENT and clipped_otherwise)) or kind == IDS
        if ours.copies != theirs.copies or (bits if exact else not apart <= max(FACTOR * rounding, LEAST)):
            return FirstTensor(
                step=step, kind=kind, name=name, module=_module(kind, name, before), difference=apart, rounding=rounding,
                copies=theirs.copies or ours.copies,
            )  # fmt: skip
    return None


def outlying_state(step: int, before: Mapping[Key, TracedTensor], after: Mapping[Key, TracedTensor]) -> FirstTensor | None:
    """Return the weight or optimizer state before a step that differs by far more than the others of its kind.

    For runs that have drifted apart by rounding over many steps: all of their tensors have, by about as much.
    """
    apart = {
        key: _apart(before[key], after[key])
        for key in sorted(before.keys() & after.keys(), key=lambda k: before[k].order)
        if key[0].endswith(BEFORE) and before[key].places == after[key].places
    }
    for (kind, name), difference in apart.items():
        usual = float(np.median([d for (other, _), d in apart.items() if other == kind]))
        if not difference <= max(OUTLYING * usual, LEAST):
            return FirstTensor(step=step, kind=kind, name=name, module=_owner(name), difference=difference, rounding=usual)
    return None


def compared(before: Mapping[Key, TracedTensor], after: Mapping[Key, TracedTensor]) -> tuple[int, int]:
    """Return how many tensors are compared, and how many are not, as nobody knows how they are cut."""
    common = before.keys() & after.keys()
    unknown = sum(before[key].places != after[key].places for key in common)
    return len(common) - unknown, unknown


def state_differs(found: FirstTensor | None) -> bool:
    """Whether the sides differ before the step already, so that the cause lies further back."""
    return found is not None and found.kind.endswith(BEFORE)


def _floors(before: Mapping[Key, TracedTensor], stirred: Sequence[Mapping[Key, TracedTensor]]) -> dict[Key, float]:
    """Return what rounding makes of each tensor: the largest of the trials, and at least the median of tensors of its kind."""
    own = {key: max((_apart(tensor, t[key]) for t in stirred if key in t), default=0.0) for key, tensor in before.items()}
    by_kind: dict[str, list[float]] = {}
    for (kind, _name), floor in own.items():
        by_kind.setdefault(kind, []).append(floor)
    return {key: max(floor, float(np.median(by_kind[key[0]]))) for key, floor in own.items()}


def _apart(a: TracedTensor, b: TracedTensor) -> float:
    if a.print.bits == b.print.bits:
        return 0.0
    length = max(a.print.length, b.print.length)
    return a.print.distance(b.print) / length if length > 0 and math.isfinite(length) else math.inf


def _module(kind: str, name: str, seen: Mapping[Key, TracedTensor]) -> str:
    """Return the module by whose doing a tensor differs: what a module reads is its parent's doing, unless it is the first."""
    if kind in (IDS, LOSS):
        return name if kind == IDS else "the loss"
    if kind in (INPUT, OUTPUT_GRADIENT):
        parent = name.partition(" ")[0].rpartition(".")[0]
        while parent and (OUTPUT, parent) not in seen and "." in parent:
            parent = parent.rpartition(".")[0]
        return parent or name
    return name.partition(" (call")[0] if kind in (OUTPUT, INPUT_GRADIENT) else _owner(name)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def largest_difference(before: Sequence[TensorPart], after: Sequence[TensorPart]) -> float | None:
    """Return the largest difference of an element, of two sides' parts of one tensor; None where they have none in common."""
    sides = []
    for parts in (before, after):
        index = np.concatenate([part.index for part in parts] or [np.zeros(0, np.int64)])
        values = np.concatenate([part.values for part in parts] or [np.zeros(0)])
        places, first = np.unique(index, return_index=True)  # copies of a part come once
        sides.append((places, values[first]))
    (ours, a), (theirs, b) = sides
    _, left, right = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    if not left.size:
        return None
    apart = np.abs(a[left] - b[right])
    return float(apart.max()) if np.isfinite(apart).all() else math.inf
