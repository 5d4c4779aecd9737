"""Checks that a prepared folder is intact: checksums, document bounds, token ids, tokenizer; exit 1 if it is not."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recipes.common.data.shards import ORIGIN, Shard, read_manifest, split_shards, tokenizer_hash
from tools.common.console import FAILED, GOOD, as_usage_error, progress_bar

CHUNK_TOKENS = 1 << 24  # read at once


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder written by tools.data prepare")


@as_usage_error(OSError, ValueError)
def run(args: argparse.Namespace) -> int:
    problems = check(args.folder)
    manifest = read_manifest(args.folder)
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    if args.json:
        print(json.dumps({"folder": str(args.folder), "tokens": tokens, "problems": problems}))
    elif problems:
        print(f"{args.folder}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems))
    else:
        print(f"{args.folder}: intact, {tokens:,} tokens: checksums, bounds, ids and tokenizer agree with the manifest")
    return FAILED if problems else GOOD


def check(folder: Path) -> list[str]:
    """List everything wrong in a prepared folder, by file. Raises OSError or ValueError when it has no usable dataset.json."""
    manifest = read_manifest(folder)
    problems = []
    if tokenizer_hash(folder / "tokenizer") != manifest["tokenizer_hash"]:
        problems.append("tokenizer/tokenizer.json is not the tokenizer that made the shards")
    with open(folder / "files.jsonl", "rb") as file:
        num_files = sum(1 for _ in file)
    shards = [shard for split in manifest["splits"] for shard in split_shards(manifest, split)]
    total = sum(shard.tokens for shard in shards) * np.dtype(manifest["dtype"]).itemsize
    with progress_bar("checking", total) as bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # hashing releases the interpreter, so threads use all cores
        for shard, found in zip(shards, pool.map(lambda s: check_shard(folder, s, manifest, num_files), shards), strict=True):
            problems += found
            bar.update(shard.tokens * np.dtype(manifest["dtype"]).itemsize)
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
            problems.append(f"{path.name}: its checksum is not the manifest's: the file changed")
    ends = np.fromfile((folder / shard.file).with_suffix(".ends"), dtype="<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != shard.tokens:
        problems.append(f"{shard.file}: document bounds do not rise to {shard.tokens}")
        return problems
    tokens = np.memmap(folder / shard.file, dtype=dtype, mode="r")
    largest = max(int(tokens[at : at + CHUNK_TOKENS].max()) for at in range(0, shard.tokens, CHUNK_TOKENS))
    if largest >= manifest["vocab_size"]:
        problems.append(f"{shard.file}: holds id {largest}, the vocabulary has {manifest['vocab_size']}")
    open_ended = np.count_nonzero(tokens[ends - 1] != manifest["eos_id"])
    if open_ended and not manifest["packed_for"]:
        problems.append(f"{shard.file}: {open_ended} documents do not end with the end token")
    origins = np.fromfile((folder / shard.file).with_suffix(".origins"), dtype=ORIGIN)
    if origins["file"].max() >= num_files or origins["source"].max() >= len(manifest["sources"]):
        problems.append(f"{shard.file}: a document comes from a file or source that is not listed")
    return problems
