"""Schedules against transformers' and torch's own, and the batch ramp against a step-by-step simulation."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from transformers import LlamaConfig

from recipes.common.config.lr_schedules import (
    global_seqs_at,
    learning_rate,
    learning_rate_at,
    ramp_problems,
    schedule_problems,
    seqs_after,
    tokens_of_run,
)
from recipes.common.recipe import SGD, WSD, AdamW, Batch, Constant, Cosine, InverseSqrt, Layout, Linear, Recipe

PEAK, STEPS, SEQ_LEN = 3e-4, 200, 16


def make_recipe(schedule, *, steps: int = STEPS, lr: float = PEAK, ramp=(), global_seqs: int = 8) -> Recipe:
    return Recipe(
        name="r",
        model=LlamaConfig(),
        num_params=1,
        tokenizer="t",
        data="d",
        layouts={1: Layout()},
        batch=Batch(seq_len=SEQ_LEN, micro_seqs=1, global_seqs=global_seqs, ramp=ramp),
        optimizer=AdamW(lr=lr),
        schedule=schedule,
        steps=steps,
        deepspeed="zero1_fp32.json",
    )


def ours(schedule, steps: int = STEPS) -> list[float]:
    recipe = make_recipe(schedule, steps=steps)
    assert schedule_problems(recipe) == []
    return [learning_rate_at(recipe, step, 10**9) for step in range(1, steps + 1)]


def theirs(make_scheduler, steps: int = STEPS) -> list[float]:
    """lr after 1, 2, ... scheduler steps: their lambda(s), which is our step s."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


LOW = 3e-5
ORACLES = {
    "constant": (Constant(warmup_steps=20), lambda o: transformers.get_constant_schedule_with_warmup(o, 20)),
    "linear": (Linear(warmup_steps=20), lambda o: transformers.get_linear_schedule_with_warmup(o, 20, STEPS)),
    "linear to min_lr, before the end": (
        Linear(warmup_steps=20, decay_steps=150, min_lr=LOW),
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 20, 150, lr_end=LOW, power=1.0),
    ),
    "cosine": (Cosine(warmup_steps=20), lambda o: transformers.get_cosine_schedule_with_warmup(o, 20, STEPS)),
    "cosine to min_lr": (
        Cosine(warmup_steps=20, min_lr=LOW),
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 20, STEPS, min_lr=LOW),
    ),
    "cosine without warm-up": (
        Cosine(warmup_steps=0, min_lr=LOW),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=LOW),
    ),
    "inverse square root": (
        InverseSqrt(warmup_steps=20),
        lambda o: transformers.get_inverse_sqrt_schedule(o, num_warmup_steps=20),
    ),
} | {
    f"wsd {shape}": (
        WSD(warmup_steps=20, cooldown_steps=50, shape=shape),
        lambda o, shape=shape: transformers.get_wsd_schedule(o, 20, 50, num_training_steps=STEPS, decay_type=shape),
    )
    for shape in ("linear", "cosine", "1-sqrt")
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_known_scheduler(name: str) -> None:
    schedule, make_scheduler = ORACLES[name]
    assert ours(schedule) == pytest.approx(theirs(make_scheduler), rel=1e-9, abs=1e-18)


def test_wsd_with_min_lr_equals_transformers_after_its_warm_up() -> None:
    # transformers warms up from min_lr there, ours from 0: compare from the peak on
    schedule = WSD(warmup_steps=20, cooldown_steps=50, shape="1-sqrt", min_lr=LOW)
    expected = theirs(
        lambda o: transformers.get_wsd_schedule(o, 20, 50, num_training_steps=STEPS, decay_type="1-sqrt", min_lr_ratio=LOW / PEAK)
    )
    assert ours(schedule)[19:] == pytest.approx(expected[19:], rel=1e-9)


SCHEDULES = [
    Constant(warmup_steps=20),
    Linear(warmup_steps=20, min_lr=LOW),
    Cosine(warmup_steps=20, min_lr=LOW),
    WSD(warmup_steps=20, cooldown_steps=50, min_lr=LOW),
    InverseSqrt(warmup_steps=20, min_lr=LOW),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_the_convention_of_first_and_last_step(schedule) -> None:
    rates = ours(schedule)
    assert rates[0] == pytest.approx(PEAK / 20)  # step 1 already learns
    assert rates[19] == PEAK
    if isinstance(schedule, Linear | Cosine | WSD):
        assert rates[-1] == LOW  # exactly
        assert rates[-2] > LOW
    assert all(earlier >= later for earlier, later in pairwise(rates[19:]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_tokens_equal_steps_at_a_constant_batch(schedule) -> None:
    per_step = 8 * SEQ_LEN
    lengths = {key: value for key, value in vars(schedule).items() if key.endswith("_steps") and value is not None}
    others = {key: value for key, value in vars(schedule).items() if not key.endswith(("_steps", "_tokens"))}
    tokens = {key.replace("_steps", "_tokens"): value * per_step for key, value in lengths.items()}
    recipe = make_recipe(type(schedule)(**tokens, **others))
    assert schedule_problems(recipe) == []
    rates = [learning_rate_at(recipe, -1, step * per_step) for step in range(1, STEPS + 1)]
    assert rates == pytest.approx(ours(schedule), rel=1e-12)


def test_a_schedule_in_tokens_ends_at_min_lr_with_a_ramp() -> None:
    recipe = make_recipe(Cosine(warmup_tokens=640, min_lr=LOW), ramp=((50, 2), (130, 6)))
    consumed_seqs, rates = 0, []
    for step in range(1, STEPS + 1):
        consumed_seqs += global_seqs_at(recipe.batch, consumed_seqs)
        rates.append(learning_rate_at(recipe, step, consumed_seqs * SEQ_LEN))
    assert rates[-1] == LOW < rates[-2]
    assert max(rates) == PEAK


def test_max_steps_does_not_bend_the_schedule() -> None:
    known = {"tokens": 0, "run_steps": STEPS, "run_tokens": 1}
    assert learning_rate(Cosine(warmup_steps=1), PEAK, step=100, **known) == ours(Cosine(warmup_steps=1))[99]


def test_warm_up_of_zero_starts_at_once() -> None:
    assert ours(Constant(warmup_steps=0)) == [PEAK] * STEPS


def test_the_ramp_equals_a_simulation() -> None:
    rng = random.Random(0)
    for _ in range(300):
        ramp, until, seqs = [], 0, 0
        for _ in range(rng.randint(0, 4)):
            until += rng.randint(1, 200)
            seqs += rng.randint(1, 20)
            ramp.append((until, seqs))
        batch = Batch(seq_len=SEQ_LEN, micro_seqs=1, global_seqs=seqs + rng.randint(1, 20), ramp=tuple(ramp))
        consumed = 0
        for steps in range(120):
            assert seqs_after(batch, steps) == consumed
            expected = next((size for end, size in ramp if consumed < end), batch.global_seqs)
            assert global_seqs_at(batch, consumed) == expected
            consumed += expected
        recipe = replace(make_recipe(Constant(warmup_steps=0), steps=120), batch=batch)
        assert tokens_of_run(recipe) == consumed * SEQ_LEN


BAD_SCHEDULES = {
    "has no warmup": Cosine(),
    "has no cooldown": WSD(warmup_steps=3),
    "every length in tokens": WSD(warmup_steps=3, cooldown_tokens=50),
    "warmup_steps=3, warmup_tokens=50": Constant(warmup_steps=3, warmup_tokens=50),
    "warmup_steps=-1 must be 0 or more": Constant(warmup_steps=-1),
    "more than the run: the run has 200 steps": WSD(warmup_steps=100, cooldown_steps=101),
    "more than the run: the run has 25600 tokens": WSD(warmup_tokens=100, cooldown_tokens=25_501),
    "use that": WSD(warmup_steps=10, cooldown_steps=0),
    "did you mean '1-sqrt'": WSD(warmup_steps=10, cooldown_steps=10, shape="sqrt"),
    "ends before the warm-up": Cosine(warmup_steps=10, decay_steps=10),
    "leaves nothing to decay": Linear(warmup_steps=200),
    "never reaches the peak": Constant(warmup_steps=201),
    "min_lr=0.1 must lie between 0 and optimizer.lr=0.0003": Cosine(warmup_steps=1, min_lr=0.1),
    "min_lr=nan": Cosine(warmup_steps=1, min_lr=float("nan")),
    "needs a warm-up over 0": InverseSqrt(warmup_steps=0),
}


@pytest.mark.parametrize("message", BAD_SCHEDULES)
def test_schedule_problems(message: str) -> None:
    problems = schedule_problems(make_recipe(BAD_SCHEDULES[message]))
    assert len(problems) == 1, problems
    assert message in problems[0]


def test_all_schedule_problems_at_once() -> None:
    assert len(schedule_problems(make_recipe(WSD(shape="square", min_lr=1.0)))) == 4


BAD_RAMPS = {
    "must both be positive": ((0, 4),),
    "not a multiple of batch.micro_seqs=1 x 2 data ranks = 2": ((50, 3),),
    "must end later than the stage before it": ((50, 2), (50, 4)),
    "a ramp grows": ((50, 4), (90, 2)),
    "fewer than batch.global_seqs=8": ((50, 8),),
    "batch.global_seqs=8 is never reached": ((400, 2),),
}


@pytest.mark.parametrize("message", BAD_RAMPS)
def test_ramp_problems(message: str) -> None:
    problems = ramp_problems(make_recipe(Constant(warmup_steps=0), ramp=BAD_RAMPS[message]), data=2)
    assert len(problems) == 1, problems
    assert re.search(re.escape(message), problems[0])


def test_good_ramps_have_no_problems() -> None:
    for ramp in ((), ((50, 2),), ((50, 2), (90, 4))):
        assert ramp_problems(make_recipe(Constant(warmup_steps=0), ramp=ramp), data=2) == []


def test_sgd_recipes_work_too() -> None:
    recipe = replace(make_recipe(Constant(warmup_steps=4)), optimizer=SGD(lr=0.1))
    assert learning_rate_at(recipe, 2, 0) == pytest.approx(0.05)
