"""Says what is missing here to resume or replay a run exactly: code, packages, libraries, data, tokenizer, GPUs, environment.

    python -m tools.changed check runs/mine                 # against the newest entry of its record
    python -m tools.changed check runs/mine --segment 1     # against an earlier one

Reads all of the run's data that nobody has read since it was prepared. What can change a number is missing, and the exit code
is 1; what cannot is a note. A variable of the environment is missing if neither this shell nor the launch scripts (launch/env.sh)
would set it as in the run.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.common.config.fact_effects import CHANGES_LOSS, effect_of_fact
from recipes.common.data.blend import data_folders
from recipes.common.engine.determinism import set_determinism
from recipes.common.recipe import ROOT, Recipe, from_root
from recipes.common.record.data_content import folder_names
from recipes.common.record.environment import environment_facts
from recipes.common.record.recording import facts_here
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from recipes.common.run_dir.segments import FOLDER, PATCH, Segment, canonical, read_segments
from tools.common.console import FAILED, GOOD, UsageError
from tools.common.recipe_io import read_recipe

ABSENT = "(not there)"
LONGEST = 60  # characters of a value
# what a run is told is in the recipe; what hosts beside rank 0's are cannot be seen from here
_OF_A_MACHINE = ("package", "git", "code", "library", "environment", "threads", "torch", "data", "tokenizer", "algorithm", "seed")
_OF_A_HOST = ("cpu", "gpus", "microcode", "kernel", "cpus", "memory_gib")


@dataclass(frozen=True)
class Missing:
    """A fact of the run that is not so here, and what to do about it."""

    fact: str
    then: Any
    here: Any
    cure: str
    matters: bool  # whether it can change a number


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--segment", type=int, metavar="N", help="the entry of the record to be repeated (default: the newest)")


def run(flags: argparse.Namespace) -> int:
    segment, recipe = _segment(flags.run, flags.segment), read_recipe(flags.run)
    set_determinism(recipe.determinism)  # as a run does: the switches of torch are facts
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found = [
        *missing_here(segment, facts_here(recipe, device, data_seconds=math.inf), recipe, flags.run, launched_facts()),
        *_missing_of_the_run(flags.run),
    ]
    found.sort(key=lambda each: not each.matters)
    missing = [each for each in found if each.matters]
    if flags.json:
        print(json.dumps({"segment": segment.index, "exact": not missing, "found": [asdict(each) for each in found]}))
    else:
        print(report(segment, found))
    return FAILED if missing else GOOD


def _segment(run_dir: Path, index: int | None) -> Segment:
    segments = read_segments(run_dir)
    if not segments:
        raise UsageError(f"{run_dir} has no record: it is no run directory, or an earlier version wrote it")
    chosen = [segment for segment in segments if segment.index == index] if index is not None else segments[-1:]
    if not chosen:
        raise UsageError(f"--segment {index}: the record has {', '.join(str(segment.index) for segment in segments)}")
    return chosen[0]


def launched_facts() -> dict[str, str]:
    """Return the facts of the environment that the launch scripts make of this shell's."""
    command = ["bash", "-c", 'source "$1" && env -0', "bash", str(ROOT / "launch/env.sh")]
    said = subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="surrogateescape")
    return environment_facts(dict(line.split("=", 1) for line in said.split("\0") if "=" in line))


def missing_here(
    segment: Segment, here: Mapping[str, Any], recipe: Recipe, run_dir: Path, launched: Mapping[str, str]
) -> list[Missing]:
    """Return every fact of `segment` that a machine can have and that is not so here.

    here: from `facts_here`. launched: of the environment, what a launch script would make of it.
    """
    names = dict.fromkeys(name for name in (*segment.facts, *here) if _is_of_a_machine(name))
    found = []
    for name in names:
        then, now = segment.facts.get(name, ABSENT), here.get(name, ABSENT)
        if canonical(_kind(name, then)) == canonical(_kind(name, now)) or _is_no_lack(name, segment.facts, here):
            continue
        if _is_set_at_launch(name, then, launched):
            continue
        matters = effect_of_fact(name) in CHANGES_LOSS and not (name.startswith("git.") and _is_same_code(segment.facts, here))
        found.append(Missing(name, then, now, _cure(name, segment, recipe, run_dir), matters))
    return found


def report(segment: Segment, found: list[Missing]) -> str:
    missing = [each for each in found if each.matters]
    lines = []
    for each in found:
        what = "missing" if each.matters else "note"
        lines.append(f"{what}: {each.fact}: {_short(each.then)} in the run, {_short(each.here)} here; {each.cure}")
    of = f"entry {segment.index} of the record ({segment.cause} at step {segment.step})"
    if missing:
        return "\n".join([*lines, f"{len(missing)} things are not as in {of}: a resume or replay here would not be exact"])
    return "\n".join([*lines, f"nothing is missing: this machine is as in {of}, as far as it is recorded"])


def _missing_of_the_run(run_dir: Path) -> Iterator[Missing]:
    if not sealed_checkpoints(run_dir):
        cure = f"copy the run's checkpoints into {run_dir / 'checkpoints'}"
        yield Missing("checkpoints", "(not recorded)", ABSENT, cure, True)


def _is_of_a_machine(name: str) -> bool:
    group, _, rest = name.partition(".")
    return group in _OF_A_MACHINE or (name.startswith("host.0.") and rest.partition(".")[2] in _OF_A_HOST)


def _is_no_lack(name: str, then: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a difference says nothing new: a package that only this machine has, a file of one whose version differs."""
    group, _, rest = name.partition(".")
    if group == "package":
        version = f"package.{rest.rpartition('.')[0]}.version"
        return version not in then or (name != version and then[version] != here.get(version))
    if group == "git":  # the commit of another code
        return not _is_same_code(then, here) and "code.hash" in then
    return group == "torch" and name not in here  # a switch for GPUs, on a machine without


def _is_set_at_launch(name: str, then: Any, launched: Mapping[str, str]) -> bool:
    if name == "threads.torch":
        return str(then) == launched.get("environment.OMP_NUM_THREADS")
    return name in launched and then == launched[name]


def _is_same_code(then: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    return "code.hash" in here and then.get("code.hash") == here["code.hash"]


def _kind(name: str, value: Any) -> Any:
    """Return what of a value has to be equal: of GPUs the kinds, whatever their number."""
    return sorted(set(map(str, value))) if name == "host.0.gpus" and isinstance(value, list) else value


def _cure(name: str, segment: Segment, recipe: Recipe, run_dir: Path) -> str:
    group, _, rest = name.partition(".")
    then = segment.facts.get(name, ABSENT)
    if group == "package":
        package = rest.rpartition(".")[0]
        version = segment.facts.get(f"package.{package}.version")
        return f"install {package}=={version}" + (", the same wheel" if not name.endswith(".version") else "")
    if group == "environment":
        return f"unset {rest}" if then == ABSENT else f"export {rest}={then}"
    if group in ("git", "code"):
        commit, patch = segment.facts.get("git.commit"), run_dir / FOLDER / f"{segment.index:05d}.{PATCH}"
        apply = f" and git apply {patch}" if patch.is_file() else ""
        return f"git checkout {commit}{apply}" if commit else "copy the code of the run"
    if group == "data":
        names = folder_names(data_folders(recipe))
        folder = next((path for last, path in names.items() if rest.startswith(f"{last}.")), rest)
        return f"copy the run's data to {from_root(folder)}, or prepare it as then"
    if group == "tokenizer":
        return f"copy the run's tokenizer to {from_root(recipe.tokenizer)}"
    return _CURES.get(group, "use a machine of that kind")


_CURES = {
    "threads": "export OMP_NUM_THREADS, or use as many processors",
    "torch": "a switch of torch: set the recipe's determinism as in the run",
    "algorithm": "use the version of this code that the run used",
    "seed": "use the version of torch that the run used",
    "library": "use an environment with that library",
}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
