"""What an optimizer step did to a flat fp32 partition, as sums over pieces of it. Nothing is copied and nothing is changed.

The update is not measured by keeping the old weights: after the step it follows from the optimizer's state. AdamW has made
w = (1 - c) * w_old - s * q with q = m / (sqrt(v) + eps), c = lr * weight_decay and s = lr / bias correction, so that
w - w_old = -(c * w + s * q) / (1 - c). Plain SGD is the same with q its gradient, SGD with momentum with q its buffer and c = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Sums over elements of: the gradient's, the weight's and the update's square; g^2 / max(v, eps^2); sqrt(v) < eps; g = 0.
# g is what the optimizer was given (after clipping), v is corrected for bias: at the first step g^2 / v is 1.
SUMS = ("gradient", "weight", "update", "adam", "tiny", "zeros")


@dataclass(frozen=True)
class Pieces:
    """Parts [start, stop) of a flat partition, and the row of the result that each adds to."""

    ranges: tuple[tuple[int, int], ...]
    rows: torch.Tensor  # int64 [pieces], where the sums are kept
    lengths: torch.Tensor  # fp64 [pieces], there too


def cut_pieces(parts: list[tuple[int, int, int]], device_type: str, sums_device: torch.device) -> Pieces:
    """Parts (row, start, stop) in pieces whose temporaries stay in the processor's cache, which is where the time goes."""
    longest = 1 << 16 if device_type == "cpu" else 1 << 21
    cut = [(row, begin, min(begin + longest, stop)) for row, start, stop in parts for begin in range(start, stop, longest)]
    return Pieces(
        tuple((start, stop) for _, start, stop in cut),
        torch.tensor([row for row, _, _ in cut], device=sums_device),
        torch.tensor([stop - start for _, start, stop in cut], dtype=torch.float64, device=sums_device),
    )


@torch.no_grad()
def add_sums(
    out: torch.Tensor,
    pieces: Pieces,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Add to out [rows, len(SUMS)] (fp64) what the last step did to these pieces of a partition.

    weight, gradient: flat fp32, after the step. state, options: the torch optimizer's, of this partition and of its group.
    The Adam columns become NaN under SGD. Never waits for the device.
    """
    rate, decay = options["lr"], options["weight_decay"]
    adam = "exp_avg_sq" in state
    step_size, shrink, correction = rate, rate * decay, 1.0
    if adam:
        steps = torch.as_tensor(state["step"], dtype=torch.float64)
        first, second = options["betas"]
        step_size, correction = rate / (1.0 - first**steps), (1.0 - second**steps).rsqrt()
    elif options["momentum"]:
        shrink = 0.0
    direction = state["exp_avg"] if adam else state.get("momentum_buffer")
    direction = gradient if direction is None else direction
    spread = state["exp_avg_sq"] if adam else None
    scratch = torch.empty(2, max(stop - start for start, stop in pieces.ranges), device=weight.device)
    terms = []
    for start, stop in pieces.ranges:
        part = slice(start, stop)
        parts = (weight[part], gradient[part], direction[part], spread[part] if adam else None)
        terms.append(torch.stack(_terms(*parts, options.get("eps", 0.0), correction, scratch[:, : stop - start])))
    # [pieces, terms]: g*g, w*w, w*q, q*q, adam, tiny, nonzero gradients
    table = torch.stack(terms).to(out.device, torch.float64)
    update = (shrink**2 * table[:, 1] + 2 * shrink * step_size * table[:, 2] + step_size**2 * table[:, 3]) / (1 - shrink) ** 2
    sums = torch.stack([table[:, 0], table[:, 1], update, table[:, 4], table[:, 5], pieces.lengths - table[:, 6]], dim=1)
    out.index_add_(0, pieces.rows, sums)


def _terms(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    direction: torch.Tensor,
    spread: torch.Tensor | None,
    eps: float,
    correction: torch.Tensor | float,
    scratch: torch.Tensor,
) -> list[torch.Tensor]:
    """The table's row of one piece, seven fp32 scalars. Dot products: one pass each, and more exact than a sum of squares."""
    if spread is None:
        nothing = weight.new_full((), float("nan"))
        quotient, adam, tiny = direction, nothing, nothing
    else:
        root = torch.sqrt(spread, out=scratch[0]).mul_(correction)
        quotient = torch.add(root, eps, out=scratch[1])
        torch.div(direction, quotient, out=quotient)
        # comparing is the dearest of all; a CPU can look first whether there is anything to count, without waiting for it
        if root.device.type == "cpu" and root.amin().item() >= eps:
            tiny = root.new_zeros(())
        else:
            tiny = torch.count_nonzero(root < eps).float()
            root.clamp_(min=eps)
        relative = torch.div(gradient, root, out=root)
        adam = torch.dot(relative, relative)
    return [
        torch.dot(gradient, gradient),
        torch.dot(weight, weight),
        torch.dot(weight, quotient),
        torch.dot(quotient, quotient),
        adam,
        tiny,
        torch.count_nonzero(gradient).float(),
    ]
