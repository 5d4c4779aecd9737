"""Evidence in what the optimizer did: its rate, its moments, the size of its updates, the precision of its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from recipes.common.groups import group_of
from recipes.common.schedules import learning_rate_at
from tools.spikes.case import Case
from tools.spikes.causes import ATTENTION, BIT_FLIP, FP16, LEARNING_RATE, STALE_MOMENT
from tools.spikes.findings import Evidence, Finding, Unanswered

HISTORY = 12  # steps before, whose median a statistic is held against
MONITOR = "keep the monitor on (Recipe.monitor)"


def learning_rate(case: Case) -> Iterator[Evidence]:
    """The logged rate against the recipe's schedule, and the size of the updates against the logged rate."""
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
        yield Finding(LEARNING_RATE, -1.0, "the logged lr is what the recipe's schedule gives")
    jump = _jump(case, "update_norm", per_rate=True)
    if jump is None:
        yield Unanswered(LEARNING_RATE, "whether the optimizer used the rate that was logged", MONITOR)
        return
    step, factors = jump
    factor, spread = float(np.median(factors)), _log_spread(factors)
    rms = float(np.median(_ratio(case, "adam_rms", step)))
    if wrong:
        return
    if (factor > 1.5 or factor < 0.67) and spread < 0.25 and 0.75 < rms < 1.33:
        text = (
            f"at step {step} every tensor's update per unit of lr became {factor:.2g} times what it was, at an ordinary g/sqrt(v)"
        )
        yield Finding(LEARNING_RATE, 7.0, text)
    else:
        yield Finding(LEARNING_RATE, -3.0, f"updates were in proportion to the logged lr (largest change {factor:.2g} times)")


def second_moment(case: Case) -> Iterator[Evidence]:
    """g/sqrt(v) that moves without the gradient: v is not of these gradients (arXiv 2304.13013, RMS_t over 2.3)."""
    if case.stats is None or "adam_rms" not in case.stats.values:
        yield Unanswered(STALE_MOMENT, "whether g/sqrt(v) moved without g", MONITOR)
        return
    best, text = 1.0, "g/sqrt(v) moved only as the gradients did"
    for step in _steps_near(case):
        rms, grads = _ratio(case, "adam_rms", step), _ratio(case, "grad_norm", step)
        for part, chosen in _parts(case).items():
            moved, of_gradient = _middle(rms[chosen]), _middle(grads[chosen])
            # both have to be so: more than g moved, and moved at all
            apart = min(moved, moved / of_gradient) if moved > 1 else 1 / max(moved, moved / of_gradient)
            if apart > best:
                where = "all parts" if part == "all" else f"the {part} tensors"
                best = apart
                text = (
                    f"at step {step} g/sqrt(v) of {where} became {moved:.2g} times what it was, g itself {of_gradient:.2g} times"
                )
    yield Finding(STALE_MOMENT, 6.0 if best > 1.8 else 3.0 if best > 1.5 else -4.0, text)


def _middle(ratios: np.ndarray) -> float:
    """The median of the tensors that have the number and are not zero; 1 (nothing moved) for none."""
    known = ratios[np.isfinite(ratios) & (ratios > 0)]
    return float(np.median(known)) if known.size else 1.0


def weights_outside_the_optimizer(case: Case) -> Iterator[Evidence]:
    """| |w_t| - |w_t-1| | is at most |w_t - w_t-1|, the update: where it is more, something else wrote to the weights."""
    stats = case.stats
    if stats is None or not {"weight_norm", "update_norm"} <= stats.values.keys():
        yield Unanswered(BIT_FLIP, "whether weights changed by more than the optimizer's update", MONITOR)
        return
    weights, updates = stats.values["weight_norm"].astype(np.float64), stats.values["update_norm"].astype(np.float64)
    change = np.abs(np.diff(weights, axis=0))
    # the record of a step may hold the weights of before or after its update: allow for both
    allowed = np.maximum(updates[1:], updates[:-1]) * 1.02 + 2e-6 * weights[1:]
    near = np.isin(stats.steps[1:], _steps_near(case))[:, None] & np.isfinite(change)
    rows, places = np.nonzero((change > allowed) & near)
    names = sorted({stats.names[place] for place in places})
    if not names:
        yield Finding(BIT_FLIP, -1.5, "no weight norm changed by more than the optimizer's update")
        yield Finding(ATTENTION, -0.5, "no weight norm changed by more than the optimizer's update")
        return
    step = int(stats.steps[1:][rows[0]])
    worst = max(zip(rows, places, strict=True), key=lambda at: change[at] / max(allowed[at], 1e-30))
    text = (
        f"at step {step} the norm of {stats.names[worst[1]]} changed by {change[worst]:.3g}, the optimizer's update was "
        f"{updates[1:][worst]:.3g}: something else wrote to it"
    )
    parts = {group_of(name)[1] for name in names}
    if parts <= {"q", "k", "qkv"} and len(names) > 1:
        yield Finding(ATTENTION, 1.0, f"{text} ({len(names)} tensors, all queries and keys)")
    elif len(names) <= 2:
        yield Finding(BIT_FLIP, 7.0, text + ("" if len(names) == 1 else f" (and {names[1]})"))
    else:
        yield Finding(BIT_FLIP, 1.0, f"{text} ({len(names)} tensors: more than one fault of memory)")


def attention_logits(case: Case) -> Iterator[Evidence]:
    """Growth of the largest attention logit, and of queries and keys against all other weights (arXiv 2309.14322)."""
    stats = case.stats
    logits = None if stats is None else stats.activations.get("max_attention_logit")
    if logits is None or len(logits) < 2:
        yield Unanswered(ATTENTION, "whether attention logits grew", "log max_attention_logit (Recipe.monitor)")
    else:
        yield _logit_growth(case, stats.activation_steps, np.nanmax(logits, axis=1))
    if stats is None or "weight_norm" not in stats.values:
        return
    near = np.flatnonzero((stats.steps >= case.onset - 24) & (stats.steps <= case.step + 8))
    if len(near) < 2:
        return
    weights = stats.values["weight_norm"]
    growth = weights[near[-1]] / np.maximum(weights[near[0]], 1e-12)
    parts = _parts(case)
    keys = [i for part in ("q", "k", "qkv") for i in parts.get(part, [])]
    others = [i for part in ("v", "o", "mlp_in", "mlp_out") for i in parts.get(part, [])]
    if keys and others:
        lead = float(np.median(growth[keys]) / np.median(growth[others]))
        text = f"query and key weights grew {lead:.2f} times as much as the other matrices over {len(near)} steps"
        yield Finding(ATTENTION, 3.0 if lead > 1.3 else 1.0 if lead > 1.12 else -1.5, text)


def _logit_growth(case: Case, steps: np.ndarray, largest: np.ndarray) -> Finding:
    """Growth is several records in a row, each over the one before; a single leap is a broken weight."""
    until = np.flatnonzero(steps <= max(case.step, case.onset) + 8)
    seen = largest[until][np.isfinite(largest[until])]
    if len(seen) < 2:
        return Finding(ATTENTION, 0.0, "attention logits were looked at too rarely to say")
    low, now = float(np.median(seen[:-1][-6:])), float(seen[-1])
    factor, leap = now / max(low, 1e-12), float(np.max(seen[1:] / np.maximum(seen[:-1], 1e-12)))
    text = f"the largest attention logit went from {low:.3g} to {now:.3g}"
    if leap > 50:
        return Finding(ATTENTION, -1.0, f"{text}, at one leap: no growth")
    strong = factor > 3 and now > 8
    return Finding(ATTENTION, 5.0 if strong else 2.5 if factor > 2 else 0.0 if factor > 1.5 else -3.0, text)


def half_precision(case: Case) -> Iterator[Evidence]:
    """fp16's loss scale, and gradients that became zero under it."""
    if not case.deepspeed.get("fp16", {}).get("enabled"):
        yield Finding(FP16, -9.0, "the run is not in fp16")
        return
    until = case.steps <= max(case.step, case.onset) + 2
    scale = np.nan_to_num(case.columns.get("loss_scale", np.ones(len(case.steps))), nan=1.0)[until]  # 1 is not logged
    highest, now = float(np.max(scale)), float(scale[-1])
    if now <= highest / 4:
        yield Finding(FP16, 2.5, f"the loss scale fell from {highest:g} to {now:g}")
    elif now <= 16:
        yield Finding(FP16, 1.0, f"the loss scale is {now:g}: fp16 gradients under {6e-8 / now:.0e} are zero")
    else:
        yield Finding(FP16, -2.0, f"the loss scale is {now:g} and did not fall")
    if case.stats is None or "zero_share" not in case.stats.values:
        yield Unanswered(FP16, "which share of the gradients is zero", MONITOR)
        return
    steps, zeros = case.stats.steps, np.nanquantile(case.stats.values["zero_share"], 0.75, axis=1)
    before = zeros[(steps < case.onset - 1) & (steps >= case.onset - 40)]
    after = zeros[(steps >= case.onset) & (steps <= case.step + 8)]
    if len(before) and len(after):
        low, high = float(np.median(before)), float(np.max(after))
        text = f"a quarter of the tensors had over {low:.1%} of their gradient exactly zero before, and {high:.1%} then"
        yield Finding(FP16, 5.0 if high > low + 0.05 else 3.0 if high > 0.3 else -1.0, text)


def _steps_near(case: Case) -> list[int]:
    return [int(s) for s in case.steps if case.onset - 3 <= s <= max(case.step, case.onset + 1)]


def _parts(case: Case) -> dict[str, list[int]]:
    """Part -> places of its tensors; "all" has every one."""
    names = case.stats.names if case.stats is not None else ()
    parts: dict[str, list[int]] = {"all": list(range(len(names)))}
    for place, name in enumerate(names):
        parts.setdefault(group_of(name)[1], []).append(place)
    return parts


def _ratio(case: Case, stat: str, step: int, *, per_rate: bool = False) -> np.ndarray:
    """Each tensor's statistic at a step over its median of the steps before: [p]."""
    stats = case.stats
    values = stats.values[stat].astype(np.float64)
    if per_rate:
        rates = np.array([case.at("lr", int(s)) for s in stats.steps])
        values = values / rates[:, None]
    here = np.flatnonzero(stats.steps == step)
    before = np.flatnonzero((stats.steps < min(step, case.onset - 1)) & (stats.steps >= case.onset - 2 - HISTORY))
    if not here.size or len(before) < 3:
        return np.full(values.shape[1], math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return values[here[0]] / np.nanmedian(values[before], axis=0)


def _jump(case: Case, stat: str, *, per_rate: bool = False) -> tuple[int, np.ndarray] | None:
    """(the step near the event where the median tensor's statistic is farthest from before, each tensor's ratio there)."""
    if case.stats is None or stat not in case.stats.values:
        return None
    best = None
    for step in _steps_near(case):
        ratio = _ratio(case, stat, step, per_rate=per_rate)
        middle = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else math.nan
        if middle > 0 and math.isfinite(middle) and (best is None or abs(math.log(middle)) > best[0]):
            best = (abs(math.log(middle)), step, ratio)
    return None if best is None else best[1:]


def _log_spread(factors: np.ndarray) -> float:
    """Robust spread of the logarithms: 0 where every tensor moved by the same factor."""
    logs = np.log(factors[np.isfinite(factors) & (factors > 0)])
    return 1.4826 * float(np.median(np.abs(logs - np.median(logs)))) if logs.size else math.inf
