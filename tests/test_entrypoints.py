"""However a recipe is started, by which launcher and from which folder, the same run comes of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir.metrics import read_metrics
from tests.support.launched import copy_repository, deepspeed, start, torchrun
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe

STEPS = 2
FLAGS = ("--max-steps", STEPS)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("entry"))


def losses(out_dir: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(out_dir) if "loss" in record]


@pytest.fixture(scope="module")
def wanted(recipe_file, tmp_path_factory):
    """The losses of the same run on forked ranks, without any launcher."""
    out_dir = tmp_path_factory.mktemp("forked")
    run_ranks(_main, 2, str(recipe_file), ["--out-dir", str(out_dir), *map(str, FLAGS)])
    found = losses(out_dir)
    assert len(found) == STEPS
    return found


def _main(recipe_file, flags):
    from recipes.common import train

    train.end_rank = lambda *_: None  # a forked rank has an answer to give
    sys.argv = [recipe_file, *flags]
    train.main(load_recipe(recipe_file))


def ways(recipe_file: Path) -> dict[str, tuple[list[object], Path]]:
    """name -> (command, the folder it is given in)"""
    repository, elsewhere = recipe_file.parents[1], recipe_file.parents[2]
    return {
        "deepspeed FILE": (deepspeed(2, "recipes/quickstart.py"), repository),
        "deepspeed --module": (deepspeed(2, "--module", "recipes.quickstart"), repository),
        "torchrun FILE, from another folder": (torchrun(2, recipe_file.relative_to(elsewhere)), elsewhere),
    }


@pytest.mark.parametrize("way", ["deepspeed FILE", "deepspeed --module", "torchrun FILE, from another folder"])
def test_every_way_to_start_gives_the_same_losses(recipe_file, wanted, tmp_path, way):
    command, folder = ways(recipe_file)[way]
    process = start([*command, "--out-dir", tmp_path / "run", *FLAGS], folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == wanted
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["sizes"]["pipeline"] == 2
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step_{STEPS:08d}"


def test_python_alone_from_another_folder(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--dry-run", "--world-size", "8"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("quickstart: 2,361,024 parameters")
    assert "8 GPUs = tensor 2 x pipeline 2 x data 2" in result.stdout
    assert json.loads(result.stdout[result.stdout.index("\n{") :])["gradient_accumulation_steps"] == 2
