"""However a recipe is started, by which launcher and from which folder, the same run comes of it.

By Python alone, for a dry run: tests/test_recipes.py. By the deepspeed launcher and the recipe's file: the pods of
tests/launch/test_kubernetes.py, which train as one machine does.
"""

import json
import sys
from pathlib import Path

import pytest

from recipes.common.run_dir.metrics import read_metrics
from tests.support.launched import copy_repository, deepspeed, start, torchrun
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe

STEPS = 2
FLAGS = ("--max-steps", STEPS)
WAYS = ("deepspeed --module, 2 ranks", "torchrun FILE, from another folder")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("entry"))


def losses(out_dir: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(out_dir) if "loss" in record]


@pytest.fixture(scope="module")
def wanted(recipe_file, tmp_path_factory):
    """{ranks: the losses of the same run on as many forked ranks, without any launcher}"""
    found = {}
    for ranks in (1, 2):
        out_dir = tmp_path_factory.mktemp("forked")
        run_ranks(_main, ranks, str(recipe_file), ["--out-dir", str(out_dir), *map(str, FLAGS)])
        found[ranks] = losses(out_dir)
        assert len(found[ranks]) == STEPS
    return found


def _main(recipe_file, flags):
    from recipes.common import train

    train.end_rank = lambda *_: None  # a forked rank has an answer to give
    sys.argv = [recipe_file, *flags]
    train.main(load_recipe(recipe_file))


def ways(recipe_file: Path) -> dict[str, tuple[int, list[object], Path]]:
    """name -> (ranks, command, the folder it is given in)"""
    repository, elsewhere = recipe_file.parents[1], recipe_file.parents[2]
    return {
        WAYS[0]: (2, deepspeed(2, "--module", "recipes.quickstart"), repository),
        WAYS[1]: (1, torchrun(1, recipe_file.relative_to(elsewhere)), elsewhere),
    }


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_start_gives_the_same_losses(recipe_file, wanted, tmp_path, way):
    ranks, command, folder = ways(recipe_file)[way]
    process = start([*command, "--out-dir", tmp_path / "run", *FLAGS], folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == wanted[ranks]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["sizes"]["pipeline"] == ranks
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step_{STEPS:08d}"
