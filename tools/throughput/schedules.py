"""`schedules`: the step time and the bubble of pipeline schedules against 1F1B's, on this machine's CPU.

The engines live side by side in the same ranks and take turns, step by step, so that whatever else the machine does hits all
alike. A rank is one thread. The bubble is what a rank's thread did not compute in, as a share of the step, the mean over ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from recipes.common.config.ds_config import load_ds_config
from recipes.common.config.placement import chunk_count
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.trainer import Trainer
from recipes.common.recipe import PIPELINE_SCHEDULES, AdamW, Layout
from tools.common.console import GOOD, UsageError, table
from tools.common.forked_ranks import run_ranks

WARM_STEPS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the rounds. `ratio` is of paired steps: 1F1B's time over this schedule's, above 1 is faster."""

    schedule: str
    step_seconds: float
    ratio: float
    bubble_share: float
    busy_seconds: list[float]  # by stage, the seconds of a step in which its thread computed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained: a llama with hardly any head, so that its stages are equal and the schedule alone makes the bubble."""

    pipeline: int = 2
    micro_batches: int = 4
    micro_seqs: int = 2
    seq_len: int = 256
    hidden: int = 384
    layers: int = 8
    vocab: int = 256
    rounds: int = 15

    def model(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=self.vocab,
            max_position_embeddings=self.seq_len,
            tie_word_embeddings=False,
        )


def measure_schedules(shape: Shape, schedules: tuple[str, ...] = PIPELINE_SCHEDULES) -> list[Measured]:
    """Train by each of `schedules` (the first is what the others are held against) in turns on `shape.pipeline` ranks."""
    ranks = run_ranks(_rank, shape.pipeline, shape, schedules, timeout_seconds=1800.0)
    steps = {name: [max(times) for times in zip(*(rank[name]["seconds"] for rank in ranks), strict=True)] for name in schedules}
    base, found = steps[schedules[0]], []
    for schedule, seconds in steps.items():
        busy = [rank[schedule]["busy"] for rank in ranks]
        idle = [1 - statistics.mean(each) / step for step, *each in zip(seconds, *busy, strict=True)]
        found.append(
            Measured(
                schedule=schedule,
                step_seconds=statistics.median(seconds),
                ratio=statistics.median(b / s for b, s in zip(base, seconds, strict=True)),
                bubble_share=statistics.median(idle),
                busy_seconds=[statistics.median(rank) for rank in busy],
            )
        )
    return found


def _rank(shape: Shape, schedules: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    libc = ctypes.CDLL(None)  # freed memory is kept, as launch/env.sh has it
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    trainers = {schedule: _trainer(shape, schedule) for schedule in schedules}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab, (shape.micro_batches, shape.micro_seqs, shape.seq_len + 1), generator=generator)
    scored = tokens[:, :, 1:].numel()
    times: dict[str, dict[str, list[float]]] = {schedule: {"seconds": [], "busy": []} for schedule in schedules}
    for step in range(WARM_STEPS + shape.rounds):
        order = schedules if step % 2 else schedules[::-1]
        for schedule in order:
            dist.barrier()
            started, worked = time.perf_counter(), time.thread_time()
            trainers[schedule].train_step(list(tokens), 1e-4, scored)
            if step >= WARM_STEPS:
                times[schedule]["seconds"].append(time.perf_counter() - started)
                times[schedule]["busy"].append(time.thread_time() - worked)
        if dist.get_rank() == 0 and sys.stderr.isatty():
            print(f"\rround {step + 1} of {WARM_STEPS + shape.rounds}", end="", file=sys.stderr)
    return times


def _trainer(shape: Shape, schedule: str) -> Trainer:
    layout = Layout(pipeline=shape.pipeline, pipeline_schedule=schedule)
    config = load_ds_config("zero1_fp32.json") | {
        "train_micro_batch_size_per_gpu": shape.micro_seqs,
        "gradient_accumulation_steps": shape.micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    return build_trainer(shape.model(), layout, AdamW(lr=1e-4), config, device_type="cpu", seq_len=shape.seq_len)


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")


def run(flags: argparse.Namespace) -> int:
    shape = Shape(**{name: getattr(flags, name) for name in asdict(Shape())})
    chunks = {schedule: chunk_count(schedule, shape.pipeline) for schedule in PIPELINE_SCHEDULES}
    most = max(chunks, key=chunks.get)
    if shape.layers < chunks[most]:
        raise UsageError(f"--layers={shape.layers}: {most} cuts them into {chunks[most]} runs; give as many or more")
    found = measure_schedules(shape)
    if flags.json:
        print(json.dumps({"shape": asdict(shape), "schedules": [asdict(each) for each in found]}))
        return GOOD
    rows = [
        [each.schedule, f"{each.step_seconds:.3f}", f"{each.ratio:.3f}", f"{100 * each.bubble_share:.1f} %"]
        + [f"{seconds:.3f}" for seconds in each.busy_seconds]
        for each in found
    ]
    stages = [f"stage {index} busy s" for index in range(shape.pipeline)]
    print(f"{shape.pipeline} stages, {shape.micro_batches} micro batches, {shape.rounds} rounds; medians of paired steps")
    print(table(rows, ["schedule", "step s", "times 1f1b", "bubble", *stages]))
    return GOOD
