"""Names what the numbers of two runs show: a counter that begins anew, copies that drift apart, data that are read again.

Each rule is an incident that large runs have had, and found weeks later. A run is judged alone where it shows enough, and beside
the other one, that was not interrupted, where that shows more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from recipes.common import recipe as recipes
from recipes.common.config.lr_schedules import learning_rate, seqs_after
from recipes.common.run_dir.segments import Segment, changed_facts
from tools.changed.incident import Compared, Incident
from tools.changed.side import Side

DRIFT = re.compile(r"(\S+) differs across (data|tensor|pipeline) ranks: rank ([\d, ]+) of ([\d, ]+), by up to (\S+?)(?:[;,\s]|$)")
AFTER = 24  # steps after a resume in which a counter that began anew shows
LEAST = 4  # of them that have to be there
MOST_COUNTED = 64  # steps whose rate says which count it is of
CLOSE = 0.25  # of the effect that is looked for: what may be left of it
DATA = ("data.", "recipe.data")
SCHEDULES = ("Constant", "Linear", "Cosine", "WSD", "InverseSqrt")


def adam_counter(compared: Compared) -> Iterator[Incident]:
    """Adam's step counter begins anew at a resume: its bias correction scales the updates by a curve that is known exactly."""
    for side, other in _each(compared):
        betas = side.facts.get("recipe.optimizer.betas")
        sizes = side.column("update_norm")
        if not isinstance(betas, list) or len(betas) != 2 or not sizes:
            continue
        for step in side.resumed_after():
            found = _counter_from(side, other, step, (float(betas[0]), float(betas[1])))
            if found is not None:
                yield found


def _counter_from(side: Side, other: Side | None, step: int, betas: tuple[float, float]) -> Incident | None:
    own, rate = side.column("update_norm"), side.column("lr")
    beside, its_rate = (other.column("update_norm"), other.column("lr")) if other else ({}, {})
    usual = _usual_update(own, rate, step)
    logs, wanted = [], []
    for later in range(1, AFTER + 1):
        at = step + later
        reference = beside[at] / its_rate[at] if beside.get(at) and its_rate.get(at) else usual
        if not own.get(at) or not rate.get(at) or not reference:
            continue
        logs.append(math.log(own[at] / rate[at] / reference))
        wanted.append(math.log(_correction(later, betas) / _correction(at, betas)))
    size = math.sqrt(sum(w * w for w in wanted) / max(len(wanted), 1))
    left = math.sqrt(sum((seen - w) ** 2 for seen, w in zip(logs, wanted, strict=True)) / max(len(wanted), 1))
    if len(logs) < LEAST or size < 0.1 or left > CLOSE * size:
        return None
    first = f"the update of step {step + 1} is {math.exp(logs[0]):.2f} times as large as it should be"
    return Incident(
        "optimizer counter",
        f"{side.name}: Adam's step counter was not restored at the resume after step {step}: its bias correction begins anew",
        (f"{first}; a counter that begins anew gives {math.exp(wanted[0]):.2f}", f"so do the {len(logs)} steps after it"),
    )


def _usual_update(sizes: Mapping[int, float], rate: Mapping[int, float], step: int) -> float:
    """Return the update of a unit of learning rate before a resume, where the run itself shows it."""
    known = [sizes[s] / rate[s] for s in range(max(step - 7, 1), step + 1) if sizes.get(s) and rate.get(s)]
    return float(np.median(known)) if len(known) >= LEAST else 0.0


def _correction(count: int, betas: tuple[float, float]) -> float:
    """Return what Adam's bias correction multiplies an update with at its step `count`."""
    return math.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)


def drifting_copies(compared: Compared) -> Iterator[Incident]:
    """Copies of a parameter that differ between ranks: clipping or a reduction that some leave out (BLOOM: norms, and a tie)."""
    for side in compared.sides:
        drifts = [(step, match) for step, field, text in side.texts if field == "drift" for match in DRIFT.finditer(text)]
        for across in ("tensor", "pipeline", "data"):
            found = [(step, match) for step, match in drifts if match[2] == across]
            if found:
                yield _drift_incident(side, across, found)


def _drift_incident(side: Side, across: str, found: list[tuple[int, re.Match[str]]]) -> Incident:
    step, first = found[0]
    names = list(dict.fromkeys(match[1] for _, match in found))
    grown = [float(match[5]) for _, match in found if match[1] == first[1]]
    evidence = [f"seen at step {step}: rank {first[3]} of {first[4]}, by up to {first[5]}"]
    if len(grown) > 1 and grown[-1] > grown[0]:
        evidence.append(f"it grows: {grown[-1]:.3g} at step {found[-1][0]}")
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if across == "pipeline":
        evidence += list(_spike_at_resume(side))
        text = f"the tied weight {shown} differs between the first and the last stage: its gradients are not reduced over both"
        return Incident("tied weights", f"{side.name}: {text}", tuple(evidence))
    if across == "data":
        text = f"{shown} differs between data ranks: gradients are not reduced over all, or a device computes wrongly"
        return Incident("replicas drift", f"{side.name}: {text}", tuple(evidence))
    clip, norms = side.facts.get("recipe.optimizer.clip"), side.column("grad_norm")
    clipped = [s for s, norm in norms.items() if clip and norm > clip and s <= step]
    if clipped:
        cause = "clipping is not applied on all of them"
        evidence.append(
            f"clipping acted before: the gradient norm of step {clipped[-1]} was {norms[clipped[-1]]:.3g}, the limit is {clip:g}"
        )
    else:
        cause = "clipping or a reduction is not applied on all of them"
    return Incident(
        "tensor ranks drift",
        f"{side.name}: {shown}, of which all tensor ranks hold a copy, differs between them: {cause}",
        tuple(evidence),
    )


def _spike_at_resume(side: Side) -> Iterator[str]:
    for event in side.events:
        resumed = [step for step in side.resumed_after() if 0 < event.onset_step - step <= 8]
        if event.kind == "resume_artefact" and resumed and event.delta > 0:
            yield f"the loss rises by {event.delta:.2g} at the resume after step {resumed[-1]}, which loads one copy into both"


def read_again(compared: Compared) -> Iterator[Incident]:
    """The sampler begins anew at a resume, and the loss is too low: PTL and IDEFICS read what they had read."""
    for side, other in _each(compared):
        for step in side.resumed_after():
            evidence = [*_position_jumps(side, step), *_same_batches(side, step)]
            if evidence:  # a loss that is too low has other causes, too: alone it proves nothing
                evidence += _too_low(side, other, step)
                text = f"{side.name}: the resume after step {step} reads data again that the run had read: the sampler began anew"
                yield Incident("data read again", text, tuple(evidence))


def _position_jumps(side: Side, step: int) -> Iterator[str]:
    consumed, tokens = side.column("consumed_tokens"), side.column("tokens")
    if step in consumed and step + 1 in consumed and step + 1 in tokens:
        expected = consumed[step] + tokens[step + 1]
        if consumed[step + 1] < expected:
            yield f"{consumed[step + 1]:.0f} tokens are consumed after step {step + 1}; continued, it would be {expected:.0f}"


def _same_batches(side: Side, step: int) -> Iterator[str]:
    """Yield how alike the losses after the resume are to those of the run's start: hard batches stay hard."""
    losses = side.column("loss")
    count = min(max(losses, default=0) - step, step)
    windows = [[losses.get(first + i, math.nan) for i in range(count)] for first in (1, step + 1)]
    if count < 8:
        return
    bumps = [np.diff(window, 2) for window in windows]
    known = np.isfinite(bumps[0]) & np.isfinite(bumps[1])
    if known.sum() >= 6 and all(np.ptp(b[known]) > 0 for b in bumps):
        alike = float(np.corrcoef(bumps[0][known], bumps[1][known])[0, 1])
        # the chance of so much by accident: Fisher's transformation of a correlation is normal
        if math.atanh(min(alike, 1 - 1e-12)) * math.sqrt(known.sum() - 3) > 4:
            yield f"the losses of its steps from {step + 1} on rise and fall as those from step 1 on (correlation {alike:.2f})"


def _too_low(side: Side, other: Side | None, step: int) -> Iterator[str]:
    for event in side.events:
        if event.kind == "resume_artefact" and 0 < event.onset_step - step <= 8 and event.delta < 0:
            yield f"the loss falls by {-event.delta:.2g} below its curve at step {event.onset_step}"
            return
    losses, beside = side.column("loss"), other.column("loss") if other else {}
    later = [losses[s] - beside[s] for s in range(step + 1, step + AFTER + 1) if s in losses and s in beside]
    if len(later) >= LEAST and max(later) < 0 and step in beside and beside[step] == losses.get(step):
        yield f"the loss is lower than the other run's at each of the {len(later)} steps after it, by {-np.median(later):.2g}"


def rate_off_schedule(compared: Compared) -> Iterator[Incident]:
    """A learning rate that is not the schedule's: a warm-up that counts something else (GLM: 26,850 steps for 6,000)."""
    for side in compared.sides:
        planned = _planned_rates(side)
        actual = side.column("lr")
        factor = side.column("lr_factor")
        wrong = [
            s
            for s in sorted(planned)
            if s in actual and not math.isclose(actual[s], planned[s] * factor.get(s, 1.0), rel_tol=1e-6)
        ]
        if not wrong:
            continue
        first = wrong[0]
        evidence = [f"at step {first} it is {actual[first]:.6g}, the schedule says {planned[first]:.6g}"]
        text = f"{side.name}: the learning rate is not what its schedule gives, from step {first} on"
        counted = _counter_of(side, actual, wrong)
        if counted:
            text += f": it is counted as {counted}"
        yield Incident("schedule's counter", text, tuple(evidence))


def _schedule(facts: Mapping[str, Any]) -> tuple[recipes.Schedule, recipes.Batch] | None:
    name = facts.get("recipe.schedule.class")
    kind = getattr(recipes, str(name), None) if name in SCHEDULES else None
    if kind is None:
        return None
    groups = [_fields(facts, group, of) for group, of in (("schedule", kind), ("batch", recipes.Batch))]
    try:
        batch = recipes.Batch(**groups[1] | {"ramp": tuple(tuple(stage) for stage in groups[1].get("ramp", ()))})
        return kind(**groups[0]), batch
    except TypeError:  # a record of another version
        return None


def _fields(facts: Mapping[str, Any], group: str, kind: type) -> dict[str, Any]:
    names = kind.__dataclass_fields__
    return {name: facts[f"recipe.{group}.{name}"] for name in names if f"recipe.{group}.{name}" in facts}


def _rate(facts: Mapping[str, Any], step: int, tokens: int) -> float | None:
    made, peak, steps = _schedule(facts), facts.get("recipe.optimizer.lr"), facts.get("recipe.steps")
    if made is None or not isinstance(peak, int | float) or not isinstance(steps, int):
        return None
    schedule, batch = made
    whole = seqs_after(batch, steps) * batch.seq_len
    try:
        return learning_rate(schedule, peak, step=step, tokens=tokens, run_steps=steps, run_tokens=whole)
    except (ArithmeticError, AssertionError, TypeError):
        return None


def _planned_rates(side: Side) -> dict[int, float]:
    """Return step -> the rate that the schedule of the segment in force gives."""
    consumed = side.column("consumed_tokens")
    planned = {}
    for step in side.column("lr"):
        segment = side.record.at(step)
        rate = _rate(segment.facts, step, int(consumed.get(step, 0))) if segment and step > 0 else None
        in_tokens = segment is not None and segment.facts.get("recipe.schedule.warmup_tokens") is not None
        if rate is not None and (step in consumed or not in_tokens):
            planned[step] = rate
    return planned


def _counter_of(side: Side, actual: Mapping[int, float], wrong: list[int]) -> str:
    """Return which count of steps gives the rates that were used, in words; "" where none does."""
    segment = side.record.at(wrong[0])
    facts = segment.facts if segment else {}
    made = _schedule(facts)
    if made is None or made[0].warmup_steps is None:
        return ""
    peak = facts["recipe.optimizer.lr"]
    limit = int(facts["recipe.steps"])
    rates = {count: _rate(facts, count, 0) for count in range(1, limit + 1)}
    usable = [s for s in wrong if actual[s] < peak][:MOST_COUNTED]
    matches = {
        s: [c for c, rate in rates.items() if rate is not None and math.isclose(rate, actual[s], rel_tol=1e-6)] for s in usable
    }
    shifts = [{c - s for c in matches[s]} for s in usable]
    common = set.intersection(*shifts) if shifts else set()
    if common:
        shift = min(common, key=abs)
        anew = [step for step in side.resumed_after() if step == -shift]
        return f"from 1 again after the resume at step {anew[0]}" if anew else f"step {usable[0] + shift} at step {usable[0]}"
    warmup = made[0].warmup_steps
    slopes = [actual[s] / peak * warmup / s for s in usable if s < warmup]
    if len(slopes) >= 2 and np.ptp(slopes) <= 1e-6 * max(slopes):
        return f"{slopes[0]:.4g} of a step at each step: the warm-up takes {warmup / slopes[0]:.0f} steps for {warmup}"
    return ""


def exchanged_data(compared: Compared) -> Iterator[Incident]:
    """Other data from a segment on, or than the other run's, and numbers that are not finite: GLM exchanged a part so."""
    for side, other in _each(compared):
        broken = _first_not_finite(side)
        if broken is None:
            continue
        exchanged = [(after, names) for before, after in pairwise(side.record.segments) if (names := _other_data(before, after))]
        last = next(((after, names) for after, names in reversed(exchanged) if after.step < broken), None)
        if last is not None:
            what = f"the data were exchanged after step {last[0].step}, and the numbers are not finite from step {broken} on"
            yield Incident("data exchanged", f"{side.name}: {what}", tuple(f"{name} is another" for name in last[1][:3]))
        elif other is not None and _first_not_finite(other) is None:
            apart = [d.name for d in compared.differences if d.name.startswith(DATA) and d.can_change_loss and not d.follows]
            text = f"{side.name} reads other data, and its numbers are not finite from step {broken} on"
            if apart:
                yield Incident("data exchanged", text, tuple(f"{name} is another" for name in apart[:3]))


def _other_data(before: Segment, after: Segment) -> list[str]:
    return [name for name in changed_facts(before.facts, after.facts) if name.startswith(DATA)]


def _first_not_finite(side: Side) -> int | None:
    if side.table is None:
        return None
    trained = side.table["step"] > 0
    bad = np.zeros(len(trained), dtype=bool)
    for name in ("loss", "grad_norm"):
        if name in side.table:
            bad |= trained & ~np.isfinite(side.table[name])
    return int(side.table["step"][bad][0]) if bad.any() else None


def _each(compared: Compared) -> Iterator[tuple[Side, Side | None]]:
    """Yield each run with the other one."""
    for side in compared.sides:
        yield side, next((other for other in compared.sides if other is not side), None)


RULES = (adam_counter, drifting_copies, read_again, rate_off_schedule, exchanged_data)


def number_incidents(compared: Compared) -> list[Incident]:
    return [incident for rule in RULES for incident in rule(compared)]
