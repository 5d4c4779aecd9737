"""The numbers on a device: the gate, schedules against 1F1B, fp16 with an overflow, the monitor's statistics."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from recipes.common.model.document_bounds import positions_on
from recipes.common.model.varlen_attention import attend, segments
from recipes.common.recipe import ROOT
from tests.common.monitor import test_parameter_stats as statistics_oracle
from tests.gpu.place import PRECISIONS, Figures, GpuCheck, Place, RefutedError, be_deterministic, demand_equal, differing
from tests.support.dense_attention import CASES, HEADS, KV_HEADS, LENGTH, SEQS, attended, dense, positions, tensors
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.parity import trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, initial_model, train_in_layout, train_plain
from tools.common.recipe_io import load_recipe, parse_layout
from tools.verify.gate import make_trial, verify

FAMILIES = {"llama": "llama_1b", "gpt2": "gpt2_124m", "mixtral": "mixtral_8x7b"}
# of the gate, by ranks
LAYOUTS = {1: ("data=1",), 2: ("tensor=2", "pipeline=2"), 8: ("tensor=2,pipeline=2,data=2",)}
MOST_PIPELINE = {2: (2, 1, 1), 8: (2, 2, 2)}  # pipeline, tensor, data by ranks
SCHEDULES = {name: {"pipeline_schedule": name} for name in ("1f1b", "zero_bubble", "zero_bubble_v")}
SCHEDULES |= {f"{name}, 2 chunks": SCHEDULES[name] | {"chunks": 2} for name in ("1f1b", "zero_bubble")}
LOSS_BOUND, NORM_BOUND = 5e-4, 1e-2  # of fp16 against fp32, relative
VARLEN_BOUND = 2e-2  # of bf16 against fp32, of the largest value


def gate(place: Place, family: str, precision: str) -> Figures:
    """Run tools.verify's gate on the device: the recipe's own family and options against plain transformers."""
    recipe = load_recipe(str(ROOT / "recipes" / f"{FAMILIES[family]}.py"))
    # on a CPU, where this only tries the check, nothing is compiled
    kernels = recipe.kernels if place.on_gpu else "none"
    recipe = replace(recipe, deepspeed=f"zero1_{precision}.json", kernels=kernels)
    found, failed = {}, []
    layouts = LAYOUTS[place.ranks] if place.on_gpu else LAYOUTS[place.ranks][-1:]
    for text in layouts:
        layout, data = parse_layout(text)
        rows = verify(make_trial(recipe, layout, data, steps=2, seq_len=32, device=place.device))
        found[text] = [asdict(row) for row in rows]
        failed += [f"{text}: {r.what} {r.difference:.1e} for {r.bound:.1e} at {r.where}" for r in rows if not r.passed]
    if failed:
        raise RefutedError("; ".join(failed))
    return {"layouts": found}


def varlen(place: Place) -> Figures:
    """Compare attention without masks with a dense mask in fp32: documents, windows, divided queries, and all gradients."""
    found = run_ranks(_without_masks, 1, place.device)[0]
    wrong = {case: difference for case, difference in found.items() if not difference <= VARLEN_BOUND}
    if wrong:
        raise RefutedError(f"attention='varlen' in bf16 differs from a dense mask in fp32 by more than {VARLEN_BOUND}: {wrong}")
    return found


def _without_masks(device: str) -> Figures:
    """Return the largest difference of the output and the gradients by case, as a part of their largest value."""
    module, found = SimpleNamespace(is_causal=True, num_key_value_groups=HEADS // KV_HEADS), {}
    for name, (documents, window, spans) in CASES.items():
        noted = positions_on(torch.device(device), positions()) if documents else None
        whole = {"seqs": SEQS, "length": LENGTH, "device": torch.device(device), "window": window}
        here = slice((spans - 1) * LENGTH // spans, None)
        *given, gradient = tensors(device, torch.bfloat16)
        theirs, ours = ([t.to(dtype).requires_grad_() for t in given] for dtype in (torch.float32, torch.bfloat16))
        wanted = dense(theirs[0][:, :, here], *theirs[1:], attended(documents, window)[:, :, here], scale=0.3)
        instead = segments(noted, **whole, spans=spans, span=spans - 1)
        out, _ = attend(module, ours[0][:, :, here], *ours[1:], instead, scaling=0.3)
        wanted.backward(gradient[:, here].float())
        out.backward(gradient[:, here])
        pairs = zip((out, *(t.grad for t in ours)), (wanted, *(t.grad for t in theirs)), strict=True)
        found[name] = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return found


def schedules(place: Place) -> Figures:
    """Train with each pipeline schedule and compare losses, norms and weights with 1F1B's, bit for bit."""
    compared = {}
    for config in [f"zero1_{precision}.json" for precision in place.precisions]:
        options = {"deepspeed": ds_config(config), "device": place.device, "global_seqs": 16 if place.on_gpu else 4}
        found = {}
        for schedule, fields in SCHEDULES.items():
            trial = trial_of(tiny_config("llama"), *MOST_PIPELINE[place.ranks], **fields, **options)
            found[schedule] = _trained(run_ranks(_train_deterministic, trial.world_size, trial))
        (numbers, weights), *others = found.values()
        for schedule, (other_numbers, other_weights) in zip(list(SCHEDULES)[1:], others, strict=True):
            demand_equal(f"{config}: weights of {schedule} and 1f1b", differing(weights, other_weights))
            if numbers != other_numbers:
                raise RefutedError(f"{config}: {schedule} has losses and norms {other_numbers}, 1f1b {numbers}")
        compared[config] = {"tensors": len(weights), "last_loss": numbers["losses"][-1]}
    return compared


def _train_deterministic(trial: Trial) -> dict[str, Any]:
    be_deterministic()
    return train_in_layout(trial)


def _trained(ranks: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Return (losses and norms, every rank's weights by name and tensor rank)."""
    shards = {(name, rank["held"].tensor_rank): shard for rank in ranks for name, shard in rank["shards"].items()}
    return {"losses": ranks[0]["losses"], "norms": ranks[0]["norms"]}, shards


def half(place: Place) -> Figures:
    """Train in fp16: near fp32 under a fitting loss scale, and no weight moved by a step that overflows."""
    pipeline = min(place.ranks, 2)
    trial = trial_of(
        tiny_config("llama", tie_word_embeddings=True), pipeline, 1, 1,
        deepspeed=fp16_config(initial_scale_power=12), device=place.device,
    )  # fmt: skip
    plain = run_ranks(train_plain, 1, trial)[0]
    trained = run_ranks(_train_half, trial.world_size, trial)[0]
    loss, norm = (_relative(trained[key], wanted) for key, wanted in (("losses", plain.losses), ("norms", plain.grad_norms)))
    if any(trained["skipped"]) or not 0 < loss <= LOSS_BOUND or not norm <= NORM_BOUND:
        raise RefutedError(
            f"skipped {trained['skipped']}, loss off by {loss:.1e} for {LOSS_BOUND}, norm by {norm:.1e} for {NORM_BOUND}"
        )
    overflowing = replace(trial, deepspeed=fp16_config(initial_scale_power=60), steps=1)
    ranks = run_ranks(_train_half, trial.world_size, overflowing)
    if ranks[0]["skipped"] != [True]:
        raise RefutedError("a loss scale of 2^60 overflowed no gradient")
    initial = run_ranks(_initial_in_half, 1, overflowing)[0]
    shards = {name: shard for rank in ranks for name, shard in rank["shards"].items()}
    demand_equal("weights before and after a step that overflowed", differing(shards, initial))
    return {"loss_difference": loss, "norm_difference": norm, "loss_bound": LOSS_BOUND, "norm_bound": NORM_BOUND}


def _train_half(trial: Trial) -> dict[str, Any]:
    if trial.device == "cpu":
        allow_fp16()
    return train_in_layout(trial)


def _initial_in_half(trial: Trial) -> dict[str, Any]:
    return {name: p.detach().half().float() for name, p in initial_model(trial).named_parameters()}


def _relative(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def statistics(place: Place) -> Figures:
    """Compare every statistic of the monitor with the oracle's, which stays on the CPU: products are rounded in another order."""
    bound = 1e-4 if place.on_gpu else 1e-5
    trial = statistics_oracle.trial_of(tiny_config("llama"), 1, 1, 1, device=place.device)
    try:
        statistics_oracle.assert_equal(trial, bound=bound)
    except AssertionError as error:
        raise RefutedError(str(error)) from error
    return {"bound": bound}


CHECKS = (
    *(
        GpuCheck(f"gate {family} {precision}", f"{recipe} against plain transformers, tools.verify", partial(gate, **which))
        for family, recipe in FAMILIES.items()
        for precision in PRECISIONS
        for which in [{"family": family, "precision": precision}]
    ),
    GpuCheck("varlen", "attention without masks is attention with them, output and gradients", varlen),
    GpuCheck("schedules", "zero bubbles and interleaved schedules are 1F1B, bit for bit, fp32 and bf16", schedules, ranks=2),
    GpuCheck("fp16", "fp16 tracks fp32, and a step that overflows changes no weight", half),
    GpuCheck("statistics", "the monitor's statistics are the oracle's", statistics),
)
