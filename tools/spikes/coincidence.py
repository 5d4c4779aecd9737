"""Do two runs spike at the same steps? With one order of data that tells the data from the dynamics.

Six of modded-nanogpt's ValueEmbed runs read the same batches and all spike at steps 918 and 946: the data. Mixtral trained again
from the same configuration spikes at other steps: the dynamics.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

CHANCE = 1e-3  # that so many steps fall together by accident: less, and they do not
MOST, HARDLY_ANY = 0.5, 0.1  # of the smaller set, shared: then the data, then the dynamics
FEW = 2  # spikes of the quieter run below which none in common says nothing


@dataclass(frozen=True)
class Coincidence:
    """What two runs' spikes have in common."""

    shared: tuple[int, ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    chance: float  # probability of as many shared steps or more, were the spikes of each run anywhere
    verdict: str  # data, dynamics, cannot tell


def coincident(steps_a: Collection[int], steps_b: Collection[int], positions: int) -> Coincidence:
    """Compare the steps at which two runs spiked. positions: how many logged steps both runs have."""
    a, b = set(steps_a), set(steps_b)
    shared, fewer = a & b, min(len(a), len(b))
    mean = len(a) * len(b) / max(positions, 1)  # Poisson: spikes are few among the steps
    below = sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(len(shared)))
    chance = max(1.0 - below, 0.0) if shared else 1.0
    if shared and len(shared) >= MOST * fewer and chance < CHANCE:
        verdict = "data"
    elif fewer >= FEW and len(shared) <= HARDLY_ANY * fewer:
        verdict = "dynamics"
    else:
        verdict = "cannot tell"
    return Coincidence(tuple(sorted(shared)), tuple(sorted(a - b)), tuple(sorted(b - a)), chance, verdict)
