"""Reads the token shards that `tools.data prepare` writes, as packed sequences. Needs numpy only.

On disk (folder DIR): `dataset.json`, written last, and for every shard `<split>_<number>.bin` (token ids, uint16 or
uint32 little-endian, documents one after another, each closed by the end token), `.ends` (uint64: where each document
ends, in tokens from the start of the shard) and `.origins` (file, source, offset of each document). A split is the
concatenation of its shards; position p is its tokens [p * S, p * S + S], S + 1 of them: labels are the shift by one.
Nothing here is proportional to the data, in memory or at start-up: shards are mapped when first read.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.common.config.inside import leads_out
from recipes.common.config.json_files import JsonError, read_json
from recipes.common.data.reading import NOTHING_READ, Reading, SourceOrder

FORMAT = "trifold-tokens"
VERSION = 1
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")
ORIGIN = np.dtype([("file", "<u4"), ("source", "<u4"), ("offset", "<u8")])  # one per document, in `.origins`
MAX_OPEN_SHARDS = 256  # a map keeps a file descriptor, and 1024 is a common limit
CURE = "run tools.data prepare again"


@dataclass(frozen=True, kw_only=True)
class Shard:
    file: str
    tokens: int
    documents: int
    checksums: dict[str, str]  # file name -> "sha256:...", for the .bin, .ends and .origins files


class TokenStream:
    """One split as packed sequences of `seq_len + 1` tokens. Safe to read from several threads."""

    def __init__(
        self,
        folder: Path,
        split: str,
        seq_len: int,
        dtype: str,
        shards: list[Shard],
        *,
        reading: Reading = NOTHING_READ,
        start_seqs: int = 0,
    ) -> None:
        """reading, start_seqs: where the present order begins (recipes.common.data.reading.Order)."""
        self.folder, self.split, self.seq_len = folder, split, seq_len
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards = shards
        self.starts = np.cumsum([0] + [shard.tokens for shard in shards], dtype=np.int64)  # [shards + 1]
        self.num_tokens = int(self.starts[-1])
        self.num_positions = max(self.num_tokens - 1, 0) // seq_len
        self.order, self._start_seqs = SourceOrder(self.num_positions, seq_len, reading), start_seqs
        self._maps: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Read the tokens at `positions` (int64 [k], each in [0, num_positions)): int64 [k, seq_len + 1]."""
        positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        if positions.size and not (positions.min() >= 0 and positions.max() < self.num_positions):
            raise IndexError(f"positions from {positions.min()} to {positions.max()} of {self.num_positions} in {self.folder}")
        out = np.empty((len(positions), self.seq_len + 1), dtype=np.int64)
        begins = positions * self.seq_len
        shards = np.searchsorted(self.starts, begins, side="right") - 1
        offsets = begins - self.starts[shards]
        width = self.seq_len + 1
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            tokens = self._maps.get(shard)
            if tokens is None:
                tokens = self._map(shard)
            piece = tokens[offset : offset + width]
            if len(piece) == width:
                out[row] = piece
            else:
                self._read_across(shard, piece, out[row])
        return out

    def locate(self, seed: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, position) of the sequences `index` of a run: int64 [k] each. There is one source, 0."""
        positions = self.order.positions(seed, np.atleast_1d(np.asarray(index, dtype=np.int64)) - self._start_seqs)
        return np.zeros_like(positions), positions

    def read_sequences(self, seed: int, index: np.ndarray) -> np.ndarray:
        """Read the sequences `index` of a run: int64 [k, seq_len + 1]."""
        return self.read(self.locate(seed, index)[1])

    def _read_across(self, shard: int, piece: np.ndarray, out: np.ndarray) -> None:
        """Fill one sequence that starts with `piece` at the end of `shard` and continues in the next ones."""
        done = len(piece)
        out[:done] = piece
        while done < len(out):
            shard += 1
            piece = self._map(shard)[: len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def _map(self, shard: int) -> np.ndarray:
        with self._lock:
            if shard in self._maps:
                return self._maps[shard]
            path = self.folder / self.shards[shard].file
            expected = self.shards[shard].tokens * self.dtype.itemsize
            if path.stat().st_size != expected:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, dataset.json says {expected}: "
                    f"the shard changed since it was written; {CURE}"
                )
            if len(self._maps) >= MAX_OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            self._maps[shard] = np.asarray(np.memmap(path, dtype=self.dtype, mode="r"))
            return self._maps[shard]


def read_manifest(folder: Path) -> dict:
    """Read `dataset.json` of a finished preparation. Raises FileNotFoundError or ValueError with the cure."""
    path = folder / "dataset.json"
    if not path.is_file():
        state = "was not finished" if (folder / "unfinished").is_dir() else "does not exist"
        raise FileNotFoundError(f"{path}: the preparation {state}; {CURE}")
    manifest = _read(path)
    kind = (manifest.get("format"), manifest.get("version"))
    if kind != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {kind}, this version reads {(FORMAT, VERSION)}; {CURE}")
    try:
        problem = _manifest_problem(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        problem = repr(error)
    if problem:
        raise ValueError(f"{path} is not a manifest of tools.data prepare ({problem}); {CURE}")
    return manifest


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except JsonError as error:
        raise ValueError(f"{path} is not a manifest of tools.data prepare ({error}); {CURE}") from None


def _manifest_problem(folder: Path, manifest: dict) -> str:
    """Return which value of a manifest is none that tools.data prepare writes, or leads to another folder; "" if none."""
    counts = {key: manifest[key] for key in ("vocab_size", "eos_id")}
    for split in SPLITS:
        entry = manifest["splits"][split]
        counts |= {f"{split}.{key}": entry[key] for key in ("tokens", "documents")}
        for shard in split_shards(manifest, split):
            if why := leads_out(shard.file):
                return why
            counts |= {f"{key} of {shard.file}": getattr(shard, key) for key in ("tokens", "documents")}
            if not isinstance(shard.checksums, dict):
                return f"checksums of {shard.file}"
    wrong = [f"{key}={n!r}" for key, n in counts.items() if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 63]
    if manifest["dtype"] not in DTYPES or not isinstance(manifest["tokenizer_hash"], str):
        return f"dtype={manifest['dtype']!r}, tokenizer_hash={manifest['tokenizer_hash']!r}"
    return wrong[0] if wrong else ""


def data_identity(folder: Path) -> str:
    """Return the identity that a run records of its data: equal as long as no shard, tokenizer or count changed."""
    return "sha256:" + hashlib.sha256((folder / "dataset.json").read_bytes()).hexdigest()


def split_shards(manifest: dict, split: str) -> list[Shard]:
    return [Shard(**shard) for shard in manifest["splits"][split]["shards"]]


def open_split(folder: Path, split: str, seq_len: int, *, reading: Reading = NOTHING_READ, start_seqs: int = 0) -> TokenStream:
    """Open "train" or "validation" of a prepared folder, for sequences of `seq_len` tokens and their labels."""
    manifest = read_manifest(folder)
    shards = split_shards(manifest, split)
    return TokenStream(folder, split, seq_len, manifest["dtype"], shards, reading=reading, start_seqs=start_seqs)


def tokenizer_hash(tokenizer: Path) -> str:
    """Hash the parts of a Hugging Face tokenizer folder that turn text into ids, so that a re-saved copy has the same hash."""
    content = read_json(tokenizer / "tokenizer.json")
    for key in ("padding", "truncation", "post_processor"):  # not used on shards; transformers adds an empty one
        content.pop(key, None)
    model = content.get("model", {})
    if isinstance(model, dict) and isinstance(model.get("merges"), list):  # older files have "a b", newer ones ["a", "b"]
        model["merges"] = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in model["merges"]]
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def _shard_problems(folder: Path, manifest: dict) -> list[str]:
    problems = []
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for split in manifest["splits"]:
        for shard in split_shards(manifest, split):
            path = folder / shard.file
            expected = shard.tokens * itemsize
            if not path.is_file():
                problems.append(f"data={folder}: shard {shard.file} is missing; {CURE}")
            elif not os.access(path, os.R_OK):
                problems.append(f"data={folder}: shard {shard.file} may not be read by this user; change its permissions")
            elif path.stat().st_size != expected:
                size = path.stat().st_size
                problems.append(f"data={folder}: shard {shard.file} has {size} bytes, dataset.json says {expected}; {CURE}")
    return problems


def data_problems(
    folder: Path,
    *,
    seq_len: int,
    vocab_size: int,
    tokenizer: Path | None,
    needs_validation: bool,
    validation_seqs: int = 1,
) -> list[str]:
    """Return everything that keeps a prepared folder from feeding a recipe, one line each."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"data={folder}: {error}"]
    problems = _shard_problems(folder, manifest)
    if manifest["vocab_size"] > vocab_size:
        problems.append(
            f"model.vocab_size={vocab_size} is smaller than the {manifest['vocab_size']} ids of the tokenizer that "
            f"made data={folder}; raise model.vocab_size or prepare the data with a smaller tokenizer"
        )
    if tokenizer is not None:
        try:
            found = tokenizer_hash(tokenizer)
        except (OSError, ValueError) as error:
            problems.append(f"tokenizer={tokenizer}: no readable tokenizer.json ({error}); use {folder / 'tokenizer'}")
        else:
            if found != manifest["tokenizer_hash"]:
                problems.append(
                    f"tokenizer={tokenizer} ({found[:19]}) is not the one that made data={folder} "
                    f"({manifest['tokenizer_hash'][:19]}); use {folder / 'tokenizer'} or prepare the data again"
                )
    packed_for = manifest.get("packed_for", 0)
    if packed_for not in (0, seq_len):
        problems.append(
            f"batch.seq_len={seq_len}: data={folder} is packed for sequences of {packed_for} tokens (--best-fit); "
            f"set batch.seq_len={packed_for} or prepare the data again"
        )
    wanted = {"train": 1} | ({"validation": validation_seqs} if needs_validation else {})
    for split, seqs in wanted.items():
        tokens = manifest["splits"][split]["tokens"]
        if max(tokens - 1, 0) // seq_len < seqs:
            cure = "lower batch.seq_len or prepare more data"
            if split == "validation":
                cure = "lower evaluation.seqs or batch.seq_len, or prepare with a larger --validation-fraction"
            problems.append(
                f"batch.seq_len={seq_len}: the {split} split of data={folder} has {tokens} tokens, "
                f"{seqs * seq_len + 1} are needed for {seqs} sequence{'s' * (seqs > 1)}; {cure}"
            )
    return problems
