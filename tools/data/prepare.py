"""Tokenizes text into shards: reads, splits by document hash, encodes on all cores, writes what the data loader reads.

    python -m tools.data prepare INPUT... --tokenizer T --out DIR
    python -m tools.data prepare INPUT... --train-tokenizer 32000 --out DIR

Stopped at any moment, even by kill -9, the same command continues and ends with the same bytes; once finished, it does nothing.
dataset.json is written last: without it DIR is not prepared data. Runs on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from recipes.common.config.json_files import JsonError, laid_out, read_json, write_json
from recipes.common.data.shards import FORMAT, VERSION, read_manifest, tokenizer_hash
from recipes.common.run_dir.lease import held
from tools.common.console import GOOD, UsageError, as_usage_error, printable
from tools.data.dedup import find_duplicates, hashes_path
from tools.data.encoders import FAST, REFERENCE, choose_encoder, reference_tokenizer
from tools.data.inputs import Choice, InputFile, list_files, plan_units
from tools.data.shard_writer import SPLITS, Job, Work, files_listing, hash_unit, write_unit
from tools.data.tokenizer import check_knows, end_token, file_hashes, make_tokenizer, sample_texts
from tools.data.tokenizer_file import find_tokenizer
from tools.data.workers import do_all

_OF_UNIT = ("shards", "counts", "sources", "skipped")  # what `write_unit` records
CHECK_BYTES = 2 << 20  # text on which a fast encoder must equal the reference before the run
MAX_SEQ_LEN = 1 << 24  # of --best-fit: each unit is padded to a whole number of sequences, in memory
SHARD_FILE = re.compile(r"(train|validation)_\d{5,}\.(bin|ends|origins)")
INPUT_HELP = """text, JSON (lines, arrays or objects: .jsonl, .ndjson, .json), all also .gz, .zst, .xz or .bz2; Parquet, a
folder of those, a dataset saved by `datasets`, or hub:NAME[:CONFIG[:SPLIT]] (streamed)"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the folder to write; within an INPUT, it is left out"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", help="Hugging Face tokenizer folder or name, tokenizer.json or SentencePiece .model")
    which.add_argument("--train-tokenizer", type=int, metavar="N", help="train a SentencePiece BPE of N pieces")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, metavar="F", help="share of documents held out (default: %(default)s)"
    )
    parser.add_argument(
        "--suffix", action="append", metavar="END", default=[], help="only files with this ending, read as text; repeatable"
    )
    parser.add_argument("--exclude", nargs="*", default=[], metavar="NAME", help="folder names to leave out at any depth")
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="the JSON field or table column with the document (default: %(default)s)",
    )
    parser.add_argument("--json-as-text", action="store_true", help="take a .json file as a text, not as objects with a text")
    parser.add_argument("--each-line", action="store_true", help="take each line of a text file, not the file, as a document")
    parser.add_argument(
        "--bad", choices=("fail", "skip"), default="fail", help="what to do with unreadable documents (default: %(default)s)"
    )
    parser.add_argument("--dedup", action="store_true", help="keep only the first of documents with equal text")
    parser.add_argument(
        "--best-fit",
        type=int,
        default=0,
        metavar="SEQ_LEN",
        help="pack the train split into sequences of SEQ_LEN tokens so that few documents are split",
    )
    parser.add_argument(
        "--encoder", choices=("auto", FAST, REFERENCE), default="auto", help="all give the same ids (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: one a core)"
    )


@as_usage_error(OSError, ValueError)
def run(args: argparse.Namespace) -> int:
    summary = prepare(args)
    print(json.dumps(summary) if args.json else summary_text(summary))
    return GOOD


def prepare(args: argparse.Namespace) -> dict:
    """Prepare the data and return the summary (see `summarise`). Mistakes in the command raise before anything is written."""
    if not 0 <= args.validation_fraction < 1:
        raise UsageError(f"--validation-fraction {args.validation_fraction}: must be in [0, 1)")
    if not 0 <= args.best_fit <= MAX_SEQ_LEN:
        raise UsageError(f"--best-fit {args.best_fit}: must be a sequence length of at most {MAX_SEQ_LEN} tokens, or 0")
    if args.workers < 1:
        raise UsageError(f"--workers {args.workers}: must be at least 1")
    choice = Choice(
        suffixes=tuple(args.suffix),
        excluded=tuple(args.exclude),
        text_key=args.text_key,
        each_line=args.each_line,
        json_as_text=args.json_as_text,
        skip_bad=args.bad == "skip",
        out=args.out,
    )
    files, left_out = list_files(args.inputs, choice)
    for line in left_out:
        print(printable(line), file=sys.stderr)
    fingerprint = inputs_fingerprint(args, files)
    manifest = prepared_already(args.out, fingerprint)
    if manifest is not None and not (args.out / "unfinished").exists():  # the disk may be read-only now
        return summarise(args.out, manifest, left_out, already=True)
    with held(args.out, args.out.absolute().parent, f".{args.out.name}.lease", "a preparation"):
        manifest = prepared_already(args.out, fingerprint)
        already = manifest is not None
        if manifest is None:
            (args.out / "unfinished").mkdir(parents=True, exist_ok=True)
            clear_leftovers(args.out, fingerprint)
            manifest = run_units(args, files, fingerprint)
        shutil.rmtree(args.out / "unfinished", ignore_errors=True)
    return summarise(args.out, manifest, left_out, already=already)


def prepared_already(out: Path, fingerprint: str) -> dict | None:
    """Return the manifest of finished data in `out`; None where there is none. Raises UsageError for anything else in it."""
    finished = out / "dataset.json"
    if finished.is_file():
        try:
            manifest = read_manifest(out)
        except ValueError as error:
            raise UsageError(f"{error}, but first delete {out} or choose another --out") from None
        if manifest.get("inputs_hash") == fingerprint:
            return manifest
        raise UsageError(f"{out} holds data prepared from other inputs or options; choose another --out or delete it")
    if out.exists() and not (out / "unfinished").is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} holds other files; choose a new folder")
    return None


def inputs_fingerprint(args: argparse.Namespace, files: list[InputFile]) -> str:
    """Hash what the output depends on: the options, the tokenizer's files, and each input's path, size and time."""
    digest = hashlib.sha256()
    tokenizer = args.tokenizer and file_hashes(find_tokenizer(args.tokenizer))
    options = [FORMAT, VERSION, tokenizer, args.train_tokenizer, args.validation_fraction, args.text_key, args.bad]
    options += [args.dedup, args.best_fit]
    digest.update(json.dumps(options).encode())
    for file in files:
        digest.update(json.dumps(asdict(file)).encode())
    return "sha256:" + digest.hexdigest()


def clear_leftovers(out: Path, fingerprint: str) -> None:
    """Keep what an interrupted run of the same command finished; delete half-written files, or all if inputs changed."""
    state = out / "unfinished" / "inputs.json"
    if not state.is_file() or read_kept(state, ["inputs_hash"], "starts over")["inputs_hash"] != fingerprint:
        leftovers = [path for split in SPLITS for path in out.glob(f"{split}_*.*") if SHARD_FILE.fullmatch(path.name)]
        if state.is_file():
            print("inputs or options changed since the last run: starting over", file=sys.stderr)
        for path in [*leftovers, *(out / "unfinished").glob("*_*.*")]:
            path.unlink()
        for folder in (out / "tokenizer", out / "unfinished" / "drops"):
            shutil.rmtree(folder, ignore_errors=True)
        write_json(state, {"inputs_hash": fingerprint})
    for path in [*(out / "unfinished").glob("*.part"), *out.glob(".dataset.json.*")]:  # the latter: half a manifest
        if path.is_file():
            path.unlink()


def read_kept(path: Path, keys: Sequence[str], then: str) -> dict:
    """Return a JSON file that an interrupted run left, with these keys.

    Raises UsageError with the cure: without the file, the same command `then`.
    """
    try:
        found = read_json(path)
        with laid_out(path):
            return {key: found[key] for key in keys}
    except JsonError as error:
        raise UsageError(f"{error}; delete this file, and the same command {then}") from None


def run_units(args: argparse.Namespace, files: list[InputFile], fingerprint: str) -> dict:
    """Write the tokenizer, every missing unit, and the manifest; return the manifest."""
    units = plan_units(files)
    found = find_tokenizer(args.tokenizer) if args.tokenizer else None
    folder = args.out / "tokenizer"
    make_tokenizer(folder, found, args.train_tokenizer, files, units, args.text_key)
    job, vocab_size = make_job(args, folder, found, sample_texts(files, units, args.text_key, CHECK_BYTES))
    works = [
        Work(number=number, ranges=unit, files={part.file: files[part.file] for part in unit})
        for number, unit in enumerate(units)
    ]
    if args.dedup and not (args.out / "unfinished" / "drops").is_dir():
        do_all(hash_unit, job, left_to_do(works, args.out, hashes_path), args.workers, "finding duplicates")
        find_duplicates(args.out, len(units))
    do_all(write_unit, job, left_to_do(works, args.out, unit_record), args.workers, "encoding")
    records = [read_kept(unit_record(args.out, work.number), _OF_UNIT, "writes that unit again") for work in works]
    return write_manifest(args, files, records, job, vocab_size, fingerprint)


def make_job(args: argparse.Namespace, folder: Path, found: Path | None, sample: list[str]) -> tuple[Job, int]:
    """Return the job and the vocabulary size. folder: of the tokenizer in OUT; found: the file that it was made from, if any."""
    tokenizer_file = str(folder / "tokenizer.json")
    tokenizer = reference_tokenizer(tokenizer_file)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    check_knows(tokenizer, sample)
    encoder, why = choose_encoder(args.encoder, tokenizer_file, sample)
    print(f"encoder: {encoder}, {why}", file=sys.stderr)
    job = Job(
        out=str(args.out),
        tokenizer_file=tokenizer_file,
        eos_id=end_token(folder, tokenizer, found),
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        text_key=args.text_key,
        validation_fraction=args.validation_fraction,
        skip_bad=args.bad == "skip",
        encoder=encoder,
        best_fit=args.best_fit,
    )
    return job, vocab_size


def left_to_do(works: list[Work], out: Path, result: Callable[[Path, int], Path]) -> list[Work]:
    todo = [work for work in works if not result(out, work.number).is_file()]
    if len(todo) < len(works):
        print(f"continuing: {len(works) - len(todo)} of {len(works)} units are done", file=sys.stderr)
    return todo


def unit_record(out: Path, number: int) -> Path:
    return out / "unfinished" / f"unit_{number:05d}.json"


def write_manifest(
    args: argparse.Namespace, files: list[InputFile], records: list[dict], job: Job, vocab_size: int, fingerprint: str
) -> dict:
    """Write `files.jsonl`, `skipped.jsonl` and, last, the manifest `dataset.json`, and return it.

    It holds no times: the same input gives the same bytes.
    """
    splits = {}
    for split in SPLITS:
        shards = [record["shards"][split] for record in records if record["shards"][split]]
        splits[split] = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
        splits[split]["shards"] = shards
    if not splits["train"]["tokens"]:
        raise UsageError("the input holds no document for the train split")
    sources = []
    for number, name in enumerate(args.inputs):
        counted = [record["sources"].get(str(number), [0, 0]) for record in records]
        sources.append({"name": name, "documents": sum(x[0] for x in counted), "tokens": sum(x[1] for x in counted)})
    skipped = [line for record in records for line in record["skipped"]]
    counts = {key: sum(record["counts"][key] for record in records) for key in records[0]["counts"]}
    (args.out / "files.jsonl").write_text(files_listing(files), encoding="utf-8")
    (args.out / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in skipped), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": "tokenizer",
        "tokenizer_hash": tokenizer_hash(args.out / "tokenizer"),
        "vocab_size": vocab_size,
        "eos_id": job.eos_id,
        "dtype": job.dtype,
        "validation_fraction": args.validation_fraction,
        "sources": sources,
        "counts": counts,
        "packed_for": args.best_fit,
        "inputs_hash": fingerprint,
        "command": command(args),
        "splits": splits,
    }
    write_json(args.out / "dataset.json", manifest)
    return manifest


def command(args: argparse.Namespace) -> list[str]:
    """Return the arguments that decide what is written: not --out, --workers or --json."""
    words = [*args.inputs]
    words += ["--tokenizer", args.tokenizer] if args.tokenizer else ["--train-tokenizer", str(args.train_tokenizer)]
    words += ["--validation-fraction", str(args.validation_fraction), "--text-key", args.text_key, "--bad", args.bad]
    words += [word for suffix in args.suffix for word in ("--suffix", suffix)]
    words += ["--json-as-text"] if args.json_as_text else []
    words += ["--each-line"] if args.each_line else []
    words += ["--dedup"] if args.dedup else []
    words += ["--best-fit", str(args.best_fit)] if args.best_fit else []
    return words + (["--exclude", *args.exclude] if args.exclude else [])


def summarise(out: Path, manifest: dict, left_out: list[str], already: bool) -> dict:
    return {
        "out": str(out),
        "already": already,
        "vocab_size": manifest["vocab_size"],
        "dtype": manifest["dtype"],
        "splits": {
            split: {"tokens": found["tokens"], "documents": found["documents"], "shards": len(found["shards"])}
            for split, found in manifest["splits"].items()
        },
        "counts": manifest["counts"],
        "left_out": left_out,
    }


def summary_text(summary: dict) -> str:
    lines = [f"{summary['out']}: " + ("already prepared, nothing to do" if summary["already"] else "prepared")]
    lines.append(f"{'split':<12}{'tokens':>16}{'documents':>12}{'shards':>8}")
    for split, found in summary["splits"].items():
        lines.append(f"{split:<12}{found['tokens']:>16,}{found['documents']:>12,}{found['shards']:>8}")
    counts = summary["counts"]
    lines.append(f"vocabulary {summary['vocab_size']} ({summary['dtype']}), {counts['text_bytes'] / 1e6:.1f} MB of text")
    lines.append(
        f"left out: {counts['empty']} empty documents, {counts['duplicates']} duplicates, "
        f"{counts['bad']} unreadable (skipped.jsonl)"
    )
    if counts["padding_tokens"]:
        lines.append(f"best-fit packing: {counts['padding_tokens']:,} tokens of padding")
    return "\n".join(lines)
