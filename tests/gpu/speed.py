"""What costs time on a device: waits, the attention kernel, what a run measures of itself, a real step beside its plan."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.trainer import Trainer
from recipes.common.monitor.parameter_stats import ParameterStats
from recipes.common.monitor.replica_drift import find_drift
from recipes.common.recipe import ROOT, AdamW, Layout
from recipes.common.runtime.step_clock import CLOCK
from tests.gpu.device_waits import counted, forbidden_in_micro_batches
from tests.gpu.place import Figures, GpuCheck, Place, RefutedError, SkippedError
from tests.support.parity import trial_of
from tests.support.small_runs import call
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, batches, build_trial_trainer
from tools.plan.evaluate import judge
from tools.plan.model_cases import Candidate
from tools.plan.search import read

MOST_WAITS = 6  # of a step, whatever it measures
FEW, MANY = 2, 8  # micro batches
DOCUMENT_END = 5
# torch's name of a device -> the planner's
CARDS = {
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA A100 80GB PCIe": "A100-80",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "Tesla V100-SXM2-16GB": "V100-16",
    "Tesla V100-SXM2-32GB": "V100-32",
}
ROOMY_GIB = 60.0  # a GPU with as much takes the 1B recipe's own micro batch


def waits(place: Place) -> Figures:
    """Count the host's waits in a step, an evaluation and a comparison of copies; then let none happen in the micro batches."""
    found = {}
    for name, trial in _wait_trials(place).items():
        for rank, (few, many) in enumerate(run_ranks(_count_waits, trial.world_size, trial)):
            found[f"{name}, rank {rank}"] = {"few": few, "many": many}
            grown = {part: many[part] for part in many if sum(many[part].values()) > sum(few[part].values())}
            if grown:
                raise RefutedError(f"{name}, rank {rank}: {MANY} micro batches wait oftener than {FEW}: {grown} for {few}")
            own = {line: n for line, n in many["step"].items() if place.on_gpu or "optimizer_sums.py" not in line}
            if sum(own.values()) > MOST_WAITS:
                raise RefutedError(f"{name}, rank {rank}: {sum(own.values())} waits in a step, {MOST_WAITS} are allowed: {own}")
    return found


def _wait_trials(place: Place) -> dict[str, Trial]:
    """Return what is counted. On the CPU, where the check itself is tried, two options in each."""
    common = {"deepspeed": ds_config("zero1_bf16.json"), "attention": "sdpa", "device": place.device}
    data = place.ranks
    trials = {"documents": trial_of(tiny_config("llama"), 1, 1, data, document_end=DOCUMENT_END, recompute="full", **common)}
    if place.on_gpu:
        trials["data"] = trial_of(tiny_config("llama"), 1, 1, data, **common)
    if place.ranks > 1:
        for schedule in ("1f1b", "zero_bubble_v") if place.on_gpu else ("zero_bubble_v",):
            options = {"pipeline_schedule": schedule, "document_end": DOCUMENT_END}
            trials[schedule] = trial_of(tiny_config("llama"), 2, 1, data // 2, **options, **common)
    return trials


def _count_waits(trial: Trial) -> list[dict[str, dict[str, int]]]:
    trainer = build_trial_trainer(trial)
    stats = ParameterStats(trainer, trial.optimizer.clip)
    found = []
    for count in (FEW, FEW, MANY):  # the first step also does what a run does once
        micro = _set_micro_batches(trainer, trial, count)
        with counted(trial.device) as step:
            stats.begin(parameters=True, layers=True)
            stats.read(trainer.train_step(micro, 1e-3, count * trial.seq_len, (True, False), 1e9))
        with counted(trial.device) as evaluation:
            trainer.evaluate([(tokens, torch.ones(len(tokens), dtype=torch.bool)) for tokens in micro], 100)
        with counted(trial.device) as drift:
            find_drift(trainer)
        found.append({"step": dict(step), "evaluation": dict(evaluation), "comparison": dict(drift)})
    modes: list[str] = []
    with forbidden_in_micro_batches(trainer, torch.cuda.set_sync_debug_mode if trial.device == "cuda" else modes.append):
        trainer.train_step(micro, 1e-3, MANY * trial.seq_len)
    assert modes in ([], ["error", "default", "default"]), modes
    return found[1:]


def _set_micro_batches(trainer: Trainer, trial: Trial, count: int) -> list[torch.Tensor]:
    trainer.set_global_seqs(count * trial.micro_seqs * trainer.grid.readers)
    sequences = torch.cat(batches(trial))
    return list(sequences[: count * trial.micro_seqs].split(trial.micro_seqs))


class AttentionKernels(TorchDispatchMode):
    """Collects the fused attention operators that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name.startswith("_scaled_dot_product_") and not name.endswith("_backward"):
            self.seen.add(name.removeprefix("_scaled_dot_product_"))
        return func(*args, **kwargs or {})


def attention(place: Place) -> Figures:
    """Name the attention kernel that runs, in each precision, with grouped heads of width 64 as the 1B recipe's."""
    heads = {"head_dim": 64, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = tiny_config("llama", max_position_embeddings=512, **heads)
    kernels = {}
    for precision in reversed(place.precisions):
        trial = trial_of(
            model, 1, 1, 1, attention="sdpa", seq_len=256, global_seqs=1,
            deepspeed=ds_config(f"zero1_{precision}.json"), device=place.device,
        )  # fmt: skip
        kernels[precision] = run_ranks(_kernels, 1, trial)[0] or ["math"]  # not one operator, but products and a softmax
    if place.on_gpu and kernels["bf16"] == ["math"]:
        raise RefutedError("attention in bf16 runs unfused: no flash, efficient or cuDNN kernel takes these shapes on this GPU")
    return kernels


def _kernels(trial: Trial) -> list[str]:
    trainer = build_trial_trainer(trial)
    with AttentionKernels() as kernels:
        trainer.train_step(_set_micro_batches(trainer, trial, 1), 1e-3, trial.seq_len)
    return sorted(kernels.seen)


def shares(place: Place) -> Figures:
    """Measure what the timers, the monitor's statistics and those of layers add to a step, by turns."""
    ranks = run_ranks(_measure_shares, place.ranks, place.device, place.ranks)
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    plain = slowest["plain"]
    return {"step_seconds": plain} | {name: s / plain - 1.0 for name, s in slowest.items() if name != "plain"}


def _measure_shares(device: str, ranks: int) -> dict[str, float]:
    """Return the median seconds of a step of each kind."""
    from recipes.gpt2_124m import recipe

    model, micro_seqs, rounds = (recipe.model, 8, 10) if device == "cuda" else (tiny_config("gpt2"), 1, 2)
    seq_len = 1024 if device == "cuda" else 32
    config = ds_config("zero1_bf16.json") | {
        "train_micro_batch_size_per_gpu": micro_seqs,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 4 * micro_seqs * ranks,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    trainer = build_trainer(model, Layout(), AdamW(lr=1e-4), config, device_type=device, seq_len=seq_len)
    stats = ParameterStats(trainer, 1.0)
    micro = list(torch.randint(100, (4 * micro_seqs, seq_len + 1)).split(micro_seqs))

    def step(number: int, *, timed: bool = False, parameters: bool = False, layers: bool = False) -> None:
        if timed:
            CLOCK.begin_step(number)
        stats.begin(parameters=parameters, layers=layers)
        stats.read(trainer.train_step(micro, 1e-4, 4 * micro_seqs * ranks * seq_len))
        CLOCK.end_step()
        CLOCK.taken()

    kinds: dict[str, Callable[[int], None]] = {
        "plain": lambda number: step(number),
        "timers": lambda number: step(number, timed=True),
        "statistics": lambda number: step(number, parameters=True),
        "statistics_and_layers": lambda number: step(number, parameters=True, layers=True),
    }
    CLOCK.start(trainer.grid, trainer.grid.device, trainer.grid.timed_groups())
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(1, rounds + 2):
        for name, take in kinds.items():
            began = time.perf_counter()
            take(number)
            if number > 1:  # the first is warming up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def throughput(place: Place) -> Figures:
    """Time steps of the 1B recipe with tools.throughput, and put step time, MFU and memory beside what tools.plan says."""
    card = run_ranks(describe_card, 1, place.device)[0]
    path, micro_batches, steps = _bench_recipe(place, card["gib"])
    called = call(
        "throughput", "run", path, "--random-tokens", "--device", place.device, "--layout", f"data={place.ranks}",
        "--micro-batches", micro_batches, "--steps", steps, "--out", place.folder / "timed", "--json",
    )  # fmt: skip
    if called.code:
        raise RefutedError(f"tools.throughput run ended with {called.code}: {called.err.strip()[-2000:]}")
    report = called.json
    seconds = report["step_ms"] / 1e3
    memory = [rank["memory"] for rank in report["ranks"]]
    measured = {
        "seconds": seconds,
        "peak_allocated_bytes": max((m["step_peak_allocated"] for m in memory if "step_peak_allocated" in m), default=None),
        "reserved_bytes": max((m["reserved"] for m in memory if "reserved" in m), default=None),
        "parts_ms": report["parts"],
    }
    if not (math.isfinite(seconds) and seconds > 0):
        raise RefutedError(f"a step takes {seconds} s")
    named = CARDS.get(card["name"]) if place.on_gpu else "CPU"
    if named is None:
        return measured | {"planned": f"the planner's data sheets have no {card['name']} (tools/common/devices.py)"}
    return measured | _beside_plan(path, place.ranks, named, seconds)


def _bench_recipe(place: Place, gib: float) -> tuple[Path, int, int]:
    """Write the recipe to be timed; return (file, micro batches, steps)."""
    name = "llama_1b" if place.on_gpu else "quickstart"
    micro_batches, steps = (4, 8) if place.on_gpu else (1, 2)
    micro_seqs = "base.batch.micro_seqs" if gib >= ROOMY_GIB else "1"
    path = place.folder / f"{name}_timed.py"
    path.write_text(
        f"""import sys
from dataclasses import replace

sys.path.insert(0, {str(ROOT)!r})
from recipes.{name} import recipe as base
from recipes.common.recipe import Layout

micro_seqs = {micro_seqs}
batch = replace(base.batch, micro_seqs=micro_seqs, global_seqs={micro_batches * place.ranks} * micro_seqs, ramp=())
recipe = replace(base, batch=batch, layouts={{{place.ranks}: Layout()}})
"""
    )
    return path, micro_batches, steps


def _beside_plan(path: Path, ranks: int, card: str, seconds: float) -> Figures:
    flags = argparse.Namespace(gpu_type=card, first_principles=False, calibration=None, price_per_hour=None)
    return json.loads(run_ranks(_planned, 1, str(path), flags, ranks, seconds)[0])


def _planned(path: str, flags: argparse.Namespace, ranks: int, seconds: float) -> str:
    facts, device, coefficients, price = read(path, flags)
    candidate = Candidate(layout=Layout(), data=ranks, micro_seqs=facts.recipe.batch.micro_seqs)
    plans, rejected = judge(facts, [candidate], device, coefficients, price)
    if not plans:
        return json.dumps({"planned": f"rejected: {rejected[0].why}"})
    (plan,) = plans
    low, peak, high = plan.peak
    return json.dumps(
        {
            "card": device.name,
            "mfu": plan.mfu * plan.seconds / seconds,
            "tokens_per_second": plan.tokens_per_second * plan.seconds / seconds,
            "planned": {"seconds": plan.seconds, "mfu": plan.mfu, "peak_bytes": peak, "low": low, "high": high},
            "seconds_over_planned": seconds / plan.seconds,
        }
    )


def describe_card(device: str) -> dict[str, Any]:
    """Return the name and memory of this rank's GPU, and the driver's version; in a rank, since it starts CUDA."""
    if device == "cpu":
        return {"name": "CPU", "gib": 0.0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
    }


def sync_debug(place: Place) -> Figures:
    """Show that torch's detection itself works here: an operator that asks for a value is refused."""
    if not place.on_gpu:
        raise SkippedError("needs a GPU: torch has no detection of waits on a CPU")
    return run_ranks(_refused, 1)[0]


def _refused() -> Figures:
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        value.item()
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    raise RefutedError("torch.cuda.set_sync_debug_mode('error') let .item() pass")


CHECKS = (
    GpuCheck("sync detection", "torch's own detection of waits works", sync_debug, device_only=True),
    GpuCheck("waits", f"at most {MOST_WAITS} waits a step, none a micro batch, evaluation, monitor and documents", waits),
    GpuCheck("attention", "which attention kernel runs", attention),
    GpuCheck("shares", "what timers, statistics and those of layers add to a step", shares),
    GpuCheck("throughput", "a step of the 1B recipe: time, MFU, memory, beside the plan", throughput),
)
