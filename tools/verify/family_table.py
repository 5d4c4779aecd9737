"""Shows verdicts of model types: a table for the terminal, and the page that the repository keeps."""

from __future__ import annotations

import os
from pathlib import Path

from tools.common.console import table
from tools.verify.family_verdict import EXPORTED, LEFT_OUT, PASSED, UNDECIDED, FamilyVerdict

_WORDS = {PASSED: "yes", "failed": "**no**", "refused": "refused", UNDECIDED: UNDECIDED, LEFT_OUT: "-"}


def by_family(verdicts: list[FamilyVerdict]) -> dict[str, list[FamilyVerdict]]:
    found: dict[str, list[FamilyVerdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.family, []).append(verdict)
    return found


def as_text(verdicts: list[FamilyVerdict]) -> str:
    """Return a table with a row for each type, and the sums."""
    layouts = list(dict.fromkeys(verdict.layout for verdict in verdicts))
    rows = [
        [name, *(_outcome(own, layout) for layout in layouts), _whole(own), _reasons(own)]
        for name, own in by_family(verdicts).items()
    ]
    return "\n".join([table(rows, ["family", *layouts, "whole", "why not"]), "", *(_sum(verdicts, each) for each in layouts)])


def write_page(path: Path, verdicts: list[FamilyVerdict]) -> None:
    """Write the page of decoders: those that train and how, those that do not and why, and what was left out."""
    layouts = list(dict.fromkeys(verdict.layout for verdict in verdicts))
    families = by_family(verdicts)
    lines = [
        "# Families",
        "",
        "What `python -m tools.verify --family all --table recipes/FAMILIES.md` found: a tiny model of each causal type",
        "of `transformers`, from its default configuration, trained three steps in each layout and in one process of plain",
        "`transformers`. yes: loss and gradient norm within 1e-6 (relative), gradients and parameters within 1e-5, or within",
        "four times what rounding alone makes of the same model. undecided: its gradients pass, but rounding alone moves its",
        "steps of AdamW as far, beyond any bound. whole: the part of the layers' matrices that every tensor rank holds.",
        "export: plain `transformers` loads what it was trained to, with equal logits.",
        "",
        *(f"- {_sum(verdicts, layout)}" for layout in layouts),
        "",
        f"| family | {' | '.join(layouts)} | whole | experts | tied | export | date | versions | why not |",
        "|---|" + "---|" * (len(layouts) + 7),
    ]
    for name, own in families.items():
        first = own[0]
        if first.outcome == LEFT_OUT:
            continue
        cells = [_outcome(own, layout, _WORDS) for layout in layouts]
        versions = ", ".join(f"{package} {number}" for package, number in first.versions.items())
        cells += [_whole(own), str(first.experts or ""), "yes" if first.tied else ""]
        cells += [_export(own), first.date, versions, _reasons(own)]
        lines.append(f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    lines += ["", "## Left out", "", "| type | why |", "|---|---|"]
    lines += [f"| {name} | {own[0].reason.replace('|', '/')} |" for name, own in families.items() if own[0].outcome == LEFT_OUT]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)


def _outcome(own: list[FamilyVerdict], layout: str, words: dict[str, str] | None = None) -> str:
    found = next((verdict.outcome for verdict in own if verdict.layout == layout), "")
    return words.get(found, found) if words else found


def _whole(own: list[FamilyVerdict]) -> str:
    share = max(verdict.whole for verdict in own)
    return f"{100 * share:.0f} %" if share >= 0.005 else ""


def _export(own: list[FamilyVerdict]) -> str:
    found = next((verdict.export for verdict in own if verdict.export), "")
    return found if found in ("", EXPORTED) else "**no**"


def _reasons(own: list[FamilyVerdict]) -> str:
    found = [reason for verdict in own for reason in (verdict.reason, verdict.export) if reason not in ("", EXPORTED)]
    return "; ".join(dict.fromkeys(" ".join(reason.split()) for reason in found))


def _sum(verdicts: list[FamilyVerdict], layout: str) -> str:
    own = [verdict for verdict in verdicts if verdict.layout == layout and verdict.outcome != LEFT_OUT]
    passed = sum(verdict.outcome == PASSED for verdict in own)
    return f"{layout}: {passed} of {len(own)} decoders train what plain transformers trains"
