"""`schedules`: measures the step time and the bubble of pipeline schedules against 1F1B's, on this machine's CPU.

The engines share the ranks and take turns step by step, so other load on the machine affects all of them. A rank is one thread;
the bubble is the share of the step in which it did not compute, the mean over ranks. Ranks that share cores wait for those too:
beside it stands the bubble by formula, of equal passes (forward, gradients of inputs, of weights) and messages without a cost.
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
from recipes.common.config.placement import FOLDED, ONE_PASS, ZERO_BUBBLE, Placement, placement_of
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.trainer import Trainer
from recipes.common.recipe import AdamW, Layout
from tools.common.console import GOOD, UsageError, table
from tools.common.forked_ranks import run_ranks
from tools.plan.schedule_formulas import bubble_share

WARM_STEPS = 2
EQUAL_PASSES = 3.0  # a micro batch's three, each as long as the forward pass
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, kw_only=True)
class ScheduleTiming:
    """A schedule's medians over the rounds. `ratio`: 1F1B's time over this schedule's in paired steps; above 1 is faster."""

    schedule: str
    chunks: int
    step_seconds: float
    ratio: float
    bubble_share: float
    formula_share: float  # the same by formula
    busy_seconds: list[float]  # by stage: seconds of a step in which its thread computed


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """The model and batch: a llama with a tiny head, so that stages are equal and the schedule alone makes the bubble."""

    pipeline: int = 2
    micro_batches: int = 4
    micro_seqs: int = 2
    seq_len: int = 256
    hidden: int = 384
    layers: int = 8
    vocab: int = 256
    rounds: int = 15
    chunks: int = 2  # of the interleaved schedules

    def layouts(self) -> tuple[Layout, ...]:
        """Return what is compared, 1F1B first."""
        whole = (Layout(pipeline=self.pipeline, pipeline_schedule=name) for name in (ONE_PASS, ZERO_BUBBLE, FOLDED))
        rounds = (Layout(pipeline=self.pipeline, pipeline_schedule=name, chunks=self.chunks) for name in (ONE_PASS, ZERO_BUBBLE))
        return *whole, *(rounds if self.chunks > 1 else ())

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


def measure_schedules(case: BenchCase) -> list[ScheduleTiming]:
    """Train by each of the case's layouts in turns on `case.pipeline` ranks; compare them with the first."""
    layouts = case.layouts()
    formulas = [_formula_share(placement_of(layout), case.micro_batches) for layout in layouts]
    ranks = run_ranks(_rank, case.pipeline, case, timeout_seconds=1800.0)
    steps = [[max(times) for times in zip(*(rank[i]["seconds"] for rank in ranks), strict=True)] for i in range(len(layouts))]
    base, found = steps[0], []
    for index, (layout, seconds) in enumerate(zip(layouts, steps, strict=True)):
        busy = [rank[index]["busy"] for rank in ranks]
        idle = [1 - statistics.mean(each) / step for step, *each in zip(seconds, *busy, strict=True)]
        found.append(
            ScheduleTiming(
                schedule=layout.pipeline_schedule,
                chunks=placement_of(layout).per_rank,
                step_seconds=statistics.median(seconds),
                ratio=statistics.median(b / s for b, s in zip(base, seconds, strict=True)),
                bubble_share=statistics.median(idle),
                formula_share=formulas[index],
                busy_seconds=[statistics.median(rank) for rank in busy],
            )
        )
    return found


def _formula_share(placement: Placement, micro_batches: int) -> float:
    lost = bubble_share(placement, micro_batches, EQUAL_PASSES) * (placement.pipeline - 1)
    return lost / (micro_batches + lost)


def _rank(case: BenchCase) -> list[dict[str, list[float]]]:
    libc = ctypes.CDLL(None)  # keep freed memory, as launch/env.sh does
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    trainers = [_trainer(case, layout) for layout in case.layouts()]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.vocab, (case.micro_batches, case.micro_seqs, case.seq_len + 1), generator=generator)
    scored = tokens[:, :, 1:].numel()
    times: list[dict[str, list[float]]] = [{"seconds": [], "busy": []} for _ in trainers]
    for step in range(WARM_STEPS + case.rounds):
        order = list(zip(trainers, times, strict=True))
        for trainer, taken in order if step % 2 else order[::-1]:
            dist.barrier()
            started, worked = time.perf_counter(), time.thread_time()
            trainer.train_step(list(tokens), 1e-4, scored)
            if step >= WARM_STEPS:
                taken["seconds"].append(time.perf_counter() - started)
                taken["busy"].append(time.thread_time() - worked)
        if dist.get_rank() == 0 and sys.stderr.isatty():
            print(f"\rround {step + 1} of {WARM_STEPS + case.rounds}", end="", file=sys.stderr)
    return times


def _trainer(case: BenchCase, layout: Layout) -> Trainer:
    config = load_ds_config("zero1_fp32.json") | {
        "train_micro_batch_size_per_gpu": case.micro_seqs,
        "gradient_accumulation_steps": case.micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    return build_trainer(case.model(), layout, AdamW(lr=1e-4), config, device_type="cpu", seq_len=case.seq_len)


def _name(placement: Placement) -> str:
    return (
        placement.schedule
        if placement.per_rank == 1 or placement.folded
        else f"{placement.schedule}, {placement.per_rank} chunks"
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, value in asdict(BenchCase()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")


def run(flags: argparse.Namespace) -> int:
    case = BenchCase(**{name: getattr(flags, name) for name in asdict(BenchCase())})
    most = max(map(placement_of, case.layouts()), key=lambda placement: placement.count)
    if case.layers < most.count:
        raise UsageError(f"--layers={case.layers}: {_name(most)} needs at least {most.count}, one for each of its chunks")
    found = measure_schedules(case)
    if flags.json:
        print(json.dumps({"case": asdict(case), "schedules": [asdict(each) for each in found]}))
        return GOOD
    rows = [
        [
            _name(Placement(each.schedule, case.pipeline, each.chunks)),
            f"{each.step_seconds:.3f}",
            f"{each.ratio:.3f}",
            f"{100 * each.bubble_share:.1f} %",
            f"{100 * each.formula_share:.1f} %",
        ]
        + [f"{seconds:.3f}" for seconds in each.busy_seconds]
        for each in found
    ]
    stages = [f"stage {index} busy s" for index in range(case.pipeline)]
    print(f"{case.pipeline} stages, {case.micro_batches} micro batches, {case.rounds} rounds; medians of paired steps")
    print(table(rows, ["schedule", "step s", "speed / 1f1b", "bubble", "by formula", *stages]))
    return GOOD
