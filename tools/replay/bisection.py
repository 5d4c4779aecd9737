"""Does what `python -m tools.replay --bisect PACKAGE=FIRST..LAST` says: chooses the judge, and prints what it found."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from tools.common.console import FAILED, GOOD, UsageError
from tools.replay.release_judges import STEP, Judge, bisect, gate, step, trials
from tools.replay.releases import parse_range


def add_bisect_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a bisection to those of a replay."""
    add = parser.add_argument_group("which release changed it").add_argument
    add(
        "--bisect",
        metavar="PACKAGE=FIRST..LAST",
        help="find the release that changed an answer: of this run's --step N, of the gate, where a recipe is given in place of "
        "a run, or, without either, of small trainings by DeepSpeed alone that are compared with plain torch",
    )
    add("--all", action="store_true", dest="everything", help="with --bisect: ask every release, not only as many as needed")
    add("--jobs", type=int, default=1, metavar="N", help="with --all: releases that are asked at a time (default: %(default)s)")
    add("--bits", action="store_true", help="with --bisect: other bits are a change too, though both are right")
    add("--ask", metavar="A,B", help="with --bisect alone: only these questions, such as pipeline,zero2")


def run_bisect(flags: argparse.Namespace) -> int:
    """Search, print, and return the exit code: 1 where an answer changed or is wrong."""
    given = [name for name in ("fields", "without", "versions", "precision") if getattr(flags, name, None)]
    if given or getattr(flags, "against", None) is not None:
        raise UsageError(
            "--bisect changes the release and nothing else; leave out --set, --without, --versions, --precision, --against"
        )
    if flags.jobs < 1 or (flags.jobs > 1 and not flags.everything):
        raise UsageError(f"--jobs {flags.jobs}: a number from 1 on, with --all; a search asks one release after the other")
    judge = choose_judge(flags.run, flags.step, flags.layout, flags.ask)
    if judge.questions == STEP:
        _check_step(flags.run, flags.step, flags.layout)
    package, releases = parse_range(flags.bisect)
    history = bisect(package, releases, judge, by_bits=flags.bits, everything=flags.everything, jobs=flags.jobs)
    print(json.dumps(history.to_json()) if flags.json else history.text())
    return GOOD if history.is_clean else FAILED


def _check_step(run: Path, number: int, layout: str | None) -> None:
    """Raise UsageError for a step that cannot be computed again, before any release is installed."""
    if number < 1:
        raise UsageError(f"--step {number}: steps count from 1")
    with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
        from tools.replay.change import ReplayChange, changed_plan
        from tools.replay.enter import enter

        changed_plan(enter(run, number)[0], ReplayChange(layout=layout))


def choose_judge(subject: Path | None, number: int | None, layout: str | None, asked: str | None) -> Judge:
    """Return who judges. subject: a run, a recipe, or nothing."""
    if asked is not None and subject is not None:
        raise UsageError("--ask chooses among DeepSpeed's trials; leave it out, or the run or recipe")
    if subject is None:
        if number is not None or layout is not None:
            raise UsageError("--step belongs to a run, and --layout to a run or a recipe; name it before the flags")
        from tools.replay.release_cases import QUESTIONS  # transformers takes seconds

        names = list(QUESTIONS) if asked is None else asked.split(",")
        unknown = [name for name in names if name not in QUESTIONS]
        if unknown:
            raise UsageError(f"--ask {asked}: there is no question {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
        return trials(names)
    if subject.is_file():
        if number is not None:
            raise UsageError(f"{subject} is a recipe, which has no steps yet; leave out --step {number}")
        return gate(subject.resolve(), layout)
    if number is None:
        raise UsageError(f"--step N is missing: which step of {subject} is to be computed with each release")
    return step(subject.resolve(), number, layout)
