"""Takes fingerprints of tensors where their shards lie, that add up to the whole tensor's in any layout.

Every element is known by its index in the whole tensor. `bits` is the sum, modulo 2^64, of a hash of each element's index and
bits: equal for equal tensors, however they are cut. `sketch` holds sums of the elements under random signs, which the index
draws: sketches of two tensors differ, in the mean of squares, by the squared length of the tensors' difference (Johnson and
Lindenstrauss), so that 16 numbers a tensor tell how far two runs are apart without keeping either tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PROJECTIONS = 16
_CHUNK = 1 << 18  # elements at a time: their signs take 32 MiB
_WORD = 1 << 64
_BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """Of a tensor, or of a part of one. Those of disjoint parts add up."""

    bits: int
    sketch: np.ndarray  # fp64 [PROJECTIONS]
    count: int  # elements
    dtype: str

    def __add__(self, other: Fingerprint) -> Fingerprint:
        same = self.dtype if self.dtype == other.dtype else f"{self.dtype} and {other.dtype}"
        return Fingerprint((self.bits + other.bits) % _WORD, self.sketch + other.sketch, self.count + other.count, same)

    def scaled(self, factor: float) -> Fingerprint:
        """Return it with the sketch of `factor` times the tensor; the bits stay those of the tensor as it was."""
        return Fingerprint(self.bits, self.sketch * factor, self.count, self.dtype)

    @property
    def length(self) -> float:
        """Return about the root of the sum of the squares of the elements."""
        return float(np.sqrt(np.mean(np.square(self.sketch))))

    def distance(self, other: Fingerprint) -> float:
        """Return about the length of the difference of the two tensors; infinity where either is not finite."""
        apart = float(np.sqrt(np.mean(np.square(self.sketch - other.sketch))))
        return apart if np.isfinite(apart) else np.inf


@torch.no_grad()
def fingerprint(tensor: torch.Tensor, places: Sequence[torch.Tensor]) -> Fingerprint:
    """Return the fingerprint of a part of a tensor.

    places: for each dimension of the part, int64 [its length]: the index in the whole is the sum of one of each. No dimension:
    one element, at index 0.
    """
    index = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for dim, place in enumerate(places):
        index = index + place.to(tensor.device).view([-1 if d == dim else 1 for d in range(len(places))])
    index, flat = index.expand(tensor.shape).reshape(-1), tensor.detach().reshape(-1)
    bits = torch.zeros((), dtype=torch.int64, device=tensor.device)
    sketch = torch.zeros(PROJECTIONS, dtype=torch.float64, device=tensor.device)
    shifts = torch.arange(PROJECTIONS, device=tensor.device)
    for start in range(0, flat.numel(), _CHUNK):
        where, values = index[start : start + _CHUNK], flat[start : start + _CHUNK]
        keys = mix(where)
        as_integers = values if values.dtype == torch.bool else values.contiguous().view(_BITS_OF[values.element_size()])
        bits = bits + mix(keys ^ as_integers.to(torch.int64)).sum()
        signs = (keys.unsqueeze(1) >> shifts).bitwise_and_(1).double().mul_(2.0).sub_(1.0)
        sketch = sketch + values.double() @ signs
    return Fingerprint(int(bits) % _WORD, sketch.cpu().numpy(), flat.numel(), str(tensor.dtype).removeprefix("torch."))


def mix(values: torch.Tensor) -> torch.Tensor:
    """Return int64 hashes of int64 values: the end of splitmix64 (Steele and others, 2014), in arithmetic modulo 2^64."""
    values = values + _signed(0x9E3779B97F4A7C15)  # a copy, changed in place from here on
    values.bitwise_xor_(_shifted(values, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    values.bitwise_xor_(_shifted(values, 27)).mul_(_signed(0x94D049BB133111EB))
    return values.bitwise_xor_(_shifted(values, 31))


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without the sign."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
