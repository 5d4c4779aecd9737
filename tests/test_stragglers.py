"""A rank slowed by 2.5 % comes first within 50 steps; healthy ranks are called at most once in 10,000 windows."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from recipes.common.pulse import Pulse
from recipes.common.recipe import AdamW, Layout
from recipes.common.stage import Stage
from tests.tiny import ds_config, tiny_config
from tools.common.local_ranks import run_ranks
from tools.common.numerics import Trial, build_trainer, rank_batches
from tools.throughput.stragglers import WINDOW_STEPS, judge, rank_stragglers
from tools.throughput.timings import read_timings

WINDOWS = 10_000


def windows(rng, ranks, noise, count):
    """Seconds [count, steps, ranks] of healthy ranks: machines differ by 0.3 %, steps by 5 %, and there is noise of 1 %."""
    shape = (count, WINDOW_STEPS, ranks)
    if noise == "heavy tails":
        lines = 0.01 * rng.standard_t(3, shape)
    else:
        lines = rng.normal(0, 0.01, shape)
        if noise == "lingering":
            for step in range(1, WINDOW_STEPS):
                lines[:, step] += 0.5 * lines[:, step - 1]
    return np.exp(lines + rng.normal(0, 0.003, (count, 1, ranks)) + rng.normal(0, 0.05, (count, WINDOW_STEPS, 1)))


@pytest.mark.parametrize("noise", ["normal", "heavy tails", "lingering"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_healthy_ranks_are_not_called(ranks, noise):
    rng = np.random.default_rng(1)
    called = sum(judge(windows(rng, ranks, noise, WINDOWS // 10))[2].any(axis=-1).sum() for _ in range(10))
    assert called <= 1


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
@pytest.mark.parametrize("noise", ["normal", "heavy tails", "lingering"])
def test_a_rank_slower_by_2_5_percent_is_first_within_50_steps(ranks, noise):
    seconds = windows(np.random.default_rng(2), ranks, noise, 200)
    slow = ranks // 2
    seconds[..., slow] *= 1.025
    slower, score, _ = judge(seconds)
    assert (score.argmax(axis=-1) == slow).mean() >= 0.995
    assert slower[:, slow].mean() == pytest.approx(0.025, abs=0.003)


def test_many_ranks_make_the_call_certain():
    seconds = windows(np.random.default_rng(3), 64, "normal", 200)
    seconds[..., 5] *= 1.025
    assert judge(seconds)[2][:, 5].mean() > 0.9


def test_one_slow_step_is_no_slow_rank():
    seconds = windows(np.random.default_rng(4), 4, "normal", 50)
    seconds[:, 7, 2] *= 40
    assert not judge(seconds)[2].any()


def test_few_steps_call_nobody():
    seconds = np.ones((5, 4))
    seconds[:, 1] = 2.0
    assert not judge(seconds)[2].any()


STEPS, SLOW_RANK, SLOWER_SECONDS = 12, 1, 0.02


def test_a_rank_that_computes_slowly_is_told_from_those_that_wait_for_it(tmp_path):
    run_ranks(_train_with_a_slow_rank, 2, str(tmp_path))
    first, second = rank_stragglers(read_timings(tmp_path))
    assert first.rank == SLOW_RANK and first.slower > 0.2
    assert second.slower < 0
    assert first.gain_ms > 1e3 * SLOWER_SECONDS


def _train_with_a_slow_rank(out: str) -> None:
    trial = Trial(
        model=tiny_config("llama"),
        layout=Layout(),
        world_size=2,
        optimizer=AdamW(lr=1e-3),
        deepspeed=ds_config("zero1_fp32.json"),
        steps=STEPS,
    )
    trainer = build_trainer(trial)
    if dist.get_rank() == SLOW_RANK:
        forward = Stage.forward

        def slow(*arguments):
            time.sleep(SLOWER_SECONDS)
            return forward(*arguments)

        Stage.forward = slow
    pulse = Pulse(Path(out), dist.get_rank())
    pulse.start(trainer)
    for step, micro_batches in enumerate(rank_batches(trial, trainer), start=1):
        pulse.beat(step, "data")
        pulse.beat(step, "step")
        trainer.train_step(micro_batches, 1e-3, trial.global_seqs * trial.seq_len)
    pulse.beat(STEPS, "end")
