"""Parses the flags after a recipe's name. They are about one run; what changes the trained model belongs to the recipe."""

from __future__ import annotations

import argparse


def parse_flags(name: str) -> argparse.Namespace:
    """Parse the command line of the recipe `name`; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=f"Train the recipe {name!r}. Flags are about this run only.")
    parser.add_argument("--out-dir", default=f"runs/{name}", help="the run directory (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="resume from the newest intact checkpoint in --out-dir")
    parser.add_argument("--resume-step", type=int, metavar="N", help="resume from this checkpoint; later ones are set aside")
    parser.add_argument(
        "--accept",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD",
        help="resume although these fields of the recipe changed, which changes the mathematics or the order of the data",
    )
    parser.add_argument(
        "--skip", type=_sequence_range, action="append", default=[], metavar="START:STOP", help="skip these sequences"
    )
    parser.add_argument("--max-steps", type=int, help="stop after this step; schedules keep the recipe's own length")
    parser.add_argument(
        "--trace-steps", type=_step_range, default=range(0), metavar="FIRST:STOP", help="record every span of these steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print what would run, and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run: how many GPUs")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    flags = parser.parse_args()
    if flags.world_size and not flags.dry_run:
        parser.error("--world-size is for --dry-run; a run's world size comes from its launcher")
    if flags.max_steps is not None and flags.max_steps < 1:
        parser.error(f"--max-steps={flags.max_steps} must be at least 1")
    flags.skip = tuple(flags.skip)
    flags.resume = flags.resume or flags.resume_step is not None
    return flags


def _sequence_range(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected START:STOP with START < STOP, sequences counted from 0")
    return int(start), int(stop)


def _step_range(text: str) -> range:
    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit() and 1 <= int(first) < int(stop)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FIRST:STOP with FIRST < STOP, steps counted from 1; STOP is left out"
        )
    return range(int(first), int(stop))
