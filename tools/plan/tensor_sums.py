"""Counts what tensor ranks exchange in a layer, and which of it goes beside products, as training does it."""

from __future__ import annotations

from recipes.common.config.placement import ONE_PASS, placement_of
from recipes.common.recipe import Layout

_COLUMNS = 2.0 / 3.0  # of a layer's products, the share of its column-parallel linears: 0.65 of Llama 8B's, 0.66 of 405B's


def tensor_sums(layout: Layout, repeated: float, *, experts: bool) -> dict[str, float]:
    """Return `sums`, `sums_beside` and `passes_beside` of the time model.

    A gather or a reduce-scatter is half an all-reduce. Of a recomputed layer the last sum is not repeated.
    repeated: the share of layers that is recomputed. experts: MLPs are mixtures, whose sums go beside nothing.
    """
    alone, deferred = 2.0, placement_of(layout).schedule != ONE_PASS
    if not layout.sequence_parallel:
        alone += repeated
        beside = 1.0 if experts else 2.0  # of the columns' input: beside their weight gradients
        alone, beside = (alone + 2.0, 0.0) if deferred else (alone + 2.0 - beside, beside)
        return _named(alone, beside, _COLUMNS * beside / 2.0)
    alone += 1.5 * repeated + 1.0  # the gradients of the rows' outputs are gathered before anything can be computed
    if deferred:  # each factor of a weight's gradient is gathered beside the product before
        return _named(alone + 1.0, 2.0, 1.0)
    again = 1.0 - repeated  # a layer that is not recomputed gathers its columns' input again, beside that input's gradient
    return _named(alone, 1.0 + again, _COLUMNS * (1.0 + again))


def _named(alone: float, beside: float, passes: float) -> dict[str, float]:
    return {"sums": alone, "sums_beside": beside, "passes_beside": passes}
