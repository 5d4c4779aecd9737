"""Whether a prepared folder is whole, and what is in it: the work of `tools.data check` and `tools.data stats`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recipes.common.data.shards import ORIGIN, Shard, read_manifest, split_shards, tokenizer_hash
from tools.common.console import Progress

CHUNK = 1 << 24  # tokens looked at together
MAX_HASHED = 1 << 24  # documents compared with each other; of more, a sample chosen by content
HISTOGRAM_BINS = 40  # powers of two


def check(folder: Path) -> list[str]:
    """Everything wrong in a prepared folder, one line each, by file."""
    manifest = read_manifest(folder)
    problems = []
    if tokenizer_hash(folder / "tokenizer") != manifest["tokenizer_hash"]:
        problems.append("tokenizer/tokenizer.json is not the one that made the shards")
    with open(folder / "files.jsonl", "rb") as file:
        num_files = sum(1 for _ in file)
    shards = [shard for split in manifest["splits"] for shard in split_shards(manifest, split)]
    total = sum(shard.tokens for shard in shards) * np.dtype(manifest["dtype"]).itemsize
    with Progress("check", total_bytes=total) as progress, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # hashing releases the interpreter, so threads use all cores
        for shard, found in zip(shards, pool.map(lambda s: check_shard(folder, s, manifest, num_files), shards), strict=True):
            problems += found
            size = shard.tokens * np.dtype(manifest["dtype"]).itemsize
            progress.add(shard.documents, size, size)
    for split, entry in manifest["splits"].items():
        for key in ("tokens", "documents"):
            if entry[key] != sum(shard[key] for shard in entry["shards"]):
                problems.append(f"dataset.json: {key} of {split} are not the sum of its shards'")
    return problems


def check_shard(folder: Path, shard: Shard, manifest: dict, num_files: int) -> list[str]:
    problems = []
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    sizes = {".bin": shard.tokens * dtype.itemsize, ".ends": shard.documents * 8, ".origins": shard.documents * ORIGIN.itemsize}
    for ending, size in sizes.items():
        path = (folder / shard.file).with_suffix(ending)
        if not path.is_file() or path.stat().st_size != size:
            found = path.stat().st_size if path.is_file() else "no"
            return [f"{path.name}: {found} bytes, the manifest says {size}"]
        with open(path, "rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.checksums[path.name]:
            problems.append(f"{path.name}: its checksum is not the manifest's, so it changed")
    ends = np.fromfile((folder / shard.file).with_suffix(".ends"), dtype="<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != shard.tokens:
        problems.append(f"{shard.file}: document bounds do not rise to {shard.tokens}")
        return problems
    tokens = np.memmap(folder / shard.file, dtype=dtype, mode="r")
    largest = max(int(tokens[at : at + CHUNK].max()) for at in range(0, shard.tokens, CHUNK))
    if largest >= manifest["vocab_size"]:
        problems.append(f"{shard.file}: holds id {largest}, the vocabulary has {manifest['vocab_size']}")
    open_ended = np.count_nonzero(tokens[ends - 1] != manifest["eos_id"])
    if open_ended and not manifest["packed_for"]:
        problems.append(f"{shard.file}: {open_ended} documents are not closed by the end token")
    origins = np.fromfile((folder / shard.file).with_suffix(".origins"), dtype=ORIGIN)
    if origins["file"].max() >= num_files or origins["source"].max() >= len(manifest["sources"]):
        problems.append(f"{shard.file}: a document comes from a file or source that is not listed")
    return problems


def stats(folder: Path) -> dict:
    """Lengths, sources and repeats of the train split."""
    manifest = read_manifest(folder)
    documents = manifest["splits"]["train"]["documents"]
    keep_one_in = max(-(-documents // MAX_HASHED), 1)
    histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    hashes, repeated_tokens_at = [], []
    shortest, longest = np.inf, 0
    with Progress("stats", total_bytes=manifest["splits"]["train"]["tokens"]) as progress:
        for lengths, tokens in _documents(folder, manifest):
            histogram += np.bincount(np.log2(lengths).astype(int), minlength=HISTOGRAM_BINS)
            shortest, longest = min(shortest, lengths.min()), max(longest, lengths.max())
            values = content_hashes(tokens, lengths)
            kept = values % np.uint64(keep_one_in) == 0
            hashes.append(values[kept])
            repeated_tokens_at.append(lengths[kept])
            progress.add(len(lengths), int(lengths.sum()), int(lengths.sum()))
    values, lengths = np.concatenate(hashes), np.concatenate(repeated_tokens_at)
    _, first = np.unique(values, return_index=True)
    again = np.ones(len(values), dtype=bool)
    again[first] = False
    return {
        "documents": documents,
        "tokens": manifest["splits"]["train"]["tokens"],
        "mean_length": manifest["splits"]["train"]["tokens"] / documents,
        "shortest": int(shortest),
        "longest": int(longest),
        "lengths": {str(1 << bin): int(count) for bin, count in enumerate(histogram) if count},
        "sources": manifest["sources"],
        "compared_documents": len(values),
        "repeated_documents": float(again.mean()),
        "repeated_tokens": float(lengths[again].sum() / lengths.sum()),
    }


def _documents(folder: Path, manifest: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(lengths, tokens) of every train shard."""
    for shard in split_shards(manifest, "train"):
        ends = np.fromfile((folder / shard.file).with_suffix(".ends"), dtype="<u8").astype(np.int64)
        tokens = np.memmap(folder / shard.file, dtype=np.dtype(manifest["dtype"]).newbyteorder("<"), mode="r")
        yield np.diff(ends, prepend=0), tokens


def content_hashes(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """64 bits of each document's content: uint64 [documents]."""
    ends = np.cumsum(lengths).tolist()
    digests = b"".join(
        hashlib.blake2b(tokens[end - length : end].tobytes(), digest_size=8).digest()
        for length, end in zip(lengths.tolist(), ends, strict=True)
    )
    return np.frombuffer(digests, dtype="<u8")


def lengths_picture(found: dict) -> str:
    """The histogram of document lengths as SVG."""
    bars = list(found["lengths"].items())
    most = max(count for _, count in bars)
    width, height, left, base = 60 * len(bars) + 80, 320, 60, 270
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{found["documents"]:,} documents by length in tokens</text>',
    ]
    for number, (length, count) in enumerate(bars):
        x, tall = left + 60 * number, 220 * count / most
        parts.append(f'<rect x="{x}" y="{base - tall:.1f}" width="50" height="{tall:.1f}" fill="#4477aa"/>')
        parts.append(f'<text x="{x + 25}" y="{base - tall - 4:.1f}" text-anchor="middle">{count:,}</text>')
        parts.append(f'<text x="{x + 25}" y="{base + 16}" text-anchor="middle">{int(length):,}+</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
