"""Measures what the monitor costs: the same training steps with and without it, by turns, in one start of the ranks."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from recipes.common.engine.trainer import Trainer
from recipes.common.monitor.monitor import RunMonitor
from recipes.common.monitor.replica_drift import find_drift
from recipes.common.recipe import ROOT, AdamW, Layout, Monitor
from tests.bench.spikes.scores import Score
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer

GOAL = 0.02  # of the step time, on a CPU; on a GPU at 1B parameters 0.005
WARM_UP = 2  # pairs
# the quickstart's model and batch, and its layout for the 8 processes that launch/quickstart.sh starts
QUICKSTART = LlamaConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
TRIAL = {"seq_len": 128, "micro_seqs": 8, "global_seqs": 32, "chunk_tokens": 2048, "attention": "sdpa"}
EIGHT = {"tensor": 2, "pipeline": 2, "data": 2}

Clocks = tuple[float, float]  # (wall seconds, seconds that this process computed)


def score_overhead(pairs: int) -> list[Score]:
    """Score the monitor's share of the quickstart's step, with everything at its defaults, on one process and on eight."""
    scores = []
    for name, layout in (("1 process", {}), ("8 processes", EIGHT)):
        found = overhead(pairs=pairs, model=QUICKSTART, **layout)
        value = f"{found['share']:.2%} of {found['step_seconds']:.3f} s ({found['wall_share']:.2%} by the wall clock)"
        scores.append(Score(f"monitor's share of a quickstart step, {name}", value, f"{GOAL:.0%}", found["share"] <= GOAL))
    return scores


def overhead(
    *,
    pairs: int,
    model: LlamaConfig,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    deepspeed: str = "zero1_fp32.json",
    device: str = "cpu",
    **trial: Any,
) -> dict[str, float]:
    """Return the share of a step that the default `Monitor` takes, from `pairs` pairs of steps.

    share: on a CPU, of what all ranks compute, which neighbours on the machine do not disturb; on a GPU of the wall clock.
    wall_share, step_seconds: by the wall clock. every_share, activations_share, drift_share: what a step takes longer that looks
    at the parameters, at the layers too, or also at the copies; `share` counts each as often as it happens.
    """
    ranks = tensor * pipeline * data
    wanted = Trial(
        model=model,
        layout=Layout(tensor=tensor, pipeline=pipeline),
        world_size=ranks,
        optimizer=AdamW(lr=4e-3, clip=1.0),
        deepspeed=json.loads((ROOT / "ds_configs" / deepspeed).read_text()),
        device=device,
        **(TRIAL | trial),
    )
    found = run_ranks(_measure, ranks, wanted, pairs, timeout_seconds=3600.0)
    wall = found[0]["wall"]
    computed = {name: sum(rank["computed"][name] for rank in found) for name in wall}
    chosen = computed if device == "cpu" else wall
    shares = {f"{name}_share": chosen[name] / chosen["step"] for name in ("every", "activations", "drift")}
    return {"share": _share(chosen), "wall_share": _share(wall), "step_seconds": wall["step"], **shares}


def _share(seconds: dict[str, float]) -> float:
    monitor = Monitor()
    rare = seconds["activations"] / monitor.activations_every_steps + seconds["drift"] / monitor.drift_every_steps
    return (seconds["every"] + rare) / seconds["step"]


def _measure(trial: Trial, pairs: int) -> dict[str, dict[str, float]]:
    """Return medians for each clock: of a step without the monitor, and of what each of its parts adds."""
    trainer = build_trial_trainer(trial)
    recipe = SimpleNamespace(monitor=replace(Monitor(), drift_every_steps=0), optimizer=trial.optimizer)
    log = SimpleNamespace(note=print) if trainer.grid.rank == 0 else None
    timed: dict[str, list[Clocks]] = {"step": [], "every": [], "activations": [], "drift": []}
    with tempfile.TemporaryDirectory() as folder:
        monitor = RunMonitor(trainer, recipe, Path(folder), log=log)
        for pair in range(-WARM_UP, pairs):
            with_layers = pair % 4 == 0  # rarer, as in training, but often enough for a median
            step = Monitor().activations_every_steps * (pair + WARM_UP + 1) + (not with_layers)
            seconds = {}
            for watched in (False, True) if pair % 2 else (True, False):  # neither profits from the other's caches
                seconds[watched] = _timed(_step, trainer, trial, monitor if watched else None, step)
            if pair >= 0:
                timed["step"].append(seconds[False])
                added = tuple(a - b for a, b in zip(seconds[True], seconds[False], strict=True))
                timed["activations" if with_layers else "every"].append(added)
        timed["drift"] = [_timed(find_drift, trainer) for _ in range(5)]
        monitor.close()
    clocks = {}
    for index, clock in enumerate(("wall", "computed")):
        middle = {name: statistics.median(pair[index] for pair in values) for name, values in timed.items()}
        clocks[clock] = middle | {"activations": max(middle["activations"] - middle["every"], 0.0)}
    return clocks


def _timed(work: Callable[..., object], *args: Any) -> Clocks:
    wall, computed = time.perf_counter(), time.process_time()
    work(*args)
    return time.perf_counter() - wall, time.process_time() - computed


def _step(trainer: Trainer, trial: Trial, monitor: RunMonitor | None, step: int) -> None:
    """Take one training step on random tokens, waiting for the device included."""
    generator = torch.Generator().manual_seed(step)
    count = trial.global_seqs // (trial.micro_seqs * trainer.grid.data)
    shape = (trial.micro_seqs, trial.seq_len + 1)
    micro = [torch.randint(3, trial.model.vocab_size, shape, generator=generator) for _ in range(count)]
    scored = trial.global_seqs * trial.seq_len
    if monitor is None:
        statistics, trainer.statistics = trainer.statistics, None
        trainer.train_step(micro, trial.optimizer.lr, scored)
        trainer.statistics = statistics
        return
    monitor.before_step(step)
    result = trainer.train_step(micro, trial.optimizer.lr, scored)
    monitor.after_step(step, result, micro, scored)
