"""`calibrate RECIPE --gpu-type T --out FILE`: adapts the shipped terms to this machine by two short runs.

They run the recipe's model in one layout on random tokens, one with twice the micro batch of the other, which separates what
grows with the batch from what does not. `--layers` shortens a model that is too large. Time is fitted on any device, memory only
on GPUs, where the driver reports it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common.config.ds_config import load_ds_config
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.recipe import Batch, Recipe
from tools.common.console import GOOD, UsageError, quiet_transformers, table
from tools.common.devices import GIB, Device, find_device
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.recipe_io import parse_layout
from tools.plan import memory_model, time_model
from tools.plan.coefficients import Coefficients, read_coefficients, write_coefficients
from tools.plan.evaluate import why_not
from tools.plan.fitting import fit_map
from tools.plan.model_cases import Candidate, ModelFacts, read_model, time_cases
from tools.plan.search import load_sound
from tools.plan.stage_memory import memory_case
from tools.plan.time_model import Cases

WARM_UP_STEPS = 2
MACHINE_WIDTH = 0.5  # standard deviation of the logarithm of a machine's terms around the shipped ones


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
    parser.add_argument("--gpu-type", required=True, help="what this machine has (CPU where there is no GPU)")
    parser.add_argument("--layout", default="tensor=1", help="as for `explain`; as many ranks as that are run (default: one)")
    parser.add_argument("--layers", type=int, help="run only the first layers of the model (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, for --calibration")


def run(flags: argparse.Namespace) -> int:
    quiet_transformers()
    device, shipped = find_device(flags.gpu_type), read_coefficients(None)
    layout, data = parse_layout(flags.layout)
    if flags.steps < 1:
        raise UsageError(f"--steps={flags.steps}: must be 1 or more")
    refuse_out(flags.out)
    recipe = shorten(load_sound(flags.recipe), flags.layers)
    kind = "cuda" if torch.cuda.is_available() and device.name != "CPU" else "cpu"
    world = layout.tensor * layout.pipeline * data
    if kind == "cuda" and world > torch.cuda.device_count():
        raise UsageError(f"--layout={flags.layout}: needs {world} GPUs, this machine has {torch.cuda.device_count()}")
    if kind == "cpu" and device.name != "CPU":
        raise UsageError(f"--gpu-type={device.name}: this machine has no GPU that torch can use; calibrate on one, or for CPU")
    runs_to_make = [_run_of(recipe, Candidate(layout=layout, data=data, micro_seqs=k * recipe.batch.micro_seqs)) for k in (1, 2)]
    for tried, candidate in runs_to_make:  # in a fork: its trials compute
        if why := run_ranks(_why_not, 1, tried, candidate)[0]:
            raise UsageError(f"--layout={flags.layout}, micro_seqs={candidate.micro_seqs}: {why}")
    measured = []
    for tried, candidate in runs_to_make:  # fork all ranks before this process computes anything
        try:
            ranks = run_ranks(measure, world, tried, candidate, kind, flags.steps, timeout_seconds=3600.0)
        except RankError as error:
            cure = "lower the recipe's micro_seqs or use --layers"
            raise UsageError(f"micro_seqs={candidate.micro_seqs} did not run; {cure}\n{error}") from error
        measured.append((max(rank["seconds"] for rank in ranks), max(rank["bytes"] for rank in ranks)))
    runs = [
        (read_model(tried, load_ds_config(recipe.deepspeed)), candidate, *figures)
        for (tried, candidate), figures in zip(runs_to_make, measured, strict=True)
    ]
    coefficients, rows = calibrated(runs, device, shipped)
    write_coefficients(flags.out, coefficients)
    if flags.json:
        print(json.dumps({"out": str(flags.out), "runs": rows}))
    else:
        print(_text(rows))
        print(f"{flags.out}: give it to search and explain as --calibration {flags.out}")
    return GOOD


def refuse_out(out: Path) -> None:
    """Raise UsageError for a file that could not be written after the runs, or that is there."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out={out} exists; give another name, or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"--out={out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out={out}: {out.parent} cannot be written to; give this user the right to it, or another place")


def _why_not(recipe: Recipe, candidate: Candidate) -> str:
    return why_not(read_model(recipe, load_ds_config(recipe.deepspeed)), [candidate])[0]


def shorten(recipe: Recipe, layers: int | None) -> Recipe:
    """Return the recipe with only its first `layers` layers: the same shapes in less memory."""
    if layers is None:
        return recipe
    depth = recipe.model.get_text_config().num_hidden_layers
    if not 1 <= layers <= depth:
        raise UsageError(f"--layers={layers}: must be between 1 and the model's {depth}")
    fields = recipe.model.to_dict()
    per_layer = {name: value[:layers] for name, value in fields.items() if isinstance(value, list) and len(value) == depth}
    return replace(recipe, model=type(recipe.model).from_dict(fields | per_layer | {"num_hidden_layers": layers}))


def _run_of(recipe: Recipe, candidate: Candidate) -> tuple[Recipe, Candidate]:
    """Return the recipe with a batch of two micro batches a stage."""
    seqs = candidate.micro_seqs * candidate.readers * 2 * candidate.layout.pipeline
    return replace(
        recipe, batch=Batch(seq_len=recipe.batch.seq_len, micro_seqs=candidate.micro_seqs, global_seqs=seqs)
    ), candidate


def measure(recipe: Recipe, candidate: Candidate, kind: str, steps: int) -> dict[str, float]:
    """Return the median seconds of a step and the driver's peak bytes (0 on CPUs), on every rank."""
    batch = recipe.batch
    micro_batches = batch.global_seqs // (candidate.micro_seqs * candidate.readers)
    sizes = {"train_micro_batch_size_per_gpu": candidate.micro_seqs, "gradient_accumulation_steps": micro_batches}
    config = {
        **load_ds_config(recipe.deepspeed),
        **sizes,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    trainer = build_trainer(
        recipe.model,
        candidate.layout,
        recipe.optimizer,
        config,
        device_type=kind,
        seq_len=batch.seq_len,
        attention=recipe.attention,
        chunk_tokens=recipe.logits_chunk_tokens,
        kernels=recipe.kernels,
        precision=recipe.precision,
    )
    vocab, device = trainer.stage.vocab_size, trainer.grid.device
    ids = torch.randint(vocab, (micro_batches, candidate.micro_seqs, batch.seq_len + 1))
    seconds = []
    for _ in range(WARM_UP_STEPS + steps):
        started = time.perf_counter()
        trainer.train_step(list(ids), 1e-6, batch.global_seqs * batch.seq_len)  # returns the loss, so the step has ended
        seconds.append(time.perf_counter() - started)
    peak = 0.0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = float(total - free) - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
    return {"seconds": statistics.median(seconds[WARM_UP_STEPS:]), "bytes": peak}


def calibrated(
    runs: list[tuple[ModelFacts, Candidate, float, float]], device: Device, shipped: Coefficients
) -> tuple[Coefficients, list[dict[str, Any]]]:
    """Return the shipped terms fitted to the runs (facts, candidate, seconds, bytes), and each run's figures before and after."""
    cases = [time_cases(facts, [candidate], device) for facts, candidate, _, _ in runs]
    stages = [memory_case(facts, candidate, device) for facts, candidate, _, _ in runs]
    seconds, peaks = np.array([r[2] for r in runs]), np.array([r[3] for r in runs])

    def predict(guesses: np.ndarray) -> np.ndarray:  # terms [k, m], m guesses -> seconds [runs, m]
        times = guesses.shape[1]
        factors = [np.repeat(shipped.factors(device, case), times) for case in cases]
        rows = [_repeated(case, times) for case in cases]
        return np.stack([time_model.step_seconds(guesses, row, own) for row, own in zip(rows, factors, strict=True)])

    widths = np.full(len(shipped.time), MACHINE_WIDTH if device.name != "CPU" else 3.0)  # a CPU's peak is a guess
    terms = fit_map(predict, seconds, shipped.time, widths, noise=0.02)
    memory = memory_model.fit_memory(stages, peaks, shipped.memory) if peaks.all() else shipped.memory
    coefficients = replace(
        shipped,
        time=terms,
        memory=memory,
        provenance={"calibrated on": device.name, "runs": len(runs), "date": datetime.date.today().isoformat()},
    )
    rows = []
    for index, (_, candidate, measured_seconds, measured_bytes) in enumerate(runs):
        before, after = predict(np.stack([shipped.time, terms], axis=1))[index]
        row = {"micro_seqs": candidate.micro_seqs, "seconds": measured_seconds, "before": float(before), "after": float(after)}
        if peaks.all():
            sizes = [float(memory_model.peak_bytes(t, [stages[index]])[0]) for t in (shipped.memory, memory)]
            row |= {"bytes": measured_bytes, "bytes_before": sizes[0], "bytes_after": sizes[1]}
        rows.append(row)
    return coefficients, rows


def _repeated(case: Cases, times: int) -> Cases:
    """Return the one row of `case` so many times."""
    columns = {field.name: getattr(case, field.name) for field in fields(case) if field.name != "keys"}
    return Cases(**{name: np.repeat(values, times, axis=0) for name, values in columns.items()}, keys=case.keys * times)


def _text(rows: list[dict[str, Any]]) -> str:
    header = ["micro_seqs", "step s", "shipped", "calibrated"]
    cells = [[r["micro_seqs"], *(f"{r[key]:.4f}" for key in ("seconds", "before", "after"))] for r in rows]
    if "bytes" in rows[0]:
        header += ["memory GiB", "shipped", "calibrated"]
        for row, line in zip(rows, cells, strict=True):
            line += [f"{row[key] / GIB:.1f}" for key in ("bytes", "bytes_before", "bytes_after")]
    return table(cells, header)
