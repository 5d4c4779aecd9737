"""One piece of work of tools.prepare_data: read documents, encode them, write the shards. Runs in a worker process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from recipes.common.shards import ORIGIN
from tools.data_input import Document, InputFile, Piece, read_piece

BATCH_BYTES = 4 << 20  # text encoded at once
SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every piece of work needs to know."""

    out: str
    tokenizer_file: str
    eos_id: int
    dtype: str
    text_key: str
    validation_fraction: float
    skip_bad: bool


class BadDocumentError(ValueError):
    """A document that cannot be read, and the user did not choose to skip those."""


class ShardFile:
    """The three files of one shard, under temporary names until `finish`."""

    def __init__(self, folder: Path, split: str, number: int, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, f"{split}_{number:05d}", dtype
        self.tokens = self.documents = 0
        self.files = {end: self._part(end).open("wb") for end in ("bin", "ends", "origins")}
        self.hashes = {end: hashlib.sha256() for end in self.files}

    def _part(self, end: str) -> Path:
        return self.folder / "unfinished" / f"{self.name}.{end}.part"

    def add(self, ids: list[np.ndarray], origins: np.ndarray) -> None:
        """Append documents: their ids, and ORIGIN records [documents]."""
        lengths = np.fromiter((len(document) for document in ids), dtype=np.uint64, count=len(ids))
        ends = np.cumsum(lengths, dtype=np.uint64) + np.uint64(self.tokens)
        self._write("bin", np.concatenate(ids).astype(self.dtype))
        self._write("ends", ends.astype("<u8"))
        self._write("origins", origins)
        self.tokens, self.documents = int(ends[-1]), self.documents + len(ids)

    def _write(self, end: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        self.files[end].write(raw)
        self.hashes[end].update(raw)

    def finish(self) -> dict | None:
        """Put the files in place; the shard's entry in the manifest, or None if there was nothing to write."""
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
    """A document's split follows from its text alone, so copies of a document are never in both."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") < fraction * 2**64


def encoder(tokenizer_file: str) -> Tokenizer:
    """The tokenizer as text needs it: control tokens written out in a document are ordinary text."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def write_unit(
    job: Job,
    number: int,
    files: Mapping[int, InputFile] | Sequence[InputFile],
    unit: list[Piece],
    tokenizer: Tokenizer,
    report: Callable[[int, int, int], None],
) -> dict:
    """Write the shards of one unit and its record, `unfinished/unit_<number>.json`: the record.

    `report(documents, text_bytes, input_bytes)` is told of progress. Raises BadDocumentError, or OSError (a full disk).
    """
    folder = Path(job.out)
    shards = {split: ShardFile(folder, split, number, job.dtype) for split in SPLITS}
    counts = {"documents": 0, "empty": 0, "bad": 0, "text_bytes": 0}
    tokens_by_source: dict[int, list[int]] = {}
    skipped: list[dict] = []
    left = sum(piece.stop - piece.start for piece in unit)
    for batch in _batches(_documents(job, files, unit, counts, skipped)):
        _write_batch(job, batch, tokenizer, shards, files, tokens_by_source)
        size = sum(len(raw) for _, _, raw in batch)
        counts["documents"] += len(batch)
        counts["text_bytes"] += size
        read = sum(document.bytes for _, document, _ in batch)
        left -= read
        report(len(batch), size, read)
    report(0, 0, left)  # what was no document of its own: blank lines, compressed files
    record = {
        "shards": {split: shards[split].finish() for split in SPLITS},
        "counts": counts,
        "sources": {str(source): counted for source, counted in sorted(tokens_by_source.items())},
        "skipped": skipped,
    }
    write_json(folder / "unfinished" / f"unit_{number:05d}.json", record)
    return record


def _documents(
    job: Job, files: list[InputFile], unit: list[Piece], counts: dict, skipped: list
) -> Iterator[tuple[int, Document, bytes]]:
    """(file, document, its UTF-8) of every document to keep; the others are counted and named."""
    for piece in unit:
        for document in read_piece(files[piece.file], piece, job.text_key):
            if document.text is None:
                where = f"{files[piece.file].path}, offset {document.offset}: {document.problem}"
                if not job.skip_bad:
                    raise BadDocumentError(f"{where}. Pass --bad skip to leave such documents out")
                counts["bad"] += 1
                skipped.append({"file": piece.file, "offset": document.offset, "problem": document.problem})
            elif not document.text:
                counts["empty"] += 1
            else:
                yield piece.file, document, document.text.encode("utf-8")


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


def _write_batch(job: Job, batch: list, tokenizer: Tokenizer, shards: dict, files: list, by_source: dict) -> None:
    encodings = tokenizer.encode_batch_fast([document.text for _, document, _ in batch], add_special_tokens=False)
    ids = [np.array([*encoding.ids, job.eos_id], dtype=job.dtype) for encoding in encodings]
    origins = np.zeros(len(batch), dtype=ORIGIN)
    split_of = np.zeros(len(batch), dtype=bool)
    for row, (file, document, raw) in enumerate(batch):
        source = files[file].source
        origins[row] = (file, source, document.offset)
        split_of[row] = is_validation(raw, job.validation_fraction)
        counted = by_source.setdefault(source, [0, 0])
        counted[0] += 1
        counted[1] += len(ids[row])
    for split, wanted in zip(SPLITS, (False, True), strict=True):
        rows = np.flatnonzero(split_of == wanted)
        if rows.size:
            shards[split].add([ids[row] for row in rows], origins[rows])


def write_json(path: Path, value: object) -> None:
    """Write by rename, after the bytes are on disk: readers see the whole file or none."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def files_listing(files: list[InputFile]) -> str:
    """`files.jsonl` of a prepared folder: line n describes file n of the origins."""
    return "".join(json.dumps(asdict(file)) + "\n" for file in files)
