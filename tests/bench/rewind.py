"""By hand: a quickstart with a high learning rate meets a bad document; it is seen live, undone, left out, and costs nothing.

python tests/bench/rewind.py [--steps 160] [--out runs/rewind]        # needs runs/quickstart_data (bash launch/quickstart.sh)

A document of random words is prepared with tools.data prepare and enters the blend for BAD_STEPS steps, three quarters of each.
Four runs of one recipe, started as a user starts them: without it, twice (another seed gives the noise); with it, logged; with
it, rewound. Prints the validation loss on the good text at the end of each, what the detectors saw live, and the report.
Exit 1 unless the rewound run ends within the noise of the clean ones.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizers import Tokenizer

from recipes.common.anomalies.rewinds import describe_rewind, read_history
from recipes.common.recipe import ROOT
from recipes.common.run_dir.black_box import read_boxes
from recipes.common.run_dir.metrics import read_metrics
from tools.common.console import table

GOOD = ROOT / "runs/quickstart_data"
SEQ_LEN, GLOBAL_SEQS = 128, 8  # a quarter of the quickstart's batch: four runs in minutes
BAD_STEPS = 8
NOISE_FACTOR = 2.0  # of the difference that another seed makes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--lr", type=float, default=8e-3, help="twice the quickstart's")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/rewind")
    flags = parser.parse_args()
    bad = prepare_bad_document(flags.out / "bad")
    planted = {"bad": bad, "bad_step": flags.steps * 5 // 8}
    runs = {
        "clean": recipe_text(flags, seed=1234),
        "clean, another seed": recipe_text(flags, seed=4321),
        "planted, logged": recipe_text(flags, seed=1234, **planted),
        "planted, rewound": recipe_text(flags, seed=1234, action="rewind", **planted),
    }
    rows, losses = [], {}
    for name, text in runs.items():
        out_dir = train(flags.out, name.replace(", ", "_").replace(" ", "_"), text)
        losses[name] = final_loss(out_dir)
        rows.append([name, f"{losses[name]:.4f}", f"{worst_loss(out_dir):.2f}", "; ".join(seen_live(out_dir)) or "-"])
        print(table(rows[-1:], ["run", "final val loss", "worst step", "seen live"]), flush=True)
    print("\n" + table(rows, ["run", "final val loss", "worst step", "seen live"]))
    noise = abs(losses["clean"] - losses["clean, another seed"])
    cost = losses["planted, rewound"] - losses["clean"]
    print(f"another seed moves the final loss by {noise:.4f}; the bad document, rewound, by {cost:+.4f}")
    print(f"history: {'; '.join(map(describe_rewind, read_history(flags.out / 'planted_rewound')))}")
    subprocess.run([sys.executable, "-m", "tools.spikes", "report", str(flags.out / "planted_rewound")], cwd=ROOT, check=True)
    return 0 if cost <= NOISE_FACTOR * noise and read_history(flags.out / "planted_rewound") else 1


def prepare_bad_document(folder: Path) -> Path:
    """60,000 random words of the quickstart's own vocabulary, as text, through tools.data prepare."""
    if (folder / "tokens" / "dataset.json").is_file():
        return folder / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(GOOD / "tokenizer" / "tokenizer.json"))
    rng = random.Random(0)
    for name in ("a", "b"):  # one for each split
        words = (tokenizer.decode([rng.randrange(300, tokenizer.get_vocab_size())]) for _ in range(60_000))
        (folder / f"{name}.txt").write_text("".join(words), encoding="utf-8")
    command = [sys.executable, "-m", "tools.data", "prepare", str(folder / "a.txt"), str(folder / "b.txt")]
    command += ["--tokenizer", str(GOOD / "tokenizer"), "--validation-fraction", "0.5", "--out", str(folder / "tokens")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "tokens"


def recipe_text(flags: argparse.Namespace, *, seed: int, bad: Path | None = None, bad_step: int = 0, action: str = "log") -> str:
    """The quickstart's own file with other numbers, as a user would change a copy."""
    tokens = SEQ_LEN * GLOBAL_SEQS
    data = repr(str(GOOD))
    if bad is not None:
        good = {str(GOOD): 1.0}
        changes = ((bad_step * tokens, {str(GOOD): 1.0, str(bad): 3.0}), ((bad_step + BAD_STEPS) * tokens, good))
        data = f"Blend(weights={good!r}, changes={changes!r})"
    every = flags.steps // 16
    changed = {
        'data="runs/quickstart_data"': f"data={data}, seed={seed}",
        "import AdamW, Batch": "import Blend, Reaction, AdamW, Batch",
        "global_seqs=32": f"global_seqs={GLOBAL_SEQS}",
        "lr=4e-3": f"lr={flags.lr}",
        "steps=300": f"steps={flags.steps}, reaction=Reaction(action={action!r})",
        "Evaluation(every_steps=100, seqs=128)": "Evaluation(every_steps=100000, seqs=128)",
        "Checkpoints(every_steps=100)": f"Checkpoints(every_steps={every}, keep_last=3)",
    }
    text = (ROOT / "recipes" / "quickstart.py").read_text()
    for old, new in changed.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def train(out: Path, name: str, text: str) -> Path:
    """`python recipe.py`, one process. A run that has finished is not repeated."""
    recipe, out_dir = out / "recipes" / f"{name}.py", out / name
    recipe.parent.mkdir(parents=True, exist_ok=True)
    if recipe.is_file() and recipe.read_text() == text and (out_dir / "finished").is_file():
        return out_dir
    shutil.rmtree(out_dir, ignore_errors=True)
    recipe.write_text(text)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    command = [sys.executable, str(recipe), "--out-dir", str(out_dir)]
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, env=variables, check=True, stdout=log, stderr=log)
    (out_dir / "finished").touch()
    return out_dir


def final_loss(out_dir: Path) -> float:
    """Validation loss on the good text; a blend's mean would count the bad document."""
    last = [record for record in read_metrics(out_dir) if "val_loss" in record][-1]
    return last.get(f"val_loss/{GOOD.name}", last["val_loss"])


def worst_loss(out_dir: Path) -> float:
    """Of the steps after the first twenty, undone ones too."""
    files = [out_dir / "metrics.jsonl", *out_dir.glob("metrics.after_step_*.jsonl")]
    return max(record["loss"] for file in files for record in read_metrics(file) if "loss" in record and record["step"] > 20)


def seen_live(out_dir: Path) -> list[str]:
    return [
        f"{box['class']} from step {box['onset_step']}, by step {box['written_step']}"
        + (f", back to {box['reaction']['to_step']}" if box["reaction"] else "")
        for box in read_boxes(out_dir)
        if box["actionable"]
    ]


if __name__ == "__main__":
    sys.exit(main())
