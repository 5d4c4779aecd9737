"""Attention with a dense mask, written out: the oracle of attention that makes none."""

import torch

SEQS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 24, 4, 2, 8
DOCUMENTS = ((5, 11, 1, 7), (24,))  # their lengths, in each sequence
# (documents or not, window, spans that divide queries)
CASES = {
    "documents": (True, None, 1),
    "windows": (False, 4, 1),
    "windows in documents": (True, 4, 1),
    "documents, queries divided": (True, None, 3),
    "windows in documents, queries divided": (True, 4, 3),
    "queries divided": (False, None, 2),
}


def positions() -> torch.Tensor:
    """Return positions [SEQS, LENGTH] that restart at each document."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS])


def tensors(device: str, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Return query, key, value [SEQS, heads, LENGTH, WIDTH] and the gradient of the output [SEQS, LENGTH, HEADS, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(SEQS, heads, LENGTH, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)] + [(SEQS, LENGTH, HEADS, WIDTH)]
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def attended(documents: bool, window: int | None) -> torch.Tensor:
    """Return which keys each query attends to: bool [SEQS, 1, LENGTH, LENGTH]."""
    places = torch.arange(LENGTH)
    distance = places.unsqueeze(1) - places
    near = (distance >= 0) & (distance < (window or LENGTH))
    if not documents:
        return near.expand(SEQS, 1, LENGTH, LENGTH)
    document = torch.stack([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in DOCUMENTS])
    return (near & (document.unsqueeze(2) == document.unsqueeze(1))).unsqueeze(1)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Return attention [SEQS, LENGTH, HEADS, WIDTH]."""
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask.to(query.device), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)
