"""Ask prepared data: what a step of a run read, whether a folder is whole, what is in it.

python -m tools.data show RUN --step 120 [--rank 3]              # documents, source, file, offset and text
python -m tools.data show RUN --sequences 4000:4008              # by sequences consumed, also ahead of the run
python -m tools.data check DIR                                   # checksums, bounds, token ids; exit 1 if it is not whole
python -m tools.data stats DIR                                   # lengths, sources, repeats, and a picture
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json

import numpy as np

from recipes.common.data.shards import read_manifest
from tools.data.check import check, lengths_picture, stats
from tools.data.lookup import LookupProblem, Run, describe, read_run, read_step

TEXT_SHOWN = 300  # characters of each document, unless --full


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.data", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="the documents of a step or of a range of sequences")
    show.add_argument("folder", type=Path, metavar="RUN", help="run directory, or prepared data with --seq-len and --seed")
    which = show.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="counts from 1, as in metrics.jsonl")
    which.add_argument("--sequences", metavar="A:B", help="sequences consumed before, up to B (exclusive)")
    show.add_argument("--rank", type=int, help="only what this data rank read of the step")
    show.add_argument("--seq-len", type=int, help="for prepared data without a run")
    show.add_argument("--seed", type=int, default=1234, help="for prepared data without a run")
    show.add_argument("--full", action="store_true", help="whole texts")
    for name, words in (("check", "whether a prepared folder is whole"), ("stats", "lengths, sources and repeats")):
        verb = verbs.add_parser(name, help=words)
        verb.add_argument("folder", type=Path, metavar="DIR", help="folder written by tools.data prepare")
        if name == "stats":
            verb.add_argument("--picture", type=Path, help="where to write it (default: DIR/lengths.svg)")
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["prepare"]:
        from tools.data import prepare

        return prepare.main(words[1:])
    args = parse_args(argv)
    try:
        return {"show": run_show, "check": run_check, "stats": run_stats}[args.verb](args)
    except (OSError, ValueError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 2


def run_show(args: argparse.Namespace) -> int:
    ranks = None
    if args.seq_len:
        read_manifest(args.folder)
        run = Run(data={str(args.folder): args.folder}, blend=None, seed=args.seed, seq_len=args.seq_len, skips=())
    else:
        run = read_run(args.folder)
    if args.sequences:
        start, stop = parse_range(args.sequences)
        consumed = np.arange(start, stop)
    else:
        step = read_step(args.folder, args.step)
        consumed = step.consumed + np.arange(step.seqs)
        ranks = np.arange(step.seqs) // step.micro_seqs % step.data_size
        if args.rank is not None:
            if not 0 <= args.rank < step.data_size:
                raise LookupProblem(f"--rank {args.rank}: the step ran on {step.data_size} data ranks")
            consumed, ranks = consumed[ranks == args.rank], ranks[ranks == args.rank]
    rows = describe(run, consumed)
    for number, row in enumerate(rows):
        row["rank"] = None if ranks is None else int(ranks[number])
    if args.json:
        print(json.dumps({"sequences": rows}))
    else:
        print("\n".join(show_lines(rows, args.full)))
    return 0


def parse_range(words: str) -> tuple[int, int]:
    try:
        start, stop = (int(word) for word in words.split(":"))
    except ValueError as error:
        raise LookupProblem(f"--sequences {words}: write two numbers, A:B") from error
    if not 0 <= start < stop:
        raise LookupProblem(f"--sequences {words}: A must be at least 0 and under B")
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


def run_check(args: argparse.Namespace) -> int:
    problems = check(args.folder)
    manifest = read_manifest(args.folder)
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    if args.json:
        print(json.dumps({"folder": str(args.folder), "tokens": tokens, "problems": problems}))
    elif problems:
        print(f"{args.folder}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems))
    else:
        print(f"{args.folder}: whole, {tokens:,} tokens: checksums, bounds, ids and tokenizer agree with the manifest")
    return 1 if problems else 0


def run_stats(args: argparse.Namespace) -> int:
    found = stats(args.folder)
    picture = args.picture or args.folder / "lengths.svg"
    picture.write_text(lengths_picture(found))
    found["picture"] = str(picture)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['documents']:,} documents, {found['tokens']:,} tokens in the train split")
    print(f"length: mean {found['mean_length']:.0f}, from {found['shortest']} to {found['longest']:,} tokens; {picture}")
    print(f"repeats: {found['repeated_documents']:.2%} of documents, {found['repeated_tokens']:.2%} of tokens")
    print(f"{'source (both splits)':<50}{'documents':>12}{'tokens':>18}")
    for source in found["sources"]:
        print(f"{source['name'][-48:]:<50}{source['documents']:>12,}{source['tokens']:>18,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
