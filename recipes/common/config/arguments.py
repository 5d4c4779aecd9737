"""Parses the flags after a recipe's name. They are about one run; what changes the trained model belongs to the recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets


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
    if not flags.out_dir:
        parser.error("--out-dir='' names no folder; give one, or leave the flag out")
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


def place_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (rank, number of ranks) as a launcher says them; (0, 1) where it says neither, or no number."""
    rank, world_size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    return int(rank) if rank.isdecimal() else 0, max(int(world_size), 1) if world_size.isdecimal() else 1


def launch_problems(environment: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the variables by which a launcher tells a rank its place; none are needed for a run alone."""
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    values = ", ".join(f"{name}={environment[name]}" for name in given)
    cure = f"unset {' '.join(given)} where they are left over from another launch, or start through a launcher, which sets all"
    numbers = {name: environment[name] for name in (*given, "MASTER_PORT") if name in environment}
    wrong = [f"{name}={value} is not a whole number from 0" for name, value in numbers.items() if not value.isdecimal()]
    if wrong:
        return [f"the environment: {'; '.join(wrong)}; {cure}"]
    if int(environment.get("WORLD_SIZE", "1")) == 1 and int(environment.get("RANK", "0")) == 0:
        return []
    missing = [name for name in PLACE if name not in environment]
    if missing:
        return [f"the environment has {values}, but no {', '.join(missing)}: the other ranks would be waited for; {cure}"]
    if not int(environment["RANK"]) < int(environment["WORLD_SIZE"]):
        return [f"the environment: RANK={environment['RANK']} is not below WORLD_SIZE={environment['WORLD_SIZE']}; {cure}"]
    return []
