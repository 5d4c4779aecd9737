"""`flops RECIPE`: counts FLOPs a token by every convention in use; `--published` checks the formulas on published figures."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from recipes.common.config.lr_schedules import tokens_of_run
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.flops import OURS, conventions, korthikanti, model_work, sc21_eq3
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import Recipe
from tools.common.console import FAILED, GOOD, UsageError, quiet_transformers, table
from tools.common.recipe_io import load_recipe

TOLERANCE = 0.005
A100_TFLOPS = 312.0  # dense bf16, NVIDIA A100 data sheet


@dataclass(frozen=True, kw_only=True)
class Published:
    """A measured step with its authors' TFLOP/s a GPU by SC21 eq. 3, or MFU and HFU in percent."""

    name: str
    source: str
    layers: int
    hidden: int
    vocab: int
    global_seqs: int
    seconds: float
    gpus: int
    tflops: float | None = None
    mfu_hfu: tuple[float, float] | None = None
    seq_len: int = 2048


_BLOOM = "bigscience tr11-176B chronicles"
_MT_NLG, _SC21, _KORTHIKANTI = "arXiv 2201.11990, section 2.4", "arXiv 2104.04473, section 5.1", "arXiv 2205.05198, table 5"
_GPT_530B = {"layers": 105, "hidden": 20480}
PUBLISHED = (
    Published(name="BLOOM 176B", source=_BLOOM, layers=70, hidden=14336, vocab=250880, global_seqs=2048, seconds=105.22,
              gpus=384, tflops=149.02),
    Published(name="MT-NLG 530B, 280 nodes", source=_MT_NLG, **_GPT_530B, vocab=50257, global_seqs=1920, seconds=60.1,
              gpus=2240, tflops=126),
    Published(name="MT-NLG 530B, 350 nodes", source=_MT_NLG, **_GPT_530B, vocab=50257, global_seqs=1920, seconds=50.2,
              gpus=2800, tflops=121),
    Published(name="MT-NLG 530B, 420 nodes", source=_MT_NLG, **_GPT_530B, vocab=50257, global_seqs=1920, seconds=44.4,
              gpus=3360, tflops=113),
    Published(name="GPT-3 175B", source=_SC21, layers=96, hidden=12288, vocab=51200, global_seqs=1536, seconds=32,
              gpus=1024, tflops=138),
    Published(name="22B", source=_KORTHIKANTI, layers=48, hidden=6144, vocab=51200, global_seqs=4, seconds=1.10,
              gpus=8, mfu_hfu=(41.5, 43.7)),
    Published(name="175B", source=_KORTHIKANTI, layers=96, hidden=12288, vocab=51200, global_seqs=64, seconds=13.75,
              gpus=64, mfu_hfu=(51.4, 52.8)),
    Published(name="530B", source=_KORTHIKANTI, **_GPT_530B, vocab=51200, global_seqs=280, seconds=37.83,
              gpus=280, mfu_hfu=(56.0, 57.0)),
    Published(name="1T", source=_KORTHIKANTI, layers=128, hidden=25600, vocab=51200, global_seqs=512, seconds=71.49,
              gpus=512, mfu_hfu=(56.3, 57.0)),
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe file")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default: the recipe's)")
    parser.add_argument("--published", action="store_true", help="nine published figures by these formulas; exit 1 past 0.5 %%")


def run(flags: argparse.Namespace) -> int:
    if flags.published == (flags.recipe is not None):
        raise UsageError("flops: give a RECIPE, or --published, and not both")
    if flags.published:
        return _published(flags.json)
    if flags.seq_len is not None and flags.seq_len < 1:
        raise UsageError(f"--seq-len={flags.seq_len}: must be 1 or more")
    quiet_transformers()
    recipe = load_recipe(flags.recipe)
    found = recipe_flops(recipe, flags.seq_len or recipe.batch.seq_len)
    print(json.dumps(found) if flags.json else _text(found))
    return GOOD


def recipe_flops(recipe: Recipe, seq_len: int) -> dict[str, object]:
    """Return {"recipe", "seq_len", "params", ..., "conventions": {name: {"flops_per_token", "means"}}}."""
    try:
        causal = build_empty(recipe.model, recipe.attention)
        work = model_work(causal, find_stack(causal))
    except (PlanError, ValueError, ImportError, TypeError, AttributeError) as error:
        raise UsageError(f"recipe {recipe.name!r}: model={type(recipe.model).__name__}: {error}") from error
    rows = {name: {"flops_per_token": value, "means": text} for name, (value, text) in conventions(work, seq_len).items()}
    return {
        "recipe": recipe.name,
        "seq_len": seq_len,
        "params": work.params,
        "visited_params": work.visited,
        "used": OURS,
        "flops_per_step": rows[OURS]["flops_per_token"] * recipe.batch.global_seqs * seq_len,
        "flops_of_run": rows[OURS]["flops_per_token"] * tokens_of_run(recipe) * seq_len / recipe.batch.seq_len,
        "conventions": rows,
        "uncounted": list(work.uncounted),
    }


def _text(found: dict) -> str:
    rows, ours = [], found["conventions"][OURS]["flops_per_token"]
    for name, entry in found["conventions"].items():
        per_token = entry["flops_per_token"]
        rows.append(
            [f"{name} (used)" if name == OURS else name, f"{per_token / 1e9:.4f}", f"{per_token / ours:.3f}", entry["means"]]
        )
    visited = f", {found['visited_params']:,.0f} visited by a token" if found["visited_params"] != found["params"] else ""
    lines = [
        f"{found['recipe']}: {found['params']:,} parameters{visited}, sequences of {found['seq_len']} tokens",
        table(rows, ["convention", "GFLOPs/token", "of ours", "counts"]),
        f"a step {found['flops_per_step']:.4g} FLOPs, the run {found['flops_of_run']:.4g} (ours)",
    ]
    if found["uncounted"]:
        lines.append(f"not counted: the recurrence of {', '.join(found['uncounted'])} layers (their projections are counted)")
    return "\n".join(lines)


def published_figures() -> list[dict[str, object]]:
    """Return each published figure, ours, and the relative difference (the larger one of MFU and HFU)."""
    rows = []
    for case in PUBLISHED:
        shape = (case.layers, case.hidden, case.vocab, case.seq_len)
        tokens_a_second = case.global_seqs * case.seq_len / case.seconds / case.gpus
        if case.tflops is not None:
            theirs, ours = (case.tflops,), (sc21_eq3(*shape) * tokens_a_second / 1e12,)
        else:
            theirs = case.mfu_hfu
            per_token = (korthikanti(*shape), korthikanti(*shape, selective=True))
            ours = tuple(100 * flops * tokens_a_second / (A100_TFLOPS * 1e12) for flops in per_token)
        difference = max((a / b - 1 for a, b in zip(ours, theirs, strict=True)), key=abs)
        unit = "TFLOP/s a GPU (sc21_eq3)" if case.tflops is not None else "% MFU, HFU (korthikanti)"
        rows.append({"name": case.name, "source": case.source, "unit": unit, "published": theirs, "ours": ours,
                     "difference": difference})  # fmt: skip
    return rows


def _published(as_json: bool) -> int:
    rows = published_figures()
    good = all(abs(row["difference"]) <= TOLERANCE for row in rows)
    if as_json:
        print(json.dumps({"good": good, "figures": rows}))
    else:
        cells = [
            [r["name"], _numbers(r["published"]), _numbers(r["ours"]), f"{r['difference']:+.2%}", r["unit"], r["source"]]
            for r in rows
        ]
        print(table(cells, ["figure", "published", "ours", "off", "unit", "source"]))
    return GOOD if good else FAILED


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
