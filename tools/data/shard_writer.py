"""Does one unit of work of tools.data prepare, in a worker process: reads documents, encodes them, writes the shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from recipes.common.config.json_files import write_json
from recipes.common.data.shards import ORIGIN
from tools.common.console import UsageError
from tools.data.dedup import document_hash, read_drops, write_hashes
from tools.data.encoders import REFERENCE, Encode, first_difference, load_encoder
from tools.data.inputs import InputFile, InputRange
from tools.data.packing import pack
from tools.data.readers import Document, read_range

BATCH_BYTES = 4 << 20  # text encoded at once
SPOT_CHECK_BATCHES = 32  # one document in so many batches, and in each unit, is checked against the reference
SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of every unit of work."""

    out: str
    tokenizer_file: str
    eos_id: int
    dtype: str
    text_key: str
    validation_fraction: float
    skip_bad: bool
    encoder: str
    best_fit: int  # sequence length that the train split is packed for; 0: documents one after another


class ShardFile:
    """The three files of one shard, under temporary names until `finish`."""

    def __init__(self, folder: Path, split: str, number: int, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, f"{split}_{number:05d}", dtype
        self.tokens = self.documents = self.padding = 0
        self.kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.files = {end: self._part(end).open("wb") for end in ("bin", "ends", "origins")}
        self.hashes = {end: hashlib.sha256() for end in self.files}

    def _part(self, end: str) -> Path:
        return self.folder / "unfinished" / f"{self.name}.{end}.part"

    def add(self, tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray) -> None:
        """Append documents: their tokens [tokens], lengths [documents] and ORIGIN records [documents]."""
        ends = np.cumsum(lengths, dtype=np.uint64) + np.uint64(self.tokens)
        self._write("bin", tokens.astype(self.dtype))
        self._write("ends", ends.astype("<u8"))
        self._write("origins", origins)
        self.tokens, self.documents = int(ends[-1]), self.documents + len(lengths)

    def keep(self, tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray) -> None:
        """Collect documents for `finish` to pack: the unit's tokens stay in memory until then."""
        self.kept.append((tokens, lengths, origins))

    def _write(self, end: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        self.files[end].write(raw)
        self.hashes[end].update(raw)

    def finish(self, job: Job) -> dict | None:
        """Put the files in place and return the shard's entry in the manifest, or None if there was nothing to write."""
        if self.kept:
            tokens, lengths, origins = (np.concatenate(column) for column in zip(*self.kept, strict=True))
            packed = pack(tokens, lengths, origins, job.best_fit, job.eos_id)
            self.padding = len(packed[0]) - len(tokens)
            self.add(*packed)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for end in self.files:
            if self.documents:
                os.replace(self._part(end), self.folder / f"{self.name}.{end}")
            else:
                self._part(end).unlink()
        if not self.documents:
            return None
        checksums = {f"{self.name}.{end}": f"sha256:{value.hexdigest()}" for end, value in self.hashes.items()}
        return {
            "file": f"{self.name}.bin",
            "tokens": self.tokens,
            "documents": self.documents,
            "checksums": checksums,
        }


def is_validation(text: bytes, fraction: float) -> bool:
    """Choose the split by the document's text alone, so that copies of a document are never in both."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") < fraction * 2**64


class Progressed(Protocol):
    def __call__(self, documents: int, text_bytes: int, input_bytes: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """One unit: its number, its ranges, and their files by number."""

    number: int
    ranges: list[InputRange]
    files: Mapping[int, InputFile]


class Encoders:
    """The encoder of a job and, if that is not the reference, the reference to check it against."""

    def __init__(self, job: Job) -> None:
        self.encode = load_encoder(job.encoder, job.tokenizer_file)
        self.reference = None if job.encoder == REFERENCE else load_encoder(REFERENCE, job.tokenizer_file)


def hash_unit(job: Job, work: Work, encoders: Encoders, report: Progressed) -> None:
    """Write the hashes of a unit's readable documents, for tools.data.dedup."""
    hashes = []
    left = sum(part.bytes for part in work.ranges)
    for _, document, raw in _documents(job, work, {"bad": 0, "empty": 0}, []):
        hashes.append(document_hash(raw))
        left -= document.bytes
        report(1, len(raw), document.bytes)
    report(0, 0, left)
    write_hashes(Path(job.out), work.number, hashes)


def write_unit(job: Job, work: Work, encoders: Encoders, report: Progressed) -> None:
    """Write the shards of one unit and, last, its record `unfinished/unit_<number>.json`.

    Raises UsageError, or OSError (a full disk).
    """
    folder = Path(job.out)
    shards = {split: ShardFile(folder, split, work.number, job.dtype) for split in SPLITS}
    counts = {"documents": 0, "empty": 0, "bad": 0, "duplicates": 0, "text_bytes": 0}
    by_source: dict[int, np.ndarray] = {}
    skipped: list[dict] = []
    left = sum(part.bytes for part in work.ranges)
    drops = read_drops(folder, work.number)
    documents = _documents(job, work, counts, skipped)
    for number, batch in enumerate(_batches(_without(documents, drops, counts))):
        if number % SPOT_CHECK_BATCHES == 0 and encoders.reference is not None:
            _spot_check(job, work, batch, encoders)
        _write_batch(job, work, batch, encoders.encode, shards, by_source)
        size = sum(len(raw) for _, _, raw in batch)
        counts["documents"] += len(batch)
        counts["text_bytes"] += size
        read = sum(document.bytes for _, document, _ in batch)
        left -= read
        report(len(batch), size, read)
    entries = {split: shards[split].finish(job) for split in SPLITS}
    counts["padding_tokens"] = sum(shard.padding for shard in shards.values())
    record = {
        "shards": entries,
        "counts": counts,
        "sources": {str(source): counted.tolist() for source, counted in sorted(by_source.items())},
        "skipped": skipped,
    }
    write_json(folder / "unfinished" / f"unit_{work.number:05d}.json", record)
    report(0, 0, left)  # input not counted by documents: blank lines, compressed files


def _documents(job: Job, work: Work, counts: dict[str, int], skipped: list[dict]) -> Iterator[tuple[int, Document, bytes]]:
    """Yield (file, document, its UTF-8) of every readable document; count and list the others."""
    for part in work.ranges:
        file = work.files[part.file]
        for document in read_range(file, part, job.text_key):
            if document.text is None:
                if not job.skip_bad:
                    where = f"{file.path}, offset {document.offset}: {document.problem}"
                    raise UsageError(f"{where}. Pass --bad skip to leave such documents out")
                counts["bad"] += 1
                skipped.append({"file": part.file, "offset": document.offset, "problem": document.problem})
            elif not document.text:
                counts["empty"] += 1
            else:
                yield part.file, document, document.text.encode("utf-8")


def _without(documents: Iterator[tuple], drops: set[int], counts: dict[str, int]) -> Iterator[tuple]:
    for number, document in enumerate(documents):
        if number in drops:
            counts["duplicates"] += 1
        else:
            yield document


def _batches(documents: Iterator[tuple]) -> Iterator[list[tuple]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _spot_check(job: Job, work: Work, batch: list[tuple], encoders: Encoders) -> None:
    """Compare the encoders on one document, at a place of the batch that differs between units."""
    file, document, _ = batch[work.number % len(batch)]
    if first_difference(encoders.encode, encoders.reference, [document.text]) is not None:
        raise UsageError(
            f"{work.files[file].path}, offset {document.offset}: {job.encoder} and {REFERENCE} give different ids; "
            f"run again with --encoder {REFERENCE}"
        )


def _write_batch(job: Job, work: Work, batch: list, encode: Encode, shards: dict, by_source: dict) -> None:
    """Encode documents, end each with the end token, and append it to the shard of its split."""
    ids, offsets = encode([document.text for _, document, _ in batch])
    lengths = np.diff(offsets) + 1
    tokens = np.insert(ids, offsets[1:], job.eos_id)
    origins = np.zeros(len(batch), dtype=ORIGIN)
    origins["file"] = [file for file, _, _ in batch]
    origins["source"] = [work.files[file].source for file, _, _ in batch]
    origins["offset"] = [document.offset for _, document, _ in batch]
    for source in np.unique(origins["source"]).tolist():
        mine = origins["source"] == source
        counted = by_source.setdefault(source, np.zeros(2, dtype=np.int64))
        counted += (np.count_nonzero(mine), lengths[mine].sum())
    held_out = np.array([is_validation(raw, job.validation_fraction) for _, _, raw in batch])
    for split, rows in zip(SPLITS, (~held_out, held_out), strict=True):
        take = shards[split].keep if job.best_fit and split == "train" else shards[split].add
        if rows.all():
            take(tokens, lengths, origins)
        elif rows.any():
            take(tokens[np.repeat(rows, lengths)], lengths[rows], origins[rows])


def files_listing(files: list[InputFile]) -> str:
    """Return the text of `files.jsonl`, whose line n describes file n of the origins."""
    return "".join(json.dumps(asdict(file)) + "\n" for file in files)
