"""Finds the release of a package with which something changed: `python -m tools.replay --bisect deepspeed=0.18.2..0.19.8`.

`release_judges` asks one release. Here is whom to ask. The ends come first. Between two releases that answer a question
differently the middle is asked, until they are neighbours. A question whose ends agree may have changed twice in between: then
the middle of the widest gap is asked, until two answers differ or every release has been asked. So a question that never changed
is asked everywhere; one that did may have changed again between two releases that agree. The text says how many were not asked;
`--all` asks them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from packaging.version import InvalidVersion, Version

from tools.common.console import UsageError, table

RIGHT, WRONG, NO_RUN = "right", "wrong", "does not run"
DIFFERS = "differs"  # as tools.replay.compare says it of a step
INDEX_SECONDS = 300.0


@dataclass(frozen=True)
class Answer:
    """What one release answers to one question."""

    verdict: str
    words: str = ""
    digest: str = ""  # of the results, bit for bit; empty where there are none
    wrong_in: tuple[str, ...] = ()  # the cases of the question that are not right: one fault may take another's place


Answers = dict[str, Answer]  # by question
Ask = Callable[[str], Answers]  # of a release


@dataclass(frozen=True)
class Turn:
    """Two neighbouring releases that answer a question differently."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class History:
    """What the releases that were asked answered."""

    package: str
    releases: tuple[str, ...]  # all between the bounds, in order
    answers: dict[str, Answers]  # of those that were asked
    by_bits: bool

    @property
    def questions(self) -> list[str]:
        return list(dict.fromkeys(name for answers in self.answers.values() for name in answers))

    @property
    def asked(self) -> list[str]:
        return [release for release in self.releases if release in self.answers]

    def turns(self) -> list[Turn]:
        """Return where the answers change. Only between neighbours that were both asked is the release known that did it."""
        return [
            Turn(question, before, after)
            for question in self.questions
            for before, after in pairwise(self.asked)
            if _differ(self.answers[before], self.answers[after], question, self.by_bits)
        ]

    @property
    def is_clean(self) -> bool:
        """Whether every question was answered, and all answers are right and the same."""
        verdicts = [answer.verdict for each in self.answers.values() for answer in each.values()]
        return not self.turns() and not self.unanswered and not {WRONG, DIFFERS} & set(verdicts)

    @property
    def unanswered(self) -> list[str]:
        """Return the questions that none of the releases that were asked could be run for."""
        told = {name for each in self.answers.values() for name, answer in each.items() if answer.verdict != NO_RUN}
        return [name for name in self.questions if name not in told]

    def to_json(self) -> dict[str, Any]:
        answers = {release: {q: asdict(a) for q, a in self.answers[release].items()} for release in self.asked}
        turns = [asdict(turn) for turn in self.turns()]
        return {"package": self.package, "releases": self.releases, "answers": answers, "turns": turns, "clean": self.is_clean}

    def text(self) -> str:
        rows = []
        for release in self.releases:
            answers = self.answers.get(release)
            cells = ["not asked" if answers is None else self._cell(answers.get(question)) for question in self.questions]
            rows.append([release, *cells])
        lines = [table(rows, [self.package, *self.questions])]
        lines += ["", *map(self._turn_text, self.turns())]
        if self.unanswered:
            reasons = {answer.words: None for each in self.answers.values() for answer in each.values() if answer.words}
            lines.append(f"no release could be asked: {', '.join(self.unanswered)} ({next(iter(reasons), 'no word of why')})")
        elif not self.turns():
            lines.append(f"no release of {self.package} from {self.releases[0]} to {self.releases[-1]} changed an answer")
        unasked = len(self.releases) - len(self.answers)
        if unasked:
            lines.append(f"{unasked} releases were not asked: they lie between two that agree. --all asks every one")
        return "\n".join(lines)

    def _cell(self, answer: Answer | None) -> str:
        if answer is None:
            return "-"
        return f"{answer.verdict} {answer.digest[:8]}" if self.by_bits and answer.digest else answer.verdict

    def _turn_text(self, turn: Turn) -> str:
        before, after = self.answers[turn.before][turn.question], self.answers[turn.after][turn.question]
        change = f"{before.verdict} -> {after.verdict}"
        if before.verdict == after.verdict:
            change = f"{after.verdict} in other cases" if before.wrong_in != after.wrong_in else "other bits"
        told = after if after.verdict != RIGHT else before
        why = f" ({told.words})" if told.words and told.verdict != RIGHT else ""
        return f"{turn.question}: {self.package} {turn.after} changed it, {turn.before} did not have it: {change}{why}"


def _differ(one: Answers, other: Answers, question: str, by_bits: bool) -> bool:
    if question not in one or question not in other:
        return False
    a, b = one[question], other[question]
    return (a.verdict, a.wrong_in) != (b.verdict, b.wrong_in) or (by_bits and a.digest != b.digest)


def search(releases: Sequence[str], ask: Ask, *, by_bits: bool = False) -> dict[str, Answers]:
    """Ask as few releases as needed. Returns the answers by release."""
    found = {index: ask(releases[index]) for index in (0, len(releases) - 1)}
    while (index := _next(found, by_bits)) is not None:
        found[index] = ask(releases[index])
    return {releases[index]: found[index] for index in sorted(found)}


def _next(found: dict[int, Answers], by_bits: bool) -> int | None:
    """Return which release to ask next; None when the answers that were given leave nothing open."""
    questions = dict.fromkeys(name for answers in found.values() for name in answers)
    gaps = [(a, b) for a, b in pairwise(sorted(found)) if b - a > 1]
    turned = set()
    for question in questions:
        for a, b in pairwise(sorted(found)):
            if _differ(found[a], found[b], question, by_bits):
                if b - a > 1:
                    return (a + b) // 2
                turned.add(question)
    if gaps and any(question not in turned for question in questions):
        a, b = max(gaps, key=lambda gap: gap[1] - gap[0])
        return (a + b) // 2
    return None


def parse_range(text: str) -> tuple[str, list[str]]:
    """Return (package, releases) of "deepspeed=0.18.2..0.19.8", whose releases pip lists, or "deepspeed=0.18.2,0.19.3"."""
    package, equals, releases = text.partition("=")
    first, dots, last = releases.partition("..")
    wanted = [first, last] if dots else releases.split(",")
    try:
        versions = [Version(word.strip()) for word in wanted]
    except InvalidVersion as error:
        raise UsageError(f"--bisect {text}: {error}; write PACKAGE=FIRST..LAST, such as deepspeed=0.18.2..0.19.8") from None
    if not equals or not package or len(versions) < 2 or versions != sorted(set(versions)):
        raise UsageError(f"--bisect {text}: expected PACKAGE=FIRST..LAST or PACKAGE=A,B,C, two releases or more, in their order")
    if not dots:
        return package, [str(version) for version in versions]
    listed = [version for version in listed_releases(package) if versions[0] <= version <= versions[1]]
    missing = [str(end) for end in versions if end not in listed]
    if missing:
        raise UsageError(f"--bisect {text}: pip knows no release {' and no '.join(missing)} of {package}")
    return package, [str(version) for version in listed]


def listed_releases(package: str) -> list[Version]:
    """Return the final releases of a package that pip can install here, in their order."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INDEX_SECONDS)
    except subprocess.TimeoutExpired:
        raise UsageError(f"--bisect: pip did not list the releases of {package} in {INDEX_SECONDS:.0f} s") from None
    found = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if found is None:
        reason = (done.stderr.strip().splitlines() or ["no word of it"])[-1]
        raise UsageError(f"--bisect: pip cannot list the releases of {package} ({reason}); name them: {package}=A,B,C")
    return sorted(version for version in map(Version, found[1].split(", ")) if not version.is_prerelease)
