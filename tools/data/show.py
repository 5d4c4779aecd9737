"""Prints the documents that a step of a run read, or those of a range of sequences: source, file, offset and text.

python -m tools.data show RUN --step 120 --rank 3
python -m tools.data show RUN --sequences 4000:4008                       # by sequences consumed, also ahead of the run
python -m tools.data show DIR --seq-len 2048 --sequences 0:4              # prepared data without a run
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from recipes.common.data.shards import read_manifest
from tools.common.console import GOOD, UsageError, as_usage_error, printable
from tools.data.lookup import DataOrder, describe, read_run, read_step

TEXT_SHOWN = 300  # characters of each document, unless --full


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run directory, or prepared data with --seq-len and --seed")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, metavar="N", help="counts from 1, as in metrics.jsonl")
    which.add_argument("--sequences", metavar="A:B", help="sequences by their place in the order, from A up to B (exclusive)")
    parser.add_argument("--rank", type=int, metavar="N", help="only what this data rank read of the step")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens in a sequence, for prepared data without a run")
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="seed of the order, for prepared data without a run (default: %(default)s)",
    )
    parser.add_argument("--full", action="store_true", help="print whole texts")


@as_usage_error(OSError, ValueError)
def run(args: argparse.Namespace) -> int:
    ranks = None
    if args.seq_len:
        read_manifest(args.folder)
        order = DataOrder(data={str(args.folder): args.folder}, blend=None, seed=args.seed, seq_len=args.seq_len, skips=())
    else:
        order = read_run(args.folder, args.step)
    if args.sequences:
        start, stop = parse_range(args.sequences)
        consumed = np.arange(start, stop)
    else:
        step = read_step(args.folder, args.step)
        consumed = step.consumed + np.arange(step.seqs)
        ranks = np.arange(step.seqs) // step.micro_seqs % step.data_size
        if args.rank is not None:
            if not 0 <= args.rank < step.data_size:
                raise UsageError(f"--rank {args.rank}: the step ran on {step.data_size} data ranks")
            consumed, ranks = consumed[ranks == args.rank], ranks[ranks == args.rank]
    rows = describe(order, consumed)
    for number, row in enumerate(rows):
        row["rank"] = None if ranks is None else int(ranks[number])
    if args.json:
        print(json.dumps({"sequences": rows}))
    else:
        print(printable("\n".join(show_lines(rows, args.full))))
    return GOOD


def parse_range(words: str) -> tuple[int, int]:
    try:
        start, stop = (int(word) for word in words.split(":"))
    except ValueError as error:
        raise UsageError(f"--sequences {words}: write two numbers, A:B") from error
    if not 0 <= start < stop:
        raise UsageError(f"--sequences {words}: A must be at least 0 and under B")
    return start, stop


def show_lines(rows: list[dict], full: bool) -> list[str]:
    lines = []
    for row in rows:
        rank = "" if row["rank"] is None else f"  data rank {row['rank']}"
        lines.append(f"sequence {row['sequence']}{rank}  position {row['position']} of {row['data']}")
        for found in row["documents"]:
            start, stop = found["tokens"]
            lines.append(
                f"  tokens {start}..{stop}: {found['file']}, {found['offset_in']} {found['offset']} "
                f"(from token {found['from']} of {found['of']}; source {found['source']})"
            )
            text = found["text"] if full or len(found["text"]) <= TEXT_SHOWN else found["text"][:TEXT_SHOWN] + " ..."
            lines += ["    | " + line for line in text.splitlines()]
    return lines
