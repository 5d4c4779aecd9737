"""Times our step against the ones that others would write, for the same model, batch, precision, weights and processes.

    python -m tests.bench.step [--layout pipeline=2] [--recipe recipes/llama_1b.py] [--rounds 6] [--json]

At one rank against a plain PyTorch loop over the transformers model (and against transformers on DeepSpeed); at 2 and 4 ranks
against torch's own pipelining, tensor and data parallelism. All sides live in the same ranks and take turns, step by step, in
changing order, so that whatever else the machine does hits all alike; ratios are medians of paired steps. A rank is one thread
on a CPU, one GPU on a GPU. Every side's losses must be the same: exit 1 where they are not.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import argparse
import ctypes
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from recipes.common.checks.model_checks import depth_problems
from recipes.common.config.ds_config import load_ds_config, precision
from recipes.common.config.placement import placement_of
from recipes.common.model.flops import OURS
from recipes.common.recipe import PIPELINE_SCHEDULES, AdamW, Layout, Recipe, RecipeError
from tests.bench.step.sides import Step, ours, plain, transformers_deepspeed
from tests.bench.step.torch_baseline import torch_parallel
from tools.common.console import FAILED, GOOD, UsageError, exit_code, quiet_transformers, table
from tools.common.devices import find_device
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial
from tools.common.recipe_io import load_recipe, parse_layout
from tools.throughput.flops import recipe_flops

LAYOUTS = ("tensor=1", "pipeline=2", "tensor=2,pipeline=2", "pipeline=2,data=2")
MODEL = LlamaConfig(
    hidden_size=384,
    intermediate_size=1056,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=6,
    vocab_size=8192,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)  # its 5 first layers cost what the 3 last ones and the head do, so that two stages are equal
TORCHS_LINEARS = ", torch's linears"  # on a CPU ours are computed by another library (recipes.common.model.linears)
CHUNK_TOKENS = 2048  # of our loss, as in recipes
WARM_STEPS, COMPARED_STEPS = 2, 5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # relative, between the sides, at every step
PLAIN, HUGGING_FACE, TORCH = "plain PyTorch", "transformers + DeepSpeed", "torch pipelining + DTensor + DDP"
GOALS = {PLAIN: 1.0, HUGGING_FACE: 1.1, TORCH: 1.15}  # our tokens/s over theirs
BUILDERS: dict[str, Callable[[Trial], Step]] = {PLAIN: plain, HUGGING_FACE: transformers_deepspeed, TORCH: torch_parallel}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sides that are compared on the same ranks."""

    layout: str
    trial: Trial  # its layout without a schedule
    schedules: tuple[str, ...]  # ours, one side each; and the last of them once more with torch's own linears
    baselines: tuple[str, ...]  # the others are compared with the first
    goal: float


@dataclass(frozen=True, kw_only=True)
class SideTimes:
    """One side. Seconds are medians over the rounds, ratios medians of paired steps: the first baseline's time over ours."""

    layout: str
    ranks: int
    side: str
    tokens_per_second: float
    step_seconds: float
    ratio: float | None  # None for the first baseline itself
    processor_ratio: float | None  # the same of processor time, summed over the ranks: neighbours disturb it less
    goal: float | None  # of `ratio`; None for a baseline
    mfu: float | None  # on a GPU
    losses: list[float]  # of every step, the warm ones too


def measure(case: Comparison, rounds: int) -> list[SideTimes]:
    """Run a comparison on forked ranks. The first baseline comes first."""
    ranks = run_ranks(_rank, case.trial.world_size, case, rounds, timeout_seconds=1800.0)
    base, rows, tokens = case.baselines[0], [], case.trial.global_seqs * case.trial.seq_len
    steps = {side: [max(times) for times in zip(*(rank[side]["seconds"] for rank in ranks), strict=True)] for side in ranks[0]}
    work = {side: [sum(times) for times in zip(*(rank[side]["busy"] for rank in ranks), strict=True)] for side in ranks[0]}
    for side, seconds in steps.items():
        trifold = side not in case.baselines
        rows.append(
            SideTimes(
                layout=case.layout,
                ranks=case.trial.world_size,
                side=side,
                tokens_per_second=tokens / statistics.median(seconds),
                step_seconds=statistics.median(seconds),
                ratio=None if side == base else _paired(steps[base], seconds),
                processor_ratio=None if side == base else _paired(work[base], work[side]),
                goal=case.goal if trifold else None,
                mfu=None,
                losses=ranks[-1][side]["losses"],  # the last rank is on the last stage
            )
        )
    return rows


def _paired(base: list[float], ours: list[float]) -> float:
    return statistics.median(b / o for b, o in zip(base, ours, strict=True))


def _rank(case: Comparison, rounds: int) -> dict[str, dict[str, list[float]]]:
    libc = ctypes.CDLL(None)  # freed memory is kept, as launch/env.sh has it
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    steps = {name: BUILDERS[name](case.trial) for name in case.baselines}
    own = {TORCHS_LINEARS: replace(case.trial, torch_linears=True)} if case.trial.device == "cpu" else {}
    for addition, trial in ({"": case.trial} | own).items():
        for schedule in case.schedules if not addition else case.schedules[-1:]:
            name = "Trifold" if case.trial.world_size == 1 else f"Trifold, {schedule}"
            steps[name + addition] = ours(replace(trial, layout=replace(trial.layout, pipeline_schedule=schedule)))
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "busy": [], "losses": []} for name in steps}
    for round_ in range(WARM_STEPS + rounds):
        for name in list(steps) if round_ % 2 else list(steps)[::-1]:
            dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
            found[name]["losses"].append(steps[name]())
            if round_ >= WARM_STEPS:
                found[name]["seconds"].append(time.perf_counter() - started)
                found[name]["busy"].append(time.process_time() - worked)
        if dist.get_rank() == 0 and sys.stderr.isatty():
            print(f"\r{case.layout}: round {round_ + 1} of {WARM_STEPS + rounds} ", end="", file=sys.stderr)
    return found


def disagreement(rows: list[SideTimes]) -> float:
    """Return the largest relative difference between the losses of a layout's sides in the first steps; infinite for a NaN.

    Later steps are left out: training amplifies differences of rounding.
    """
    worst = 0.0
    for layout in {row.layout for row in rows}:
        for losses in list(zip(*(row.losses for row in rows if row.layout == layout), strict=True))[:COMPARED_STEPS]:
            finite = all(math.isfinite(loss) for loss in losses)
            worst = max(worst, (max(losses) - min(losses)) / abs(min(losses)) if finite else math.inf)
    return worst


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", metavar="FILE", help="model, optimizer and precision (default: a llama of 21M in fp32)")
    parser.add_argument(
        "--layout",
        action="append",
        metavar="SIZES",
        help=f"tensor=N,pipeline=N,data=N; may be given again (default: {' and '.join(LAYOUTS)}; with cuda {LAYOUTS[0]})",
    )
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default: 256; with --recipe, the recipe's)")
    parser.add_argument("--micro-seqs", type=int, default=2, help="sequences a micro batch (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a data rank in a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs one GPU a rank, and --recipe")
    parser.add_argument("--gpu-type", metavar="NAME", help="with cuda: whose peak MFU is a share of (H100, ...)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> int:
    for name in ("seq_len", "micro_seqs", "micro_batches", "rounds"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}={value}: must be 1 or more")
    if flags.device == "cuda" and torch.cuda.device_count() == 0:
        raise UsageError("--device=cuda: there is no CUDA device here; leave --device out to compare on the CPU")
    quiet_transformers()
    trial, per_token = _trial(flags)
    cases = [_comparison(text, trial) for text in flags.layout or (LAYOUTS if flags.device == "cpu" else LAYOUTS[:1])]
    rows = [row for case in cases for row in measure(case, flags.rounds)]
    if per_token is not None:
        rows = [replace(row, mfu=per_token * row.tokens_per_second / row.ranks) for row in rows]
    difference, bound = disagreement(rows), LOSS_BOUNDS[precision(trial.deepspeed)]
    agree = difference <= bound
    if flags.json:
        found = {"agree": agree, "loss_difference": difference, "loss_bound": bound, "cores": os.cpu_count()}
        print(json.dumps(found | {"rows": [asdict(row) for row in rows]}))
    else:
        print(_text(rows, flags))
        verdict = "all sides do the same work" if agree else f"FAILED, over {bound:.0e}: the sides do not do the same work"
        print(f"losses differ by at most {difference:.1e}, relative, in the first {COMPARED_STEPS} steps: {verdict}")
    return GOOD if agree else FAILED


def _trial(flags: argparse.Namespace) -> tuple[Trial, float | None]:
    """Return (one data rank's work, the share of a GPU's peak that one token a second is)."""
    per_token = None
    if flags.recipe is None:
        if flags.device == "cuda":
            raise UsageError("--device=cuda: needs a recipe, for example --recipe recipes/llama_1b.py")
        work = {"model": MODEL, "optimizer": AdamW(lr=1e-3), "deepspeed": load_ds_config("zero1_fp32.json"), "attention": "sdpa"}
        seq_len = flags.seq_len or MODEL.max_position_embeddings
    else:
        recipe = load_recipe(flags.recipe)
        if not isinstance(recipe.optimizer, AdamW):
            raise UsageError(f"{flags.recipe}: optimizer={type(recipe.optimizer).__name__}: the bench compares steps of AdamW")
        config = load_ds_config(recipe.deepspeed)
        work = {"model": recipe.model, "optimizer": recipe.optimizer, "deepspeed": config, "attention": recipe.attention}
        seq_len = flags.seq_len or recipe.batch.seq_len
        if flags.gpu_type is not None:
            per_token = _flops_per_token(recipe, seq_len) / find_device(flags.gpu_type).peak(precision(config))
    batch = {"seq_len": seq_len, "micro_seqs": flags.micro_seqs, "global_seqs": flags.micro_seqs * flags.micro_batches}
    alone = {"layout": Layout(), "world_size": 1, "device": flags.device, "chunk_tokens": CHUNK_TOKENS}
    return Trial(**work, **batch, **alone), per_token


def _flops_per_token(recipe: Recipe, seq_len: int) -> float:
    return recipe_flops(recipe, seq_len)["conventions"][OURS]["flops_per_token"]


def _comparison(text: str, trial: Trial) -> Comparison:
    """Return what is compared in a layout. One data rank's work stays as it is: with data=2, a step has twice the tokens."""
    layout, data = parse_layout(text)
    if layout != Layout(tensor=layout.tensor, pipeline=layout.pipeline):
        raise UsageError(f"--layout={text}: the bench takes tensor, pipeline and data; it compares every schedule itself")
    world_size = layout.tensor * layout.pipeline * data
    if world_size > 1 and layout.pipeline == 1:
        raise UsageError(f"--layout={text}: the baseline on several ranks is torch's pipeline: give pipeline=2 or more")
    if layout.pipeline > 1 and trial.global_seqs // trial.micro_seqs < layout.pipeline:
        raise UsageError(f"--layout={text}: torch's 1F1B needs --micro-batches={layout.pipeline} or more")
    if layout.pipeline > 1 and trial.model.tie_word_embeddings:
        raise UsageError(f"--layout={text}: torch's pipeline has no tied embeddings; take a recipe without, or --layout tensor=1")
    depth = trial.model.num_hidden_layers
    if problems := depth_problems(layout, depth):
        raise UsageError(f"--layout={text}: {problems[0]}")
    fitting = tuple(s for s in PIPELINE_SCHEDULES if placement_of(replace(layout, pipeline_schedule=s)).count <= depth)
    alone = (PLAIN, HUGGING_FACE) if trial.device == "cpu" else (HUGGING_FACE,)  # memory of a GPU: two sides, not three
    return Comparison(
        layout=text if world_size > 1 else "1 rank",
        trial=replace(trial, layout=layout, world_size=world_size, global_seqs=trial.global_seqs * data),
        schedules=fitting if layout.pipeline > 1 else PIPELINE_SCHEDULES[:1],
        baselines=(TORCH,) if world_size > 1 else alone,
        goal=GOALS[TORCH] if world_size > 1 else GOALS[alone[0]],
    )


def _text(rows: list[SideTimes], flags: argparse.Namespace) -> str:
    def shown(value: float | None, form: str = ".3f") -> str:
        return "" if value is None else format(value, form)

    header, cells = ["layout", "side", "tokens/s", "step s", "ratio", "goal", "of processor time"], []
    for row in rows:
        cells.append([row.layout, row.side, f"{row.tokens_per_second:,.0f}", f"{row.step_seconds:.3f}"])
        cells[-1] += [shown(row.ratio), shown(row.goal, ".2f"), shown(row.processor_ratio)]
        cells[-1] += [shown(row.mfu, ".1%")] if flags.gpu_type else []
    header += ["MFU"] if flags.gpu_type else []
    place = f"{os.cpu_count()} cores, one thread a rank" if flags.device == "cpu" else flags.gpu_type or "GPU"
    what = f"{flags.rounds} rounds, {flags.micro_batches} micro batches a data rank; {place}; medians of paired steps"
    return f"{what}\n{table(cells, header)}"


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)

    def work() -> int:
        try:
            return run(flags)
        except RecipeError as error:
            raise UsageError(str(error)) from error

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
