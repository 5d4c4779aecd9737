"""Adds up what was recorded of two steps, of different length, to the figures of a step of any length.

What a step does once and what it does for each micro batch follow from the difference: a step of n micro batches is a + b n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from tools.plan.rehearsal.kernels import LAYERS

Figures = dict[Hashable, tuple[float, ...]]


@dataclass(frozen=True)
class Growth:
    """A figure of a step: `once`, and `each` for every micro batch."""

    once: tuple[float, ...]
    each: tuple[float, ...]

    def of(self, micro_batches: int) -> tuple[float, ...]:
        return tuple(a + b * micro_batches for a, b in zip(self.once, self.each, strict=True))


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """What one rank does in a step of `micro_batches`, and holds at its fullest."""

    micro_batches: int
    rehearsed: tuple[int, ...]  # micro batches of the steps that were run
    rank: int
    stage: int
    own_layers: tuple[int, ...]
    parameters: int
    group_calls: int
    peak: int  # bytes
    held: tuple[dict[str, Any], ...]  # tensors at the peak, as HeldTensors; the largest first
    between_steps: int  # bytes
    at_start: int  # bytes, the peak while the trainer is built
    waits: dict[tuple[str, str], Growth]  # (what, line) -> (times,)
    work: dict[str, Growth]  # part -> (kernels, bytes, FLOPs)
    layer_work: dict[str, Growth]  # line -> (kernels, bytes)
    traffic: dict[tuple[str, str, str], Growth]  # (group, operator, dtype) -> (calls, bytes, bytes that go beside products)
    broken: dict[str, int]  # NCCL's rules
    unanswered: dict[str, int]  # lines where the number of elements depends on data

    def held_for(self, what: str) -> int:
        """Return the bytes of states, activations or the loss at the peak."""
        return sum(each["bytes"] for each in self.held if each["of"] == what)

    def waits_of_step(self) -> tuple[float, float]:
        """Return how often the host waits in a step: once a step, and for each micro batch."""
        once = sum(wait.once[0] for wait in self.waits.values())
        return once, sum(wait.each[0] for wait in self.waits.values())

    def layer_share(self) -> tuple[float, float]:
        """Return (kernels, bytes) of a layer and micro batch that are neither products nor attention."""
        layers = len(self.own_layers)
        kernels, moved = (sum(growth.each[i] for growth in self.layer_work.values()) for i in range(2))
        return kernels / layers, moved / layers


def summarize(result: dict[str, Any], micro_batches: int) -> StepSummary:
    """Return the figures of a step of `micro_batches` from what `rehearsed_step.rehearse` recorded."""
    steps = steps_of(result)
    whole = [phase for phase in steps[-2:] if phase["micro_batches"] <= micro_batches]
    fullest = max(whole, key=lambda phase: phase["peak"])
    return StepSummary(
        micro_batches=micro_batches,
        rehearsed=tuple(phase["micro_batches"] for phase in steps),
        rank=result["rank"],
        stage=result["stage"],
        own_layers=tuple(result["own_layers"]),
        parameters=result["parameters"],
        group_calls=result["group_calls"],
        peak=fullest["peak"],
        held=tuple(fullest["held"]),
        between_steps=steps[-1]["after"],
        at_start=result["at_start"],
        waits=growth(result, waits),
        work=growth(result, work_by_part),
        layer_work=growth(result, layer_work),
        traffic=growth(result, traffic),
        broken=result["broken"],
        unanswered=result["unanswered"],
    )


def growth(result: dict[str, Any], figures: Callable[[dict[str, Any], dict[str, Any]], Figures]) -> dict[Hashable, Growth]:
    """Return how each of `figures` of (result, phase) grows with the micro batches, from the last two steps of a rehearsal."""
    short, long = steps_of(result)[-2:]
    begin, end = figures(result, short), figures(result, long)
    more = long["micro_batches"] - short["micro_batches"]
    assert more, "two steps of one length say nothing of other lengths"
    found = {}
    for key in begin.keys() | end.keys():
        width = len(begin.get(key) or end[key])
        first, second = begin.get(key, (0.0,) * width), end.get(key, (0.0,) * width)
        each = tuple((b - a) / more for a, b in zip(first, second, strict=True))
        found[key] = Growth(tuple(a - b * short["micro_batches"] for a, b in zip(first, each, strict=True)), each)
    return found


def steps_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [phase for phase in result["phases"] if phase["name"].startswith("step ")]


def waits(result: dict[str, Any], phase: dict[str, Any]) -> Figures:
    """Return {(what, line): (times,)}."""
    return {(what, line): (times,) for what, line, times in phase["waits"]}


def work_by_part(result: dict[str, Any], phase: dict[str, Any]) -> Figures:
    """Return {part: (kernels, bytes, FLOPs)}."""
    return _added(((part,), figures) for part, _, _, _, *figures in phase["work"])


def layer_work(result: dict[str, Any], phase: dict[str, Any]) -> Figures:
    """Return {line: (kernels, bytes)} of what is neither product nor attention in the decoder layers."""
    return _added(((line,), figures[:2]) for part, line, _, _, *figures in phase["work"] if part == LAYERS)


def traffic(result: dict[str, Any], phase: dict[str, Any]) -> Figures:
    """Return {(group, operator, dtype): (calls, bytes, bytes of those that products are computed beside)}."""
    names = {tuple(ranks): name for name, ranks in reversed(result["group_names"].items())}
    rows = []
    for call in result["calls"]:
        if call["phase"] == phase["name"]:
            group = "pipeline" if call["peer"] is not None else _group(call["ranks"], names, result["world_size"])
            rows.append(((group, call["op"], call["dtype"]), (1, call["bytes"], call["bytes"] if call["beside"] else 0)))
    return _added(rows, alone=False)


def _group(ranks: tuple[int, ...], names: dict[tuple[int, ...], str], world_size: int) -> str:
    """Return a group's name, as the grid has it."""
    if len(ranks) == world_size:
        return "all"
    return names.get(tuple(ranks)) or ("alone" if len(ranks) == 1 else f"{len(ranks)} ranks")


def _added(rows: Any, *, alone: bool = True) -> Figures:
    """Add up figures by key; alone: a key of one word is that word."""
    sums: dict[Hashable, list[float]] = defaultdict(list)
    for key, figures in rows:
        known = sums[key[0] if alone else key]
        known[:] = [a + b for a, b in zip(known, figures, strict=True)] if known else list(figures)
    return {key: tuple(values) for key, values in sums.items()}
