"""Check every host and rank of a job before it trains: code, storage, data, devices, links. Under a minute at 64 ranks.

    python -m tools.preflight recipes/quickstart.py --processes 8          # this machine, 8 ranks that it starts itself
    deepspeed --hostfile HOSTS tools/preflight recipes/llama_8b.py --out-dir /ckpt/llama_8b
    torchrun ... tools/preflight RECIPE --out-dir DIR                   # as a recipe is started; srun with RANK set as well

It is started like a recipe, with the same flags (those of the run are accepted and ignored). Prints every rank, the slowest
first, and all problems with their cures. Exit 0: passed; 1: a host, rank or link is bad; 2: the recipe or the flags are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from copy import deepcopy
from importlib import import_module
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from recipes.common.recipe import Layout, Recipe, RecipeError
from recipes.common.runtime.network import choose_interface
from tools.common.console import FAILED, MISTAKE, CheckError, UsageError
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.recipe_io import load_recipe
from tools.preflight.coordinator import coordinate, release
from tools.preflight.problems import Problem
from tools.preflight.rank_checks import run_checks
from tools.preflight.rendezvous import Rendezvous, announce, collect, join, this_rank
from tools.preflight.report import PreflightReport, as_text, write_report
from tools.supervise.hosts import host_key

STEPS = 8  # each ends within --step-seconds
RUN_FLAGS = ("--skip", "--max-steps", "--resume-step", "--trace-steps", "--local_rank", "--local-rank")  # accepted and ignored


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.preflight", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="path of a recipe file")
    parser.add_argument("--out-dir", help="the run directory: its space, speed and sharing are checked (default: the recipe's)")
    parser.add_argument("--processes", type=int, help="start this many ranks on this machine, without a launcher")
    parser.add_argument("--hosts", type=_hosts, default=[], metavar="A:8,B:8", help="hosts in order, with the ranks on each")
    parser.add_argument(
        "--join-seconds", type=float, default=120.0, help="report ranks that have not joined by then (%(default)s)"
    )
    parser.add_argument(
        "--step-seconds", type=float, default=60.0, help="report a step that takes longer as hanging (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--json-file", type=Path, metavar="PATH", help="also write the report there")
    for flag in RUN_FLAGS:
        parser.add_argument(flag, action="append", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    for name in ("processes", "join_seconds", "step_seconds"):
        value = getattr(flags, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}={value} must be over 0")
    if flags.processes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(f"--processes={flags.processes}, but a launcher started this rank (WORLD_SIZE is set); use one of the two")
    return flags


def _hosts(text: str) -> list[tuple[str, int]]:
    """Parse A:8,B:8 into [(host, ranks, or 0 if not given), ...]."""
    found = []
    for item in text.split(","):
        host, colon, count = item.partition(":")
        if not host or (colon and not (count.isdigit() and int(count))):
            raise argparse.ArgumentTypeError(f"{item!r} is not HOST or HOST:RANKS")
        found.append((host, int(count or 0)))
    if len({host_key(host) for host, _ in found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a host twice")
    return found


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    if not flags.processes:
        code, _ = run_rank(flags)
    else:
        import_module("recipes.common.train")  # imported before the fork, so that no rank pays for it
        limit = flags.join_seconds + STEPS * flags.step_seconds
        try:
            code, text = run_ranks(run_rank, flags.processes, flags, timeout_seconds=limit)[0]
        except RankError as error:
            print(f"failed: {error}", file=sys.stderr)
            return FAILED
        _show(code, text)
    return code


def _show(code: int, text: str) -> None:
    print(text, file=sys.stderr if code == MISTAKE else sys.stdout, flush=True)


def run_rank(flags: argparse.Namespace) -> tuple[int, str]:
    """Run this rank's part; return (exit code, rank 0's text). A rank that was not forked prints the text itself."""
    me, rendezvous = this_rank(os.environ), None
    choose_interface()  # as training does
    try:
        rendezvous = join(me, os.environ, join_seconds=flags.join_seconds, limit_seconds=flags.step_seconds)
        if me.rank != 0:
            return run_checks(rendezvous, me, flags.recipe, flags.join_seconds + STEPS * flags.step_seconds), ""
        result = _examine(rendezvous, flags)
    except CheckError as error:
        if me.rank != 0:
            print(f"failed: {error}", file=sys.stderr)
            return FAILED, ""
        result = _early_report(flags, FAILED, Problem(check="joining", message=str(error), cure="then start again"))
    if flags.json_file is not None:
        try:
            write_report(result, flags.json_file)
        except OSError as error:
            print(f"preflight: cannot write {flags.json_file}: {error}", file=sys.stderr)
    text = json.dumps(result.as_json()) if flags.json else as_text(result)
    if result.exit_code == MISTAKE:
        text = f"error: {result.problems[0].message}"
    if not flags.processes:
        _show(result.exit_code, text)  # before the others exit: a launcher ends all ranks with the first that fails
    if rendezvous is not None:
        release(rendezvous, result.exit_code)
    return result.exit_code, text


def _examine(rendezvous: Rendezvous, flags: argparse.Namespace) -> PreflightReport:
    """Check flags and recipe, then all ranks, on rank 0."""
    try:
        hosts = _all_counted(flags.hosts, rendezvous.world_size)
        _writable(flags.json_file)
        recipe, layout = _checked_recipe(flags.recipe, rendezvous.world_size)
    except (RecipeError, UsageError) as error:
        announce(rendezvous, "roster", {"exit": True})
        if flags.processes:  # forked ranks are joining: keep the store until they have
            collect(rendezvous, "join", range(1, rendezvous.world_size), flags.join_seconds)
        return _early_report(flags, MISTAKE, Problem(check="recipe", message=str(error), cure="correct it; no host is at fault"))
    return coordinate(
        rendezvous,
        this_rank(os.environ),
        recipe,
        layout,
        recipe_path=flags.recipe,
        out_dir=flags.out_dir or f"runs/{recipe.name}",
        given_hosts=hosts,
        join_seconds=flags.join_seconds,
    )


def _early_report(flags: argparse.Namespace, code: int, problem: Problem) -> PreflightReport:
    """Return the report of a preflight that ends before a host is checked."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return PreflightReport(recipe=Path(flags.recipe).stem, world_size=world_size, hosts=(), exit_code=code, problems=(problem,))


def _writable(json_file: Path | None) -> None:
    if json_file is not None:
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=json_file.parent).close()
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UsageError(f"--json-file={json_file} cannot be written ({error}); name a file in a folder of yours") from error
        except OSError:
            return  # a full or broken disk: the checks report it


def _all_counted(hosts: list[tuple[str, int]], world_size: int) -> list[tuple[str, int]]:
    if hosts and not any(count for _, count in hosts) and world_size % len(hosts) == 0:
        return [(host, world_size // len(hosts)) for host, _ in hosts]
    if hosts and (sum(count for _, count in hosts) != world_size or not all(count for _, count in hosts)):
        words = ",".join(f"{host}:{count}" if count else host for host, count in hosts)
        raise UsageError(f"--hosts={words}: the ranks on them must add up to {world_size}; write HOST:RANKS,HOST:RANKS")
    return hosts


def _checked_recipe(path: str, world_size: int) -> tuple[Recipe, Layout]:
    from recipes.common.checks.recipe_checks import check_recipe

    recipe = load_recipe(path)
    # a copy: building the model fills in fields of its config
    return recipe, check_recipe(deepcopy(recipe), world_size, check_machine=False)[0]


if __name__ == "__main__":
    code = FAILED
    with contextlib.suppress(BrokenPipeError):
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # a thread may hang in a file system or a collective, and a normal exit would wait for it
