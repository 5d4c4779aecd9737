"""Computes the learning rate and the batch size as pure functions of how far the run is. No state, so nothing to resume.

Convention, everywhere: step s counts from 1, and its place on the schedule is the end of the step: x = s, or the tokens
consumed up to and including step s. So step 1 of a warm-up of W steps uses peak / W (not 0, which would waste a step),
step W uses the peak, and the last step of the run uses `min_lr` exactly. `transformers`' schedulers use lambda(s - 1)
at step s; ours is their lambda(s).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from recipes.common.recipe import WSD, Batch, Constant, Cosine, InverseSqrt, Linear, Recipe, Schedule

SHAPES = ("linear", "cosine", "1-sqrt")


def in_tokens(schedule: Schedule) -> bool:
    """Return whether a schedule that `schedule_problems` has accepted has its lengths in tokens; else in steps."""
    return schedule.warmup_tokens is not None


def learning_rate(schedule: Schedule, peak_lr: float, *, step: int, tokens: int, run_steps: int, run_tokens: int) -> float:
    """Return the learning rate that step `step` uses.

    step: counts from 1. tokens: consumed up to and including this step. run_steps, run_tokens: of the whole run as the
    recipe says it (`--max-steps` does not change them). Only the pair in the schedule's own unit is used.
    """
    now, end = (tokens, run_tokens) if in_tokens(schedule) else (step, run_steps)
    warmup = _length(schedule, "warmup")
    assert warmup is not None, "a schedule that schedule_problems has not accepted"
    if now < warmup:
        return peak_lr * now / warmup
    match schedule:
        case Constant():
            return peak_lr
        case InverseSqrt():
            return max(peak_lr * math.sqrt(warmup / now), schedule.min_lr)
        case Linear() | Cosine():
            decay = _length(schedule, "decay")
            shape = "linear" if isinstance(schedule, Linear) else "cosine"
            return _decayed(peak_lr, schedule.min_lr, shape, now, warmup, end if decay is None else decay)
        case WSD():
            cooldown = _length(schedule, "cooldown")
            assert cooldown is not None, "a schedule that schedule_problems has not accepted"
            return _decayed(peak_lr, schedule.min_lr, schedule.shape, now, end - cooldown, end)


def learning_rate_at(recipe: Recipe, step: int, tokens: int) -> float:
    """Return a recipe's learning rate: step counts from 1, tokens are those consumed up to and including it."""
    return learning_rate(
        recipe.schedule,
        recipe.optimizer.lr,
        step=step,
        tokens=tokens,
        run_steps=recipe.steps,
        run_tokens=tokens_of_run(recipe),
    )


def global_seqs_at(batch: Batch, consumed_seqs: int) -> int:
    """Return the sequences of the next step, when `consumed_seqs` have been consumed before it."""
    for until_seqs, global_seqs in batch.ramp:
        if consumed_seqs < until_seqs:
            return global_seqs
    return batch.global_seqs


def seqs_after(batch: Batch, steps: int, consumed_seqs: int = 0) -> int:
    """Return the sequences consumed after `steps` steps more, the ramp included; by default after the first of a run."""
    for until_seqs, global_seqs in batch.ramp:
        if consumed_seqs < until_seqs:
            in_stage = min(steps, -((consumed_seqs - until_seqs) // global_seqs))  # rounded up: the last step may pass
            consumed_seqs += in_stage * global_seqs
            steps -= in_stage
    return consumed_seqs + steps * batch.global_seqs


def tokens_of_run(recipe: Recipe) -> int:
    """Return the tokens that `recipe.steps` steps consume, the batch ramp included."""
    return seqs_after(recipe.batch, recipe.steps) * recipe.batch.seq_len


def schedule_problems(recipe: Recipe) -> list[str]:
    """Return everything wrong with `recipe.schedule`, given its `steps`, `batch` and `optimizer.lr` (which must be sane)."""
    schedule = recipe.schedule
    problems = list(_length_problems(schedule))
    if not problems:
        run = tokens_of_run(recipe) if in_tokens(schedule) else recipe.steps
        problems += _span_problems(schedule, run)
    if isinstance(schedule, WSD) and schedule.shape not in SHAPES:
        close = difflib.get_close_matches(str(schedule.shape), SHAPES, n=1, cutoff=0.4)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        problems.append(f"schedule.shape={schedule.shape!r} must be one of {', '.join(SHAPES)}{hint}")
    min_lr, lr = getattr(schedule, "min_lr", 0.0), recipe.optimizer.lr
    if not 0 <= min_lr <= lr:
        problems.append(f"schedule.min_lr={min_lr} must lie between 0 and optimizer.lr={lr}, the peak")
    return problems


def ramp_problems(recipe: Recipe, data: int) -> list[str]:
    """Return everything wrong with `recipe.batch.ramp`. data: data-parallel ranks, which must divide every batch."""
    batch = recipe.batch
    problems = []
    unit = batch.micro_seqs * data
    before_until, before_seqs = 0, 0
    for index, (until_seqs, global_seqs) in enumerate(batch.ramp):
        name = f"batch.ramp[{index}]=({until_seqs}, {global_seqs})"
        if min(until_seqs, global_seqs) < 1:
            return [f"{name}: (until_sequences, global_seqs) must both be positive"]
        if global_seqs % unit:
            problems.append(
                f"{name}: {global_seqs} sequences are not a multiple of batch.micro_seqs={batch.micro_seqs} x {data} data "
                f"ranks = {unit}; use a multiple of {unit}, or a smaller micro_seqs"
            )
        if until_seqs <= before_until:
            problems.append(f"{name}: must end later than the stage before it, which ends at {before_until} sequences")
        if not before_seqs < global_seqs < batch.global_seqs:
            problems.append(
                f"{name}: a ramp grows: {global_seqs} sequences must be more than {before_seqs} and fewer than "
                f"batch.global_seqs={batch.global_seqs}"
            )
        before_until, before_seqs = until_seqs, global_seqs
    if batch.ramp and not problems:
        total_seqs = seqs_after(batch, recipe.steps)
        if total_seqs <= before_until:
            problems.append(
                f"batch.ramp ends after {before_until} sequences, but steps={recipe.steps} consume {total_seqs}, so "
                f"batch.global_seqs={batch.global_seqs} is never reached; shorten the ramp (it counts sequences, not "
                "tokens)"
            )
    return problems


def _decayed(peak_lr: float, min_lr: float, shape: str, now: int, start: int, end: int) -> float:
    """Return the rate `now` on the way from the peak at `start` down to `min_lr` at `end` and after it."""
    if now <= start:
        return peak_lr
    if now >= end:
        return min_lr
    progress = (now - start) / (end - start)
    if shape == "linear":
        factor = 1.0 - progress
    elif shape == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        assert shape == "1-sqrt", shape
        factor = 1.0 - math.sqrt(progress)
    return min_lr + (peak_lr - min_lr) * factor


def _lengths(schedule: Schedule) -> dict[str, int | None]:
    """Return the schedule's lengths by field name: `warmup_steps`, `warmup_tokens`, ..."""
    return {name: value for name, value in vars(schedule).items() if name.endswith(("_steps", "_tokens"))}


def _length(schedule: Schedule, name: str) -> int | None:
    return getattr(schedule, f"{name}_{'tokens' if in_tokens(schedule) else 'steps'}")


def _length_problems(schedule: Schedule) -> Iterator[str]:
    """Check each length alone, and that all are in one unit."""
    kind = type(schedule).__name__
    given = {name: value for name, value in _lengths(schedule).items() if value is not None}
    for name, value in given.items():
        if value < 0:
            yield f"schedule.{name}={value} must be 0 or more"
    if len({name.rpartition("_")[2] for name in given}) > 1:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        yield f"schedule={kind}({shown}): give every length in steps, or every length in tokens"
    needed = ["warmup", "cooldown"] if isinstance(schedule, WSD) else ["warmup"]
    for name in needed:
        if not any(key.startswith(name) for key in given):
            none = " (0 for none)" if name == "warmup" and not isinstance(schedule, InverseSqrt) else ""
            yield f"schedule={kind}(...) has no {name}: set {name}_steps or {name}_tokens{none}"


def _span_problems(schedule: Schedule, run: int) -> Iterator[str]:
    """Check that the parts fit into the run and into each other. run: its length in the schedule's unit."""
    unit = "tokens" if in_tokens(schedule) else "steps"
    warmup = _length(schedule, "warmup") or 0
    field = f"schedule.warmup_{unit}={warmup}"
    whole = f"the run has {run} {unit}"
    if isinstance(schedule, WSD):
        cooldown = _length(schedule, "cooldown") or 0
        if cooldown == 0:
            yield f"schedule.cooldown_{unit}=0: WSD without a cool-down is Constant(warmup_{unit}={warmup}); use that"
        if warmup + cooldown > run:
            yield f"{field} + cooldown_{unit}={cooldown} is more than the run: {whole}; shorten them, or raise steps"
    elif isinstance(schedule, Linear | Cosine):
        decay = _length(schedule, "decay")
        if decay is not None and decay <= warmup:
            yield f"schedule.decay_{unit}={decay} ends before the warm-up: it counts from 0 and must be over {field}"
        elif decay is None and warmup >= run:
            yield f"{field} leaves nothing to decay: {whole}; shorten it, or raise steps"
    elif warmup > run:
        yield f"{field} never reaches the peak: {whole}; shorten it, or raise steps"
    if isinstance(schedule, InverseSqrt) and warmup == 0:
        yield f"{field}: InverseSqrt falls as sqrt(warm-up / now), so it needs a warm-up over 0"
