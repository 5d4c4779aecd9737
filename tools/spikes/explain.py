"""`spikes explain RUN EVENT`: ranks the causes of an event, with the evidence for and against each.

Every piece of evidence is a plain function of what the run directory holds, and adds log odds to causes. Questions that cannot
be answered are listed, with what to log or to run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.common.console import GOOD, printable, quiet_transformers
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
    evidence_data.position_in_the_order,
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
class RankedCause:
    """A cause with its score and evidence."""

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
    case, ranked = explain(flags.run, flags.event)
    if flags.json:
        print(json.dumps(_as_json(case, ranked)))
    else:
        print(printable(_report(case, ranked)))
    return GOOD


def explain(folder: Path, event: str) -> tuple[Case, list[RankedCause]]:
    """Return the event as read, and every cause, the likeliest first. Raises UsageError for what is no event of a run."""
    case = read_case(folder, event)
    evidence = [item for question in QUESTIONS for item in question(case)]
    return case, rank(evidence)


def rank(evidence: list[Evidence]) -> list[RankedCause]:
    """Rank the causes by prior log odds plus the weights of their findings; belief is in proportion to the odds."""
    scores = {
        cause.name: cause.prior + sum(e.weight for e in evidence if isinstance(e, Finding) and e.cause == cause.name)
        for cause in CAUSES
    }
    top = max(scores.values())
    total = sum(math.exp(score - top) for score in scores.values())
    ranked = []
    for cause in CAUSES:
        mine = [e for e in evidence if e.cause == cause.name]
        findings = sorted((e for e in mine if isinstance(e, Finding)), key=lambda f: -abs(f.weight))
        unanswered = tuple(e for e in mine if isinstance(e, Unanswered))
        score = scores[cause.name]
        ranked.append(RankedCause(cause, score, math.exp(score - top) / total, tuple(findings), unanswered))
    return sorted(ranked, key=lambda v: -v.score)


def _as_json(case: Case, ranked: list[RankedCause]) -> dict[str, Any]:
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
            for v in ranked
        ],
    }


def _report(case: Case, ranked: list[RankedCause]) -> str:
    moved = ", ".join(f"{name} z {z:+.1f}" for name, z in case.moved.items()) or "nothing stands out"
    lines = [f"step {case.step}: onset {case.onset} ({moved})"]
    for number, each in enumerate(ranked[:SHOWN], start=1):
        lines.append(f"\n{number}. {each.cause.name}: {each.cause.means}  [{each.share:.0%}, score {each.score:+.1f}]")
        lines += [f"   for {finding.weight:+.1f}  {finding.text}" for finding in each.findings if finding.weight > 0]
        lines += [f"   against {finding.weight:+.1f}  {finding.text}" for finding in each.findings if finding.weight < 0]
        lines += [f"   cannot be answered: {u.text}; {u.cure}" for u in each.unanswered]
        if number == 1:
            lines.append(f"   to do: {each.cause.cure}")
    lines.append("\nless likely: " + ", ".join(f"{v.cause.name} {v.score:+.1f}" for v in ranked[SHOWN:]))
    open_questions = [u for v in ranked[SHOWN:] for u in v.unanswered]
    lines += [f"cannot be answered ({u.cause}): {u.text}; {u.cure}" for u in open_questions]
    return "\n".join(lines)
