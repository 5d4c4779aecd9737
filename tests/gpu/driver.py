"""Runs the checks of the GPU tier one after another, and keeps their results."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipes.common.recipe import ROOT
from recipes.common.record.source_code import git_state
from tests.gpu import numerics, speed, whole_runs
from tests.gpu.place import GpuCheck, Place, RefutedError, SkippedError
from tests.gpu.results import (
    FAILED,
    JSON_NAME,
    PAGE_NAME,
    PASSED,
    SKIPPED,
    all_passed,
    read_results,
    write_results,
)
from tools.common.console import FAILED as EXIT_FAILED
from tools.common.console import GOOD, UsageError, quiet_transformers, table
from tools.common.forked_ranks import RankError, run_ranks
from tools.preflight.host_facts import source_hashes

CHECKS = (
    *speed.CHECKS[:3],
    *numerics.CHECKS[-3:],
    *whole_runs.CHECKS,
    *speed.CHECKS[3:],
    *numerics.CHECKS[:-3],
)  # quick ones first
SIZES = (8, 2, 1)


def run_tier(args: argparse.Namespace, checks: tuple[GpuCheck, ...] = CHECKS) -> int:
    if args.list:
        print(table([[check.name, check.ranks, check.about] for check in checks], ["check", "GPUs", "shows"]))
        return GOOD
    began = time.monotonic()
    quiet_transformers()
    ranks = _count_ranks(args)
    chosen = _choose(checks, args.only)
    folder = (args.out or ROOT / "runs" / f"gpu_tier_{ranks}").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(args.device, ranks)
    command = f"bash tests/gpu.sh {ranks}" if args.device == "cuda" else f"python -m tests.gpu {ranks} --device cpu"
    results = read_results(folder, machine)
    unrun = []
    for check in chosen:
        if not args.again and results.get(check.name, {}).get("verdict") in (PASSED, SKIPPED):
            continue
        if time.monotonic() - began > 60 * args.minutes:
            unrun.append(check.name)
            continue
        print(f"{check.name} ...", end=" ", flush=True, file=sys.stderr)
        results[check.name] = run_check(check, args.device, ranks, folder / "work")
        write_results(folder, machine, command, results)
        print(_line(results[check.name]), file=sys.stderr)
    return _report(args, folder, {c.name: results[c.name] for c in chosen if c.name in results}, unrun)


def run_check(check: GpuCheck, device: str, ranks: int, work: Path) -> dict[str, Any]:
    """Run one check in a folder of its own, which is deleted; an error of any kind is its failure."""
    began = time.monotonic()
    verdict, why, figures = PASSED, "", {}
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        if check.device_only and device == "cpu":
            raise SkippedError("needs a GPU")
        if check.ranks > ranks:
            raise SkippedError(f"needs {check.ranks} GPUs; NCCL allows one rank a GPU")
        figures = check.run(Place(device, ranks, work))
    except SkippedError as reason:
        verdict, why = SKIPPED, str(reason)
    except (RefutedError, RankError, AssertionError) as error:
        verdict, why = FAILED, str(error)[-4000:] or repr(error)
    except Exception:  # a check that is broken has shown nothing, and the others are still worth their time
        verdict, why = FAILED, traceback.format_exc()[-4000:]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    return {"verdict": verdict, "why": why, "seconds": seconds, "about": check.about, "figures": figures}


def describe_machine(device: str, ranks: int) -> dict[str, Any]:
    """Return what results hold for: another card, version or commit has results of its own."""
    state = git_state()
    card = run_ranks(speed.describe_card, 1, device)[0]
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    code = hashlib.blake2b(json.dumps(sorted(source_hashes(ROOT).items())).encode(), digest_size=8).hexdigest()
    commit = f"{state['commit'] or '?'}{' and changes' if state['dirty'] else ''}"
    return {"GPU": card["name"], "GPUs": ranks, "CUDA": torch.version.cuda or "", **versions, "commit": commit, "code": code}


def _count_ranks(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        return args.gpus or 2
    here = torch.cuda.device_count()
    if args.gpus is not None and args.gpus > here:
        raise UsageError(f"{args.gpus} GPUs are asked for, torch sees {here}; --device cpu tries the checks without one")
    if not here:
        raise UsageError("torch sees no GPU here; --device cpu tries the checks without one")
    return args.gpus or next(size for size in SIZES if size <= here)


def _choose(checks: tuple[GpuCheck, ...], only: list[str] | None) -> list[GpuCheck]:
    names = [check.name for check in checks]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise UsageError(f"--only={' '.join(unknown)}: no such check; there are: {', '.join(names)}")
    return [check for check in checks if not only or check.name in only]


def _line(result: dict[str, Any]) -> str:
    lines = result["why"].strip().splitlines()
    return f"{result['verdict']} in {result['seconds']:.0f} s" + (f": {lines[-1]}" if lines else "")


def _report(args: argparse.Namespace, folder: Path, results: dict[str, dict[str, Any]], unrun: list[str]) -> int:
    if args.json:
        print(json.dumps({"passed": all_passed(results) and not unrun, "checks": results, "not_run": unrun}))
    else:
        print(table([[name, _line(result)] for name, result in results.items()], ["check", "result"]))
        print(f"{folder / JSON_NAME}\n{folder / PAGE_NAME}")
        if unrun:
            print(f"no time was left for {', '.join(unrun)}: the same call goes on with them")
    return GOOD if all_passed(results) and not unrun else EXIT_FAILED
