"""Finds exact duplicates over all inputs; the first of equal documents stays. Memory is bounded by the bucket, not the input.

One pass hashes every document (128 bits), unit by unit; then buckets of hashes are sorted one after another, and each unit gets
the list of its documents to drop.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np

from recipes.common.checkpoint.files import sync

BUCKET_HASHES = 1 << 24  # sorted at once: about 1.5 GB at its peak
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


def hashes_path(out: Path, number: int) -> Path:
    return out / "unfinished" / f"hashes_{number:05d}.bin"


def drops_path(out: Path, number: int) -> Path:
    return out / "unfinished" / "drops" / f"{number:05d}.bin"


def document_hash(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=HASH.itemsize).digest()


def write_hashes(out: Path, number: int, hashes: list[bytes]) -> None:
    path = hashes_path(out, number)
    part = path.with_name(path.name + ".part")
    part.write_bytes(b"".join(hashes))
    sync(part)  # its name without its bytes, after a power cut, would be a unit without duplicates
    os.replace(part, path)


def find_duplicates(out: Path, num_units: int, bucket_hashes: int = BUCKET_HASHES) -> int:
    """Write the drop list of every unit from the hashes of all, and return the number of documents dropped."""
    folder = out / "unfinished" / "drops"
    if not folder.is_dir():
        part = folder.with_name("drops.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        sizes = [hashes_path(out, number).stat().st_size // HASH.itemsize for number in range(num_units)]
        buckets = max(-(-sum(sizes) // bucket_hashes), 1)
        for bucket in range(buckets):
            _drop_in_bucket(out, part, num_units, bucket, buckets)
        for path in part.iterdir():
            sync(path)
        os.rename(part, folder)
    return sum(path.stat().st_size for path in folder.iterdir()) // 8


def _drop_in_bucket(out: Path, part: Path, num_units: int, bucket: int, buckets: int) -> None:
    hashes, units, rows = [], [], []
    for number in range(num_units):
        found = np.fromfile(hashes_path(out, number), dtype=HASH)
        mine = np.flatnonzero(found["high"] % np.uint64(buckets) == bucket)
        hashes.append(found[mine])
        units.append(np.full(len(mine), number, dtype=np.uint32))
        rows.append(mine)
    all_hashes, all_units, all_rows = np.concatenate(hashes), np.concatenate(units), np.concatenate(rows)
    order = np.lexsort((all_hashes["low"], all_hashes["high"]))  # stable: equal hashes stay in input order
    ordered = all_hashes[order]
    drop = np.sort(order[1:][ordered[1:] == ordered[:-1]])
    for number in np.unique(all_units[drop]):
        with open(part / f"{number:05d}.bin", "ab") as file:
            file.write(all_rows[drop[all_units[drop] == number]].astype("<u8").tobytes())


def read_drops(out: Path, number: int) -> set[int]:
    """Return which documents of a unit to drop, by their number among its readable ones; none without --dedup."""
    path = drops_path(out, number)
    return set(np.fromfile(path, dtype="<u8").tolist()) if path.is_file() else set()
