"""`spikes explain RUN EVENT`: the causes of an event, ranked, each with what speaks for and against it.

Every piece of evidence is a plain function of what the run directory holds; it adds log odds to the causes it speaks about.
What cannot be answered is said, with what to log or to run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.common.console import GOOD, quiet_transformers
from tools.spikes.evidence import data as evidence_data
from tools.spikes.evidence import machine as evidence_machine
from tools.spikes.evidence import optimizer as evidence_optimizer
from tools.spikes.evidence.case import Case, read_case
from tools.spikes.evidence.causes import CAUSES, Cause
from tools.spikes.evidence.findings import Evidence, Finding, Unanswered

QUESTIONS: tuple[Callable[[Case], Iterator[Evidence]], ...] = (
    evidence_data.one_step_only,
    evidence_data.documents,
    evidence_data.losses_under_the_checkpoint,
    evidence_data.shard_bytes,
    evidence_data.place_in_the_order,
    evidence_data.micro_batches,
    evidence_data.batch_size,
    evidence_optimizer.learning_rate,
    evidence_optimizer.second_moment,
    evidence_optimizer.weights_outside_the_optimizer,
    evidence_optimizer.attention_logits,
    evidence_optimizer.half_precision,
    evidence_machine.replicas,
    evidence_machine.not_finite,
    evidence_machine.step_time,
)
SHOWN = 4  # causes printed with their evidence


@dataclass(frozen=True)
class Verdict:
    """One cause, judged."""

    cause: Cause
    score: float  # log odds
    share: float  # of belief, over the causes of the table
    findings: tuple[Finding, ...]
    unanswered: tuple[Unanswered, ...]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("event", metavar="EVENT", help="a step, or a black box of RUN/events")


def run(flags: argparse.Namespace) -> int:
    quiet_transformers()
    case, verdicts = explain(flags.run, flags.event)
    if flags.json:
        print(json.dumps(_as_json(case, verdicts)))
    else:
        print(_report(case, verdicts))
    return GOOD


def explain(folder: Path, event: str) -> tuple[Case, list[Verdict]]:
    """The event as read, and every cause, the likeliest first. Raises UsageError for what is no event of a run."""
    case = read_case(folder, event)
    evidence = [item for question in QUESTIONS for item in question(case)]
    return case, rank(evidence)


def rank(evidence: list[Evidence]) -> list[Verdict]:
    """Prior log odds plus the weight of every finding; belief in proportion to the odds."""
    scores = {
        cause.name: cause.prior + sum(e.weight for e in evidence if isinstance(e, Finding) and e.cause == cause.name)
        for cause in CAUSES
    }
    top = max(scores.values())
    total = sum(math.exp(score - top) for score in scores.values())
    verdicts = []
    for cause in CAUSES:
        mine = [e for e in evidence if e.cause == cause.name]
        findings = sorted((e for e in mine if isinstance(e, Finding)), key=lambda f: -abs(f.weight))
        unanswered = tuple(e for e in mine if isinstance(e, Unanswered))
        score = scores[cause.name]
        verdicts.append(Verdict(cause, score, math.exp(score - top) / total, tuple(findings), unanswered))
    return sorted(verdicts, key=lambda v: -v.score)


def _as_json(case: Case, verdicts: list[Verdict]) -> dict[str, Any]:
    return {
        "run": str(case.folder),
        "event": case.step,
        "onset_step": case.onset,
        "moved": case.moved,
        "causes": [
            {
                "cause": v.cause.name,
                "score": v.score,
                "share": v.share,
                "means": v.cause.means,
                "cure": v.cause.cure,
                "for": [f.text for f in v.findings if f.weight > 0],
                "against": [f.text for f in v.findings if f.weight < 0],
                "cannot_be_answered": [{"question": u.text, "cure": u.cure} for u in v.unanswered],
            }
            for v in verdicts
        ],
    }


def _report(case: Case, verdicts: list[Verdict]) -> str:
    moved = ", ".join(f"{name} z {z:+.1f}" for name, z in case.moved.items()) or "nothing stands out"
    lines = [f"step {case.step}: onset {case.onset} ({moved})"]
    for place, verdict in enumerate(verdicts[:SHOWN], start=1):
        lines.append(f"\n{place}. {verdict.cause.name}: {verdict.cause.means}  [{verdict.share:.0%}, score {verdict.score:+.1f}]")
        lines += [f"   for {finding.weight:+.1f}  {finding.text}" for finding in verdict.findings if finding.weight > 0]
        lines += [f"   against {finding.weight:+.1f}  {finding.text}" for finding in verdict.findings if finding.weight < 0]
        lines += [f"   cannot be answered: {u.text}; {u.cure}" for u in verdict.unanswered]
        if place == 1:
            lines.append(f"   to do: {verdict.cause.cure}")
    lines.append("\nless likely: " + ", ".join(f"{v.cause.name} {v.score:+.1f}" for v in verdicts[SHOWN:]))
    open_questions = [u for v in verdicts[SHOWN:] for u in v.unanswered]
    lines += [f"cannot be answered ({u.cause}): {u.text}; {u.cure}" for u in open_questions]
    return "\n".join(lines)
