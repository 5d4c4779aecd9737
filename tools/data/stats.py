"""Prints document lengths, sources and repeats of prepared data, and draws a histogram of the lengths."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recipes.common.data.shards import read_manifest, split_shards
from tools.common.console import GOOD, as_usage_error, printable, progress_bar

MAX_HASHED = 1 << 24  # documents compared with each other; of more, a sample chosen by content
HISTOGRAM_BINS = 40  # powers of two


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder written by tools.data prepare")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to write the histogram (default: DIR/lengths.svg)")


@as_usage_error(OSError, ValueError)
def run(args: argparse.Namespace) -> int:
    found = stats(args.folder)
    picture = args.picture or args.folder / "lengths.svg"
    picture.write_text(lengths_picture(found))
    found["picture"] = str(picture)
    if args.json:
        print(json.dumps(found))
        return GOOD
    print(f"{found['documents']:,} documents, {found['tokens']:,} tokens in the train split")
    print(f"length: mean {found['mean_length']:.0f}, from {found['shortest']} to {found['longest']:,} tokens; {picture}")
    print(f"repeats: {found['repeated_documents']:.2%} of documents, {found['repeated_tokens']:.2%} of tokens")
    print(f"{'source (both splits)':<50}{'documents':>12}{'tokens':>18}")
    for source in found["sources"]:
        print(f"{printable(source['name'])[-48:]:<50}{source['documents']:>12,}{source['tokens']:>18,}")
    return GOOD


def stats(folder: Path) -> dict:
    """Return lengths, sources and repeats of the train split."""
    manifest = read_manifest(folder)
    documents = manifest["splits"]["train"]["documents"]
    keep_one_in = max(-(-documents // MAX_HASHED), 1)
    histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    hashes, repeated_tokens_at = [], []
    shortest, longest = np.inf, 0
    with progress_bar("reading", manifest["splits"]["train"]["tokens"], "token") as bar:
        for lengths, tokens in _documents(folder, manifest):
            histogram += np.bincount(np.log2(lengths).astype(int), minlength=HISTOGRAM_BINS)
            shortest, longest = min(shortest, lengths.min()), max(longest, lengths.max())
            values = content_hashes(tokens, lengths)
            kept = values % np.uint64(keep_one_in) == 0
            hashes.append(values[kept])
            repeated_tokens_at.append(lengths[kept])
            bar.update(int(lengths.sum()))
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
    """Yield (lengths, tokens) of every train shard."""
    for shard in split_shards(manifest, "train"):
        ends = np.fromfile((folder / shard.file).with_suffix(".ends"), dtype="<u8").astype(np.int64)
        tokens = np.memmap(folder / shard.file, dtype=np.dtype(manifest["dtype"]).newbyteorder("<"), mode="r")
        yield np.diff(ends, prepend=0), tokens


def content_hashes(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each document's content: uint64 [documents]."""
    ends = np.cumsum(lengths).tolist()
    digests = b"".join(
        hashlib.blake2b(tokens[end - length : end].tobytes(), digest_size=8).digest()
        for length, end in zip(lengths.tolist(), ends, strict=True)
    )
    return np.frombuffer(digests, dtype="<u8")


def lengths_picture(found: dict) -> str:
    """Draw the histogram of document lengths as SVG."""
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
