"""However a recipe is started, by which launcher and from which folder, the same run comes of it.

By Python alone, for a dry run: tests/test_recipes.py, whose Python imports all itself, as torchrun's own does here. By the
deepspeed launcher, the recipe's file: the pods of tests/launch/test_kubernetes.py, which train as one machine does; its module:
tests/common/runtime/test_exits.py.
"""

import json

from tests.support.launched import copy_repository, losses, start, torchrun, train_as_started
from tools.common.forked_ranks import run_ranks

STEPS = 2
FLAGS = ("--max-steps", STEPS)


def test_torchrun_with_a_file_from_another_folder_gives_the_losses_of_forked_ranks(warm, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON_EXEC", str(warm))  # with which torchrun starts ranks
    recipe_file = copy_repository(tmp_path)
    run_ranks(train_as_started, 1, recipe_file, ["--out-dir", tmp_path / "forked", *FLAGS])
    wanted = losses(tmp_path / "forked")
    assert len(wanted) == STEPS
    process = start([*torchrun(1, recipe_file.relative_to(tmp_path)), "--out-dir", tmp_path / "run", *FLAGS], tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == wanted
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["sizes"]["pipeline"] == 1
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step_{STEPS:08d}"
