"""Sums over parts of a flat fp32 partition what an optimizer step did to it. Nothing is copied and nothing is changed.

The update is not measured by keeping the old weights: after the step it follows from the optimizer's state. AdamW has made
w = (1 - c) * w_old - s * q with q = m / (sqrt(v) + eps), c = lr * weight_decay and s = lr / bias correction, so that
w - w_old = -(c * w + s * q) / (1 - c). Plain SGD is the same with q its gradient, SGD with momentum with q its buffer and c = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recipes.common.runtime.device_copies import to_device

# Sums over elements of: the gradient's, the weight's and the update's square; g^2 / max(v, eps^2); sqrt(v) < eps; g = 0.
# g is what the optimizer was given (after clipping), v is corrected for bias: at the first step g^2 / v is 1.
SUMS = ("gradient", "weight", "update", "adam", "tiny", "zeros")


@dataclass(frozen=True)
class Spans:
    """Parts of a flat partition that lie one after another in spans, and the row of the result that each adds to."""

    spans: tuple[tuple[int, tuple[int, ...]], ...]  # (start, lengths of its parts)
    rows: torch.Tensor  # int64 [parts], where the sums are kept
    lengths: torch.Tensor | np.ndarray  # fp64 [parts], where the partition is


def spans_of(ranges: list[tuple[int, int, int]], device_type: str, sums_device: torch.device) -> Spans:
    """Group ranges (row, start, stop) into spans whose temporaries stay in the processor's cache: it bounds the speed."""
    longest = 1 << 16 if device_type == "cpu" else 1 << 21
    ranges = sorted(ranges, key=lambda item: item[1])
    parts = [(row, begin, min(begin + longest, stop)) for row, start, stop in ranges for begin in range(start, stop, longest)]
    spans: list[tuple[int, list[int]]] = []
    for _, start, stop in parts:
        if spans and spans[-1][0] + sum(spans[-1][1]) == start and stop - spans[-1][0] <= longest:
            spans[-1][1].append(stop - start)
        else:
            spans.append((start, [stop - start]))
    lengths = np.array([stop - start for _, start, stop in parts], dtype=np.float64)
    return Spans(
        tuple((start, tuple(lengths)) for start, lengths in spans),
        to_device(torch.tensor([row for row, _, _ in parts], dtype=torch.int64), sums_device),
        lengths if device_type == "cpu" else to_device(torch.from_numpy(lengths), sums_device),
    )


@torch.no_grad()
def add_sums(
    out: torch.Tensor,
    spans: Spans,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Add to out [rows, len(SUMS)] (fp64) what the last step did to these parts of a partition.

    weight, gradient: flat fp32, after the step. state, options: the torch optimizer's, of this partition and of its group.
    The Adam columns become NaN under SGD. Never waits for a GPU.
    """
    rate, decay = options["lr"], options["weight_decay"]
    # a few numbers are then Python's and numpy's: a tensor operator takes as long for one as for thousands
    on_cpu = weight.device.type == "cpu"
    adam = "exp_avg_sq" in state
    step_size, shrink, floor, correction = rate, rate * decay, 0.0, 1.0
    if adam:
        steps = float(state["step"]) if on_cpu else torch.as_tensor(state["step"], dtype=torch.float64)
        first, second = options["betas"]
        correction = (1.0 - second**steps) ** -0.5  # of sqrt(v). Taken out of sums rather than put into every element
        step_size, floor = rate / (1.0 - first**steps) / correction, options["eps"] / correction
    elif options["momentum"]:
        shrink = 0.0
    direction = state["exp_avg"] if adam else state.get("momentum_buffer")
    direction = gradient if direction is None else direction
    spread = state["exp_avg_sq"] if adam else None
    scratch = torch.empty(2, max(sum(lengths) for _, lengths in spans.spans), device=weight.device)
    terms = _terms_on_cpu if on_cpu else _terms
    rows: list[list[Any]] = []
    for start, lengths in spans.spans:
        span = start, sum(lengths)
        flats = (flat.narrow(0, *span) for flat in (weight, gradient, direction))
        rows += terms(*flats, spread.narrow(0, *span) if adam else None, lengths, floor, scratch.narrow(1, 0, span[1]).unbind())
    # [parts] each: g*g, w*w, w*q, q*q, adam, tiny, nonzero gradients
    table = np.array(rows) if on_cpu else torch.stack([torch.stack(row) for row in rows]).double()
    squares, weights, products, directions, relative, tiny, nonzero = table.T
    update = (shrink**2 * weights + 2 * shrink * step_size * products + step_size**2 * directions) / (1 - shrink) ** 2
    sums = [squares, weights, update, relative / correction**2, tiny, spans.lengths - nonzero]
    out.index_add_(
        0, spans.rows, to_device(torch.from_numpy(np.stack(sums, axis=1)), out.device) if on_cpu else torch.stack(sums, dim=1)
    )


def _terms_on_cpu(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    direction: torch.Tensor,
    spread: torch.Tensor | None,
    lengths: tuple[int, ...],
    floor: float,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> list[list[float]]:
    """Return the table's rows of one span, as `_terms` does. Here a look whether there is anything to count waits for nothing."""
    # counting takes twice as long as looking for one
    some_zero = torch.abs(gradient, out=scratch[1]).amin().item() == 0.0
    tiny = None
    if spread is None:
        quotient, relative = direction, gradient
    else:
        root = torch.sqrt(spread, out=scratch[0])
        quotient = torch.add(root, floor, out=scratch[1])
        torch.div(direction, quotient, out=quotient)
        if root.amin().item() < floor:
            tiny = (root < floor).split(lengths)
            root.clamp_(min=floor)
        relative = torch.div(gradient, root, out=root)
    parts = [(weight, gradient, quotient, relative)]
    if len(lengths) > 1:
        parts = zip(*(flat.split_with_sizes(lengths) for flat in parts[0]), strict=True)
    dot, rows = torch.dot, []
    for index, (w, g, q, r) in enumerate(parts):
        rows.append([dot(g, g).item(), dot(w, w).item(), dot(w, q).item(), dot(q, q).item()])
        if spread is None:
            rows[-1] += [math.nan, math.nan]
        else:
            rows[-1] += [dot(r, r).item(), 0.0 if tiny is None else float(tiny[index].count_nonzero())]
        rows[-1].append(float(g.count_nonzero()) if some_zero else float(lengths[index]))
    return rows


def _terms(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    direction: torch.Tensor,
    spread: torch.Tensor | None,
    lengths: tuple[int, ...],
    floor: torch.Tensor | float,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> list[list[torch.Tensor]]:
    """Return the table's rows of one span: seven fp32 scalars for each part. floor: eps in units of the uncorrected sqrt(v).

    Dot products take one pass each, and are more exact than sums of squares.
    """
    tiny = None
    if spread is None:
        quotient, relative = direction, gradient
    else:
        root = torch.sqrt(spread, out=scratch[0])
        quotient = torch.add(root, floor, out=scratch[1])
        torch.div(direction, quotient, out=quotient)
        tiny = (root < floor).split(lengths)
        root.clamp_(min=floor)
        relative = torch.div(gradient, root, out=root)
    all_nan = weight.new_full((), math.nan)
    rows = []
    for index, (w, g, q, r) in enumerate(zip(*(x.split(lengths) for x in (weight, gradient, quotient, relative)), strict=True)):
        rows.append([torch.dot(g, g), torch.dot(w, w), torch.dot(w, q), torch.dot(q, q)])
        rows[-1] += [all_nan, all_nan] if tiny is None else [torch.dot(r, r), torch.count_nonzero(tiny[index]).float()]
        rows[-1].append(torch.count_nonzero(g).float())
    return rows
