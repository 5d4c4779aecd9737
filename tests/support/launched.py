"""Starts the quickstart recipe on tiny data as a user does: by a launcher, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from recipes.common.recipe import ROOT
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.runtime.network import free_port
from tests.support.tiny import write_shards
from tools.common.recipe_io import load_recipe

PROGRAMS = Path(sys.executable).parent
_SMALLER = {
    "seq_len=128, micro_seqs=8, global_seqs=32": "seq_len=16, micro_seqs=1, global_seqs=4",
    "vocab_size=4096": "vocab_size=256",
    "num_params=2_361_024": "num_params=1_623_744",
    "evaluation=Evaluation(every_steps=100, seqs=128)": "evaluation=Evaluation(every_steps=100, seqs=8)",
}


def copy_repository(folder: Path, *, extra: str = "") -> Path:
    """Make a repository in `folder` whose quickstart is smaller and reads data in `folder`; `extra` goes before main(recipe).

    All but the recipe is the real thing, by links. Returns the recipe's path.
    """
    write_shards(folder / "data")
    text = (ROOT / "recipes" / "quickstart.py").read_text()
    paths = {
        '"runs/quickstart_data/tokenizer"': repr(str(folder / "data/tokenizer")),
        '"runs/quickstart_data"': repr(str(folder / "data")),
    }
    for old, new in {**paths, **_SMALLER, "\nif __name__": f"\n{extra}\nif __name__"}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "repository" / "recipes").mkdir(parents=True)
    recipe = folder / "repository" / "recipes" / "quickstart.py"
    recipe.write_text(text)
    (recipe.parent / "__init__.py").touch()
    (recipe.parent / "common").symlink_to(ROOT / "recipes" / "common")
    return recipe


def start(command: list[object], folder: Path) -> subprocess.Popen[str]:
    """Start a launcher's command in `folder`, without what this process's own environment says about ranks."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    variables = {**kept, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
    words = [str(word) for word in command]
    return subprocess.Popen(words, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def deepspeed(ranks: int, *words: object) -> list[object]:
    return ["deepspeed", "--hostfile", os.devnull, "--master_port", free_port(), "--num_gpus", ranks, *words]


def torchrun(ranks: int, *words: object) -> list[object]:
    return ["torchrun", "--nproc-per-node", ranks, "--master-port", free_port(), *words]


def train_as_started(recipe_file: Path, flags: list[object]) -> None:
    """Train on this forked rank as a launcher would have it."""
    from recipes.common import train

    train.end_rank = lambda *_: None  # a forked rank has an answer to give
    sys.argv = [str(recipe_file), *map(str, flags)]
    train.main(load_recipe(str(recipe_file)))


def losses(out_dir: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(out_dir) if "loss" in record]
