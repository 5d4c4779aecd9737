"""What the monitor costs: the same training steps with it and without, turn about, in one process."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from recipes.common.drift import find_drift
from recipes.common.engine import Trainer
from recipes.common.observer import Observer
from recipes.common.recipe import ROOT, AdamW, Layout, Monitor
from tools.common.local_ranks import run_ranks
from tools.common.numerics import Trial, build_trainer
from tools.spikes.scores import Score

GOAL = {"cpu": 0.02, "cuda": 0.005}  # of the step time
# the quickstart's model and batch
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


def measure_overhead() -> list[Score]:
    """For `bench`: the monitor's share of the quickstart's step time on the CPU, with everything at its defaults."""
    found = overhead(pairs=30)
    detail = f"{found['share']:.2%} of {found['step_seconds']:.3f} s"
    return [Score("monitor, share of step time (CPU quickstart)", detail, f"{GOAL['cpu']:.0%}", found["share"] <= GOAL["cpu"])]


def overhead(
    *,
    pairs: int,
    model: LlamaConfig = QUICKSTART,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    deepspeed: str = "zero1_fp32.json",
    device: str = "cpu",
    **trial: Any,
) -> dict[str, float]:
    """Seconds, and the monitor's share of a step with the default `Monitor`, from `pairs` pairs of steps on this machine.

    step_seconds: without it. every_seconds, activations_seconds, drift_seconds: what a step takes longer that looks at the
    parameters, at the layers too, or also at the copies. share: each as often as it happens. Medians of paired differences.
    """
    config = json.loads((ROOT / "ds_configs" / deepspeed).read_text())
    ranks = tensor * pipeline * data
    wanted = Trial(
        model=model,
        layout=Layout(tensor=tensor, pipeline=pipeline),
        world_size=ranks,
        optimizer=AdamW(lr=4e-3, clip=1.0),
        deepspeed=config,
        device=device,
        **(TRIAL | trial),
    )
    return run_ranks(_measure, ranks, wanted, pairs, timeout_seconds=3600.0)[0]


def _measure(trial: Trial, pairs: int) -> dict[str, float]:
    trainer = build_trainer(trial)
    monitor = Monitor()
    recipe = SimpleNamespace(monitor=replace(monitor, drift_every_steps=0), optimizer=trial.optimizer)
    log = SimpleNamespace(note=print) if trainer.grid.rank == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        observer = Observer(trainer, recipe, Path(folder), log=log)
        timed: dict[str, list[float]] = {"off": [], "every": [], "activations": [], "drift": []}
        for pair in range(-2, pairs):  # two to warm up
            often = [0, 1] if pair % 2 else [1, 0]  # who goes first: neither profits from the other's caches
            seconds = {}
            for watched in often:
                with_layers = watched and pair % 2 == 0
                step = monitor.activations_every_steps * (pair + 3) + (0 if with_layers else 1)
                seconds[watched] = _step(trainer, trial, observer if watched else None, step)
            if pair >= 0:
                timed["off"].append(seconds[0])
                timed["activations" if pair % 2 == 0 else "every"].append(seconds[1] - seconds[0])
        for _ in range(5):
            started = _clock(trainer)
            find_drift(trainer)
            timed["drift"].append(_clock(trainer) - started)
        observer.close()
    middle = {name: statistics.median(values) for name, values in timed.items()}
    layers = max(middle["activations"] - middle["every"], 0.0)
    cost = middle["every"] + layers / monitor.activations_every_steps + middle["drift"] / monitor.drift_every_steps
    numbers = {f"{name}_seconds": middle[name] for name in ("every", "activations", "drift")}
    return {"step_seconds": middle["off"], **numbers, "share": cost / middle["off"]}


def _clock(trainer: Trainer) -> float:
    """On a CPU the seconds that this process computed: one rank alone waits for nobody, and neighbours do not disturb it."""
    alone = trainer.grid.device.type == "cpu" and trainer.engine.world_size == 1
    return time.process_time() if alone else time.perf_counter()


def _step(trainer: Trainer, trial: Trial, observer: Observer | None, step: int) -> float:
    """One training step on random tokens: its seconds (`_clock`), waiting for the device included."""
    generator = torch.Generator().manual_seed(step)
    count = trial.global_seqs // (trial.micro_seqs * trainer.grid.data)
    shape = (trial.micro_seqs, trial.seq_len + 1)
    micro = [torch.randint(3, trial.model.vocab_size, shape, generator=generator) for _ in range(count)]
    scored = trial.global_seqs * trial.seq_len
    probe, trainer.probe = trainer.probe, (trainer.probe if observer else None)
    started = _clock(trainer)
    if observer is not None:
        observer.before_step(step)
    result = trainer.train_step(micro, trial.optimizer.lr, scored)
    if observer is not None:
        observer.after_step(step, result, micro, scored)
    seconds = _clock(trainer) - started
    trainer.probe = probe
    return seconds
