"""Asks one release of a package, in a process that has it first on its path, what `tools.replay.releases` wants to know.

Three judges: questions that compare DeepSpeed with plain torch (`release_trial`), the gate with a recipe (`tools.verify`), and a
step of a run, computed again. A release that cannot be installed, imported or run is an answer too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipes.common.recipe import from_root
from tools.common.console import UsageError, progress_bar
from tools.replay.releases import NO_RUN, RIGHT, WRONG, Answer, Answers, History, search
from tools.replay.versions import release_environment, release_folder

ANSWER_SECONDS = 3600.0
STEP = ("step",)  # the question of `step`
_SHOWN = 300  # characters of an error


@dataclass(frozen=True)
class Judge:
    """How a release is asked."""

    questions: tuple[str, ...]
    command: tuple[str, ...]  # words after `python -m`
    read: Callable[[str], Answers]  # of what the command printed; raises ValueError for what is no answer


def trials(questions: Sequence[str]) -> Judge:
    """Judge by the questions of `release_trial`."""

    def read(printed: str) -> Answers:
        found = {}
        for name, answer in json.loads(printed)["answers"].items():
            wrong_in = tuple(case["case"] for case in answer["cases"] if case["verdict"] != RIGHT)
            found[name] = Answer(answer["verdict"], answer["words"], answer["digest"], wrong_in)
        return found

    return Judge(tuple(questions), ("tools.replay.release_trial", *questions), read)


def gate(recipe: Path, layout: str | None) -> Judge:
    """Judge by `tools.verify`: does the recipe train in this layout (None: its default) what plain transformers trains?"""

    def read(printed: str) -> Answers:
        rows = json.loads(printed)["rows"]
        failed = [row for row in rows if not row["difference"] <= row["bound"]]
        bits = json.dumps([(row["what"], row["difference"]) for row in rows])
        if not failed:
            return {"gate": Answer(RIGHT, "", bits)}
        worst = max(failed, key=lambda row: row["difference"] / row["bound"])
        words = f"{worst['what']} of {worst['where']} is off by {worst['difference']:.1e}, allowed {worst['bound']:.1e}"
        return {"gate": Answer(WRONG, words, bits)}

    return Judge(("gate",), ("tools.verify", str(recipe), *_layout(layout), "--any-release", "--json"), read)


def step(run: Path, number: int, layout: str | None) -> Judge:
    """Judge by a step of a run, computed again in a layout (None: the run's own): is it what the log holds?"""

    def read(printed: str) -> Answers:
        found = json.loads(printed)
        first = found["first"] and f"{found['first']['quantity']} of step {found['first']['step']} differs first"
        return {"step": Answer(found["verdict"], first or "", json.dumps([found["replayed"], found["first"]]))}

    return Judge(STEP, ("tools.replay", str(run), "--step", str(number), *_layout(layout), "--json"), read)


def _layout(layout: str | None) -> tuple[str, ...]:
    return () if layout is None else ("--layout", layout)


def bisect(
    package: str,
    releases: Sequence[str],
    judge: Judge,
    *,
    within: Path | None = None,
    by_bits: bool = False,
    everything: bool = False,
    jobs: int = 1,
) -> History:
    """Find where the releases' answers change. within: see `release_folder`. by_bits: other bits are a change too.

    everything: ask every release, `jobs` at a time; a search asks one after the other.
    """
    with progress_bar("releases", len(releases), "release") as bar:

        def ask_one(release: str) -> Answers:
            answers = ask(package, release, judge, within)
            told = ", ".join(f"{name} {answer.verdict}" for name, answer in answers.items())
            bar.write(f"{package} {release}: {told}", file=sys.stderr)
            bar.update()
            return answers

        if everything:
            with ThreadPoolExecutor(jobs) as pool:
                found = dict(zip(releases, pool.map(ask_one, releases), strict=True))
        else:
            found = search(releases, ask_one, by_bits=by_bits)
    return History(package, tuple(releases), found, by_bits)


def ask(package: str, release: str, judge: Judge, within: Path | None = None) -> Answers:
    """Install a release, if it is not there, and let it answer."""
    try:
        environment = release_environment([release_folder(package, release, within=within)])
        command = [sys.executable, "-m", *judge.command]
        done = subprocess.run(
            command, cwd=from_root("."), env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except UsageError as error:
        return dict.fromkeys(judge.questions, Answer(NO_RUN, str(error)))
    except subprocess.TimeoutExpired:
        return dict.fromkeys(judge.questions, Answer(NO_RUN, f"no answer in {ANSWER_SECONDS:.0f} s"))
    try:
        return judge.read(done.stdout)
    except (ValueError, KeyError):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return dict.fromkeys(judge.questions, Answer(NO_RUN, (lines or ["no word of it"])[-1][:_SHOWN]))
