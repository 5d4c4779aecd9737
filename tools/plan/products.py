"""Times matrix products as GPUs run them: tiles of the output, as many at a time as the GPU has processors.

A product whose tiles do not fill the last wave, or whose sides do not fill its tiles, waits for what is not there (NVIDIA, Matrix
Multiplication Background User's Guide: tile and wave quantization). Where tiles are few, libraries divide the depth as well.
"""

from __future__ import annotations

import numpy as np

TILE = 128  # rows and columns of a tile
SPLITS = (1, 2, 4, 8)  # parts of the depth
SHALLOWEST = 512  # depth of a part: with less a tile's start and end outweigh it


def product_seconds(
    rows: np.ndarray,
    columns: np.ndarray,
    depth: np.ndarray,
    *,
    groups: np.ndarray,
    units: np.ndarray,
    rate: np.ndarray,
    bandwidth: np.ndarray,
    written: np.ndarray | float = 2.0,
) -> np.ndarray:
    """Return the seconds of products [rows, depth] x [depth, columns] in 16 bits, `groups` of them in one launch.

    rate: FLOP/s of the whole GPU. bandwidth: bytes/s of its memory. written: bytes that an element of the result moves.
    """
    tiles = groups * np.ceil(rows / TILE) * np.ceil(columns / TILE)
    moved = groups * (2.0 * (rows * depth + depth * columns) + written * rows * columns)
    best = np.full(np.broadcast(rows, columns, depth).shape, np.inf)
    for parts in SPLITS:
        waves = np.ceil(tiles * parts / units)
        seconds = waves * 2.0 * TILE**2 * (depth / parts) / (rate / units)
        sums = 8.0 * groups * rows * columns * parts if parts > 1 else 0.0  # each part's, in fp32, written and read
        seconds = np.maximum(seconds, (moved + sums) / bandwidth)
        can = (parts == 1) | ((groups == 1) & (depth / parts >= SHALLOWEST))
        best = np.where(can, np.minimum(best, seconds), best)
    return best


def training_seconds(
    tokens: np.ndarray,
    width: np.ndarray,
    inner: np.ndarray,
    repeated: np.ndarray,
    *,
    summed: np.ndarray | float = 2.0,
    **gpu: np.ndarray,
) -> np.ndarray:
    """Return the seconds of a matrix [width, inner] in training: its forward pass, `repeated` times more, both gradients.

    summed: bytes that an element of the weight's gradient moves in its product.
    """
    forward = product_seconds(tokens, width, inner, **gpu)
    of_input = product_seconds(tokens, inner, width, **gpu)
    return (1.0 + repeated) * forward + of_input + product_seconds(width, inner, tokens, written=summed, **gpu)
