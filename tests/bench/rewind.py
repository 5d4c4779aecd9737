"""Lets a quickstart with a high learning rate meet a bad document: it is detected, rolled back and skipped, and costs nothing.

    python -m tests.bench.rewind [--steps 160] [--out runs/rewind]        # needs runs/quickstart_data (bash launch/quickstart.sh)

A document of random words is prepared with tools.data prepare and enters the blend for BAD_STEPS steps, three quarters of each.
Four runs of one recipe: without it, twice (another seed gives the noise); with it, logged; with it, rewound. Prints the
validation loss on the good text at the end of each, what the detectors reported live, and writes the report. Exit 1 unless the
rewound run ends within the noise of the clean ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import json
import os
import random
import shutil
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

from tokenizers import Tokenizer

from recipes.common.anomalies.rewinds import describe_rewind, read_history
from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.recipe import ROOT, Recipe, derive_sizes
from recipes.common.run_dir.black_box import read_boxes
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.train import start_run, train
from tests.support.small_runs import call
from tools.common.console import FAILED, GOOD, CheckError, UsageError, exit_code, table
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe

GLOBAL_SEQS = 8  # a quarter of the quickstart's batch: four runs in minutes
BAD_STEPS = 8
SETTLED_STEP = 20
BAD_WORDS = 60_000
NOISE_FACTOR = 2.0  # of the difference that another seed makes


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rewind", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=160, help="of each run (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--eval-seqs", type=int, default=128, help="validation sequences (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=8e-3, help="(default: %(default)s, twice the quickstart's)")
    parser.add_argument("--data", type=Path, default=ROOT / "runs/quickstart_data", help="the good text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/rewind", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> int:
    if flags.steps <= SETTLED_STEP + BAD_STEPS:
        raise UsageError(f"--steps={flags.steps}: must be over {SETTLED_STEP + BAD_STEPS}")
    if not (flags.data / "dataset.json").is_file():
        raise UsageError(f"--data={flags.data}: holds no prepared data; bash launch/quickstart.sh prepares the default")
    planted = {"bad": prepare_bad_document(flags.out / "bad", flags.data / "tokenizer"), "bad_step": flags.steps * 5 // 8}
    runs = {
        "clean": recipe_text(flags, seed=1234),
        "clean, another seed": recipe_text(flags, seed=4321),
        "planted, logged": recipe_text(flags, seed=1234, **planted),
        "planted, rewound": recipe_text(flags, seed=1234, action="rewind", **planted),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, text in runs.items():
        out_dir = train_once(flags.out, name.replace(", ", "_").replace(" ", "_"), text)
        loss = final_loss(out_dir, flags.data.name)
        found[name] = {"val_loss": loss, "worst_loss": worst_loss(out_dir), "reported_live": reported_live(out_dir)}
        print(f"{name}: final val loss {loss:.4f}", file=sys.stderr, flush=True)
    noise = abs(found["clean"]["val_loss"] - found["clean, another seed"]["val_loss"])
    cost = found["planted, rewound"]["val_loss"] - found["clean"]["val_loss"]
    rewound = flags.out / "planted_rewound"
    rewinds = [describe_rewind(rewind) for rewind in read_history(rewound)]
    call_tool("spikes", "report", rewound)
    if flags.json:
        print(json.dumps({"runs": found, "seed_noise": noise, "cost": cost, "rewinds": rewinds}))
    else:
        rows = [[name, *map(_cell, figures.values())] for name, figures in found.items()]
        print(table(rows, ["run", "final val loss", "worst step", "reported live"]))
        print(f"another seed moves the final loss by {noise:.4f}; the bad document, rewound, by {cost:+.4f}")
        print(f"rewinds: {'; '.join(rewinds)}\nreport: {rewound / 'spikes.html'}")
    return GOOD if cost <= NOISE_FACTOR * noise and rewinds else FAILED


def _cell(value: float | list[str]) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "; ".join(value) or "-"


def prepare_bad_document(folder: Path, tokenizer_folder: Path) -> Path:
    """Write random words of the quickstart's own vocabulary as text, and prepare them with tools.data."""
    if (folder / "tokens" / "dataset.json").is_file():
        return folder / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    vocab, rng = tokenizer.get_vocab_size(), random.Random(0)
    for name in ("a", "b"):  # one for each split
        words = (tokenizer.decode([rng.randrange(min(300, vocab // 2), vocab)]) for _ in range(BAD_WORDS))
        (folder / f"{name}.txt").write_text("".join(words), encoding="utf-8")
    flags = ("--tokenizer", tokenizer_folder, "--validation-fraction", 0.5, "--out", folder / "tokens")
    call_tool("data", "prepare", folder / "a.txt", folder / "b.txt", *flags)
    return folder / "tokens"


def call_tool(tool: str, *words: object) -> None:
    called = call(tool, *words)
    if called.code:
        raise CheckError(f"tools.{tool} ended with {called.code}: {called.err.strip()}")


def recipe_text(flags: argparse.Namespace, *, seed: int, bad: Path | None = None, bad_step: int = 0, action: str = "log") -> str:
    """Return the quickstart's own file with other numbers, as a user would change a copy."""
    tokens = flags.seq_len * GLOBAL_SEQS
    good, data = str(flags.data), repr(str(flags.data))
    if bad is not None:
        mixed = {good: 1.0, str(bad): 3.0}
        changes = ((bad_step * tokens, mixed), ((bad_step + BAD_STEPS) * tokens, {good: 1.0}))
        data = f"Blend(weights={ ({good: 1.0})!r}, changes={changes!r})"
    changed = {
        'tokenizer="runs/quickstart_data/tokenizer"': f"tokenizer={str(flags.data / 'tokenizer')!r}",
        'data="runs/quickstart_data"': f"data={data}, seed={seed}",
        "import AdamW, Batch": "import Blend, Reaction, AdamW, Batch",
        "seq_len=128, micro_seqs": f"seq_len={flags.seq_len}, micro_seqs",
        "global_seqs=32": f"global_seqs={GLOBAL_SEQS}",
        "lr=4e-3": f"lr={flags.lr}",
        "steps=300": f"steps={flags.steps}, reaction=Reaction(action={action!r})",
        "Evaluation(every_steps=100, seqs=128)": f"Evaluation(every_steps=100000, seqs={flags.eval_seqs})",
        "Checkpoints(every_steps=100)": f"Checkpoints(every_steps={max(flags.steps // 16, 8)}, keep_last=3)",
    }
    text = (ROOT / "recipes" / "quickstart.py").read_text()
    for old, new in changed.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def train_once(out: Path, name: str, text: str) -> Path:
    """Train a recipe in a process of its own and return the run directory. A run that has finished is not repeated."""
    recipe, out_dir = out / "recipes" / f"{name}.py", out / name
    recipe.parent.mkdir(parents=True, exist_ok=True)
    if recipe.is_file() and recipe.read_text() == text and (out_dir / "finished").is_file():
        return out_dir
    shutil.rmtree(out_dir, ignore_errors=True)
    recipe.write_text(text)
    run_ranks(_train, 1, load_recipe(str(recipe)), out_dir, timeout_seconds=24 * 3600.0)
    (out_dir / "finished").touch()
    return out_dir


def _train(recipe: Recipe, out_dir: Path) -> None:
    layout, ds_config = check_recipe(recipe, 1, check_machine=True)
    sizes = derive_sizes(recipe, layout, 1)
    ds_config = merge_ds_config(ds_config, recipe, sizes, sizes.accumulation)
    with out_dir.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train(start_run(recipe, layout, sizes, ds_config, out_dir, resume_run=False))


def final_loss(out_dir: Path, good: str) -> float:
    """Return the last validation loss on the folder `good`; a blend's mean would count the bad document."""
    last = [record for record in read_metrics(out_dir) if "val_loss" in record][-1]
    return last.get(f"val_loss/{good}", last["val_loss"])


def worst_loss(out_dir: Path) -> float:
    """Return the largest loss after the first steps, undone ones included."""
    files = [out_dir / "metrics.jsonl", *out_dir.glob("metrics.after_step_*.jsonl")]
    records = [record for file in files for record in read_metrics(file)]
    return max(record["loss"] for record in records if "loss" in record and record["step"] > SETTLED_STEP)


def reported_live(out_dir: Path) -> list[str]:
    return [
        f"{box['class']} from step {box['onset_step']}, by step {box['written_step']}"
        + (f", back to {box['reaction']['to_step']}" if box["reaction"] else "")
        for box in read_boxes(out_dir)
        if box["actionable"]
    ]


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    return exit_code(lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
