"""Packs documents into sequences so that as few as possible are split: best-fit packing (arXiv 2404.10830).

A document longer than a sequence is split into whole sequences and a remainder; remainders and documents, longest first, go where
they leave the least room. End tokens fill the room that is left. Sequences then start at multiples of their length, where the
reader splits anyway.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Pack items of `lengths`, each at most `size`, into bins of capacity `size`; return the items of each bin."""
    bins: list[list[int]] = []
    bins_with: dict[int, list[int]] = {}  # room left -> bins
    rooms: list[int] = []  # the keys of it that are in use, sorted
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        at = bisect_left(rooms, lengths[item])
        if at == len(rooms):
            number, room = len(bins), size
            bins.append([])
        else:
            room = rooms[at]
            number = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[at], bins_with[room]
        bins[number].append(item)
        room -= lengths[item]
        if room:
            if room not in bins_with:
                bins_with[room] = []
                insort(rooms, room)
            bins_with[room].append(number)
    return bins


def pack(
    tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray, size: int, fill: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay out documents (tokens [tokens], lengths and origins [documents]) in sequences of `size` tokens.

    Returns the same three arrays, by part of a document. Padding (`fill`) belongs to the last part of its sequence.
    """
    ends = np.cumsum(lengths).tolist()
    starts, sizes, document = [], [], []
    for number, (length, end) in enumerate(zip(lengths.tolist(), ends, strict=True)):
        for start in range(end - length, end, size):
            starts.append(start)
            sizes.append(min(size, end - start))
            document.append(number)
    bins = best_fit(sizes, size)
    out = np.full(len(bins) * size, fill, dtype=tokens.dtype)
    part_lengths, order = [], []
    for number, items in enumerate(bins):
        at = number * size
        for item in items:
            out[at : at + sizes[item]] = tokens[starts[item] : starts[item] + sizes[item]]
            at += sizes[item]
            part_lengths.append(sizes[item])
            order.append(document[item])
        part_lengths[-1] += (number + 1) * size - at
    return out, np.array(part_lengths, dtype=np.int64), origins[np.array(order, dtype=np.int64)]
