"""Finds evidence in the optimizer: its rate, its moments, the size of its updates, the precision of its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from recipes.common.anomalies.robust_window import MAD_TO_SD
from recipes.common.config.lr_schedules import learning_rate_at
from recipes.common.monitor.parameter_groups import group_of
from tools.spikes.evidence.case import Case
from tools.spikes.evidence.causes import ATTENTION, BIT_FLIP, FP16, LEARNING_RATE, STALE_MOMENT
from tools.spikes.evidence.findings import Evidence, Finding, Unanswered

HISTORY = 12  # steps before, with whose median a statistic is compared
JUST_BEFORE = 3  # of them for updates, which momentum ties to the step before and which drift over a dozen steps
QUIET_LOGIT = 4.0  # attention logits below this are far from saturation, however they grow
MONITOR = "keep the monitor on (Recipe.monitor)"


def learning_rate(case: Case) -> Iterator[Evidence]:
    """Compare the logged rate with the recipe's schedule, and the size of the updates with the logged rate."""
    wrong = []
    for step in case.near_onset():
        logged = case.at("lr", step)
        factor = case.at("lr_factor", step)  # a rewind may have lowered the rate for a stretch
        right = learning_rate_at(case.recipe, step, int(case.at("consumed_tokens", step))) * (factor if factor == factor else 1.0)
        if math.isfinite(logged) and abs(logged - right) > 1e-6 * max(abs(right), 1e-30):
            wrong.append((step, logged, right))
    if wrong:
        step, logged, right = wrong[0]
        text = f"lr was {logged:.3g} at step {step}; the recipe's schedule gives {right:.3g} ({len(wrong)} steps near it)"
        yield Finding(LEARNING_RATE, 8.0, text)
    else:
        yield Finding(LEARNING_RATE, -1.0, "the logged lr is the recipe's schedule")
    jump = _jump_of_updates(case)
    if jump is None:
        yield Unanswered(LEARNING_RATE, "whether the optimizer used the logged rate", MONITOR)
        return
    if wrong:
        return
    step, factors = jump
    factor, spread = float(np.median(factors)), _log_spread(factors)
    rms = _middle(_ratio(case, "adam_rms", step))
    if (factor > 1.5 or factor < 0.67) and spread < 0.25 and 0.75 < rms < 1.33:
        text = f"at step {step} every tensor's update per unit of lr became {factor:.2g} times as large, g/sqrt(v) did not"
        yield Finding(LEARNING_RATE, 7.0, text)
    else:
        text = f"update per unit of lr at step {step}: {factor:.2g} times that of the steps before, g/sqrt(v) {rms:.2g} times"
        yield Finding(LEARNING_RATE, -3.0, f"{text}, scattered by {spread:.2f} over the tensors: not the rate")


def second_moment(case: Case) -> Iterator[Evidence]:
    """Find g/sqrt(v) that moves without g: v does not match these gradients (arXiv 2304.13013, RMS_t over 2.3)."""
    if case.stats is None or "adam_rms" not in case.stats.values:
        yield Unanswered(STALE_MOMENT, "whether g/sqrt(v) moved without g", MONITOR)
        return
    best, text = 1.0, "g/sqrt(v) moved only as the gradients did"
    for step in _steps_near(case):
        rms, grads = _ratio(case, "adam_rms", step), _ratio(case, "grad_norm", step)
        for part, chosen in _parts(case).items():
            moved, of_gradient = _middle(rms[chosen]), _middle(grads[chosen])
            # it must move more than g does, and move at all
            apart = min(moved, moved / of_gradient) if moved > 1 else 1 / max(moved, moved / of_gradient)
            if apart > best:
                where = "all parts" if part == "all" else f"the {part} tensors"
                best = apart
                text = f"at step {step} g/sqrt(v) of {where} became {moved:.2g} times as large, g itself {of_gradient:.2g} times"
    yield Finding(STALE_MOMENT, 6.0 if best > 1.8 else 3.0 if best > 1.5 else -4.0, text)


def _middle(ratios: np.ndarray) -> float:
    """Return the median over the tensors whose ratio is finite and over 0; 1 (nothing moved) for none."""
    known = ratios[np.isfinite(ratios) & (ratios > 0)]
    return float(np.median(known)) if known.size else 1.0


def weights_outside_the_optimizer(case: Case) -> Iterator[Evidence]:
    """Find weights that changed by more than the update: | |w_t| - |w_t-1| | is at most |w_t - w_t-1| unless others write."""
    stats = case.stats
    if stats is None or not {"weight_norm", "update_norm"} <= stats.values.keys():
        yield Unanswered(BIT_FLIP, "whether weights changed by more than the optimizer's update", MONITOR)
        return
    weights, updates = stats.values["weight_norm"].astype(np.float64), stats.values["update_norm"].astype(np.float64)
    change = np.abs(np.diff(weights, axis=0))
    # a step's record may hold the weights before or after its update: allow for both
    allowed = np.maximum(updates[1:], updates[:-1]) * 1.02 + 2e-6 * weights[1:]
    near = np.isin(stats.steps[1:], _steps_near(case))[:, None] & np.isfinite(change)
    rows, columns = np.nonzero((change > allowed) & near)
    names = sorted({stats.names[column] for column in columns})
    if not names:
        yield Finding(BIT_FLIP, -1.5, "no weight norm changed by more than the optimizer's update")
        yield Finding(ATTENTION, -0.5, "no weight norm changed by more than the optimizer's update")
        return
    step = int(stats.steps[1:][rows[0]])
    worst = max(zip(rows, columns, strict=True), key=lambda at: change[at] / max(allowed[at], 1e-30))
    text = (
        f"at step {step} the norm of {stats.names[worst[1]]} changed by {change[worst]:.3g}, the optimizer's update was "
        f"{updates[1:][worst]:.3g}: something else wrote to it"
    )
    parts = {group_of(name)[1] for name in names}
    if parts <= {"q", "k", "qkv"} and len(names) > 1:
        yield Finding(ATTENTION, 1.0, f"{text} ({len(names)} tensors, all of queries and keys)")
    elif len(names) <= 2:
        yield Finding(BIT_FLIP, 7.0, text + ("" if len(names) == 1 else f" (and {names[1]})"))
    else:
        yield Finding(BIT_FLIP, 1.0, f"{text} ({len(names)} tensors: more than one bit flip)")


def attention_logits(case: Case) -> Iterator[Evidence]:
    """Measure growth of the largest attention logit, and of queries and keys against other weights (arXiv 2309.14322)."""
    stats = case.stats
    logits = None if stats is None else stats.activations.get("max_attention_logit")
    if logits is None or len(logits) < 2:
        yield Unanswered(ATTENTION, "whether attention logits grew", "log max_attention_logit (Recipe.monitor)")
    else:
        yield _logit_growth(case, stats.activation_steps, np.nanmax(logits, axis=1))
    if stats is not None and "weight_norm" in stats.values:
        yield from _key_growth(case, stats.values["weight_norm"].astype(np.float64))


def _key_growth(case: Case, weights: np.ndarray) -> Iterator[Finding]:
    """Compare the growth of queries and keys with other matrices over the last steps, and with the steps before."""
    parts, stats = _parts(case), case.stats
    keys = [i for part in ("q", "k", "qkv") for i in parts.get(part, [])]
    others = [i for part in ("v", "o", "mlp_in", "mlp_out") for i in parts.get(part, [])]
    until = np.flatnonzero(stats.steps <= case.step + 8)
    if not (keys and others and len(until) > 2 * HISTORY):
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        lead = np.median(weights[:, keys], axis=1) / np.median(weights[:, others], axis=1)
    now, middle, before = lead[until[-1]], lead[until[-1 - HISTORY]], lead[until[-1 - 2 * HISTORY]]
    growth, more = float(now / middle), float(now / middle / (middle / before))
    text = f"query and key weights grew {growth:.2f} times as much as the other matrices in {HISTORY} steps, "
    text += f"{more:.2f} times what they did before"
    weight = 3.0 if growth > 1.3 and more > 1.15 else 1.0 if growth > 1.12 and more > 1.08 else -1.5
    yield Finding(ATTENTION, weight, text)


def _logit_growth(case: Case, steps: np.ndarray, largest: np.ndarray) -> Finding:
    """Judge the largest logits: growth is several records in a row, each over the one before; one leap is a broken weight."""
    until = np.flatnonzero(steps <= max(case.step, case.onset) + 8)
    known = largest[until][np.isfinite(largest[until])]
    if len(known) < 2:
        return Finding(ATTENTION, 0.0, "attention logits were recorded too rarely to say")
    low, now = float(np.median(known[:-1][-6:])), float(known[-1])
    factor, leap = now / max(low, 1e-12), float(np.max(known[1:] / np.maximum(known[:-1], 1e-12)))
    text = f"the largest attention logit went from {low:.3g} to {now:.3g}"
    if leap > 50:
        return Finding(ATTENTION, -1.0, f"{text}, in one leap: no growth")
    if now < QUIET_LOGIT:
        return Finding(ATTENTION, -3.0, f"{text}: far from saturation")
    strong = factor > 3 and now > 2 * QUIET_LOGIT
    return Finding(ATTENTION, 5.0 if strong else 2.5 if factor > 2 else 0.0 if factor > 1.3 else -3.0, text)


def half_precision(case: Case) -> Iterator[Evidence]:
    """Read fp16's loss scale, and the share of gradients that became zero under it."""
    if not case.deepspeed.get("fp16", {}).get("enabled"):
        yield Finding(FP16, -9.0, "the run is not in fp16")
        return
    until = case.steps <= max(case.step, case.onset) + 2
    scale = np.nan_to_num(case.columns.get("loss_scale", np.ones(len(case.steps))), nan=1.0)[until]  # 1 is not logged
    highest, now = float(np.max(scale)), float(scale[-1])
    if now <= highest / 4:
        yield Finding(FP16, 2.5, f"the loss scale fell from {highest:g} to {now:g}")
    elif now <= 16:
        yield Finding(FP16, 1.0, f"the loss scale is {now:g}: fp16 gradients below {6e-8 / now:.0e} are zero")
    else:
        yield Finding(FP16, -2.0, f"the loss scale is {now:g} and did not fall")
    if case.stats is None or "zero_share" not in case.stats.values:
        yield Unanswered(FP16, "what share of the gradients is zero", MONITOR)
        return
    steps, zeros = case.stats.steps, np.nanquantile(case.stats.values["zero_share"], 0.75, axis=1)
    before = zeros[(steps < case.onset - 1) & (steps >= case.onset - 40)]
    after = zeros[(steps >= case.onset) & (steps <= case.step + 8)]
    if len(before) and len(after):
        low, high = float(np.median(before)), float(np.max(after))
        text = f"a quarter of the tensors had over {low:.1%} of their gradient exactly zero before, {high:.1%} after"
        yield Finding(FP16, 5.0 if high > low + 0.05 else 3.0 if high > 0.3 else -1.0, text)


def _steps_near(case: Case) -> list[int]:
    return [int(s) for s in case.steps if case.onset - 3 <= s <= max(case.step, case.onset + 1)]


def _parts(case: Case) -> dict[str, list[int]]:
    """Return part -> columns of its tensors; "all" has every one."""
    names = case.stats.names if case.stats is not None else ()
    parts: dict[str, list[int]] = {"all": list(range(len(names)))}
    for column, name in enumerate(names):
        parts.setdefault(group_of(name)[1], []).append(column)
    return parts


def _ratio(case: Case, stat: str, step: int) -> np.ndarray:
    """Return each tensor's statistic at a step over its median of the steps before the event: [p]; NaN with too few."""
    stats = case.stats
    values = stats.values[stat].astype(np.float64)
    here = np.flatnonzero(stats.steps == step)
    before = np.flatnonzero((stats.steps < min(step, case.onset - 1)) & (stats.steps >= case.onset - 2 - HISTORY))
    if not here.size or len(before) < 3:
        return np.full(values.shape[1], math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return values[here[0]] / np.median(values[before], axis=0)


def _jump_of_updates(case: Case) -> tuple[int, np.ndarray] | None:
    """Return (the step near the event whose update per unit of lr differs most from the steps before, each tensor's ratio)."""
    stats = case.stats
    if stats is None or "update_norm" not in stats.values:
        return None
    rates = np.array([case.at("lr", int(s)) for s in stats.steps])
    best = None
    with np.errstate(invalid="ignore", divide="ignore"):
        values = stats.values["update_norm"].astype(np.float64) / rates[:, None]
        for index in np.flatnonzero(np.isin(stats.steps, _steps_near(case))):
            if index < JUST_BEFORE:
                continue
            ratio = values[index] / np.median(values[index - JUST_BEFORE : index], axis=0)
            distance = abs(math.log(_middle(ratio)))
            if np.isfinite(ratio).any() and (best is None or distance > best[0]):
                best = (distance, int(stats.steps[index]), ratio)
    return None if best is None else best[1:]


def _log_spread(factors: np.ndarray) -> float:
    """Return the robust spread of the logarithms: 0 if every tensor moved by the same factor."""
    logs = np.log(factors[np.isfinite(factors) & (factors > 0)])
    return MAD_TO_SD * float(np.median(np.abs(logs - np.median(logs)))) if logs.size else math.inf
