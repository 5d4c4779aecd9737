"""Whole runs on a device: saved and resumed bit for bit, exported to a folder that plain transformers loads; preflight."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from recipes.common.data.batches import open_validation, validation_micro_batches
from recipes.common.recipe import Layout, Recipe
from recipes.common.run_dir.metrics import read_metrics
from tests.gpu.place import Figures, GpuCheck, Place, RefutedError, be_deterministic, demand_equal
from tests.support import small_runs
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.launched import copy_repository, start, torchrun
from tests.support.tiny import ROOT, tiny_config
from tools.common.forked_ranks import run_ranks

STEPS, HALFWAY = 4, 2
# the exponent of a loss scale that is some 12 halvings too large, or 6, and steps
SCALES = {"cuda": (30, 24), "cpu": (24, 14)}
LAYOUTS = {1: Layout(), 2: Layout(pipeline=2), 8: Layout(tensor=2, pipeline=2)}
EXPORT_BOUND = 1e-5  # relative, of fp32's validation loss
PREFLIGHT_SECONDS = 180
LEAST_FLOPS = 1e12  # a second, of any GPU


def resume(place: Place) -> Figures:
    """Save halfway and resume: losses, weights and optimizer states are those of the uninterrupted run, bit for bit."""
    compared = {}
    data = small_runs.write_data(place.folder / "data")
    for precision in place.precisions:
        recipe = _recipe(data, f"zero1_{precision}.json")
        straight, resumed = (place.folder / f"{precision} {name}" for name in ("straight", "resumed"))
        _train(place, recipe, straight, steps=STEPS)
        _train(place, recipe, resumed, steps=HALFWAY)
        _train(place, recipe, resumed, steps=STEPS, resume_run=True)
        losses = [{r["step"]: r["loss"] for r in read_metrics(folder) if "loss" in r} for folder in (straight, resumed)]
        demand_equal(f"{precision}: losses", [f"step {step}" for step in losses[0] if losses[0][step] != losses[1].get(step)])
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            a, b = small_runs.masters(straight, kind), small_runs.masters(resumed, kind)
            demand_equal(f"{precision}: {kind}", [n for n in a if n not in b or not np.array_equal(a[n], b[n])])
        compared[precision] = {"tensors": len(a), "last_loss": losses[0][STEPS]}
    return compared


def export(place: Place) -> Figures:
    """Train, export, load the folder with plain transformers on the device, and compare validation losses."""
    recipe = _recipe(small_runs.write_data(place.folder / "data"), "zero1_fp32.json")
    _train(place, recipe, place.folder / "run", steps=STEPS)
    called = small_runs.call("checkpoint", "to-hf", place.folder / "run/checkpoints/latest", place.folder / "exported")
    if called.code:
        raise RefutedError(f"tools.checkpoint to-hf ended with {called.code}: {called.err.strip()}")
    wanted = [record["val_loss"] for record in read_metrics(place.folder / "run") if "val_loss" in record][-1]
    found = run_ranks(_plain_loss, 1, recipe, str(place.folder / "exported"), place.device)[0]
    if not abs(found - wanted) <= EXPORT_BOUND * wanted:
        raise RefutedError(f"plain transformers has the validation loss {found:.7f}, the run {wanted:.7f}")
    return {"run": wanted, "transformers": found, "bound": EXPORT_BOUND}


def _plain_loss(recipe: Recipe, folder: str, device: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    (stream,) = open_validation(recipe.data, recipe.batch.seq_len).values()
    seqs = recipe.evaluation.seqs
    total = 0.0
    with torch.no_grad():
        for tokens, _ in validation_micro_batches(stream, seqs=seqs, micro_seqs=1, data_rank=0, data_size=1):
            tokens = tokens.to(device)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            total += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return total / (seqs * recipe.batch.seq_len)


def preflight(place: Place) -> Figures:
    """Run the check of a start on the device, as the launchers do."""
    recipe = copy_repository(place.folder)
    words = [ROOT / "tools" / "preflight" / "__main__.py", recipe, "--out-dir", place.folder / "out", "--json"]
    process = start(torchrun(1, *words), place.folder)
    try:
        out, _ = process.communicate(timeout=PREFLIGHT_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise RefutedError(f"preflight did not end in {PREFLIGHT_SECONDS} s") from error
    if process.returncode:
        raise RefutedError(f"preflight ended with {process.returncode}: {out.strip()[-2000:]}")
    found = json.loads(out.strip().splitlines()[-1])
    flops = found["rows"][0]["flops_per_second"]
    if place.on_gpu and not flops > LEAST_FLOPS:
        raise RefutedError(f"preflight measured {flops:.1e} FLOP/s, less than any GPU's")
    return {"flops_per_second": flops}


def overflows(place: Place) -> Figures:
    """Train in fp16 from a loss scale that is far too large, and resume: each overflow halves it until gradients fit."""
    config, (power, steps) = place.folder / "fp16.json", SCALES[place.device]
    config.write_text(json.dumps(fp16_config(initial_scale_power=power, hysteresis=1)))
    recipe = replace(_recipe(small_runs.write_data(place.folder / "data"), str(config)), steps=steps)
    run = place.folder / "run"
    _train(place, recipe, run, steps=steps - 4)
    _train(place, recipe, run, steps=steps, resume_run=True)
    records = [record for record in read_metrics(run) if "loss" in record]
    skipped = [record["skipped_steps"] for record in records]
    if not 3 < skipped[-1] < steps - 4 or skipped[:3] != [1, 2, 3]:
        raise RefutedError(f"skipped steps by step are {skipped}")
    wrong = [record["step"] for record in records if record["loss_scale"] != 2.0 ** (power - record["skipped_steps"])]
    demand_equal("the loss scale and the number of halvings", [f"step {step}" for step in wrong])
    return {"overflows": skipped[-1], "loss_scale": records[-1]["loss_scale"]}


def _recipe(data: Path, deepspeed: str) -> Recipe:
    return replace(small_runs.small_recipe(data, tiny_config("llama")), deepspeed=deepspeed, steps=STEPS)


def _train(place: Place, recipe: Recipe, out_dir: Path, *, steps: int, resume_run: bool = False) -> None:
    layout = LAYOUTS[place.ranks]
    run_ranks(_train_rank, place.ranks, recipe, str(out_dir), layout, place.ranks, resume_run, steps)


def _train_rank(recipe: Recipe, *arguments: Any) -> None:
    be_deterministic()
    if os.environ["DS_ACCELERATOR"] == "cpu":
        allow_fp16()
    small_runs.train_on_rank(recipe, *arguments)


CHECKS = (
    GpuCheck("resume", "saved and resumed is uninterrupted, bit for bit, fp32 and bf16", resume),
    GpuCheck("fp16 run", "overflows halve the loss scale until gradients fit, over a resume too", overflows),
    GpuCheck("export", "the exported folder has the run's validation loss in plain transformers", export),
    GpuCheck("preflight", "the check of a start passes", preflight),
)
