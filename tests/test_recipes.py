"""Every shipped recipe: a flat file, sound at each of its layouts, that trains in 3D what plain transformers trains."""

import ast
import contextlib
import cProfile
import importlib
import io
import json
import os
import pstats
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from recipes.common.checks.recipe_checks import layout_problems
from recipes.common.recipe import ROOT, Layout, Recipe, RecipeError
from recipes.common.train import main
from tests.support.shelf import read_shelf
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe
from tools.verify.gate import make_trial, verify

NAMES = sorted(path.stem for path in ROOT.glob("recipes/*.py") if path.stem != "__init__")
PATHS = [ROOT / "recipes" / f"{name}.py" for name in NAMES]
RECIPES = {name: load_recipe(str(path)) for name, path in zip(NAMES, PATHS, strict=True)}
SIZES = [(name, world_size) for name, recipe in RECIPES.items() for world_size in recipe.layouts]
FIRST_SIZES = list({(name, RECIPES[name].layouts[size]): (name, size) for name, size in reversed(SIZES)}.values())[::-1]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_file_is_flat(path):
    """Plain data, then main(recipe): nothing is shared between recipes, computed from the environment or defined."""
    tree = ast.parse(path.read_text())
    kinds = [type(node) for node in tree.body]
    assert set(kinds) <= {ast.Expr, ast.Import, ast.ImportFrom, ast.If, ast.Assign}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Lambda | ast.FunctionDef | ast.ClassDef), f"line {node.lineno} defines something"
        if isinstance(node, ast.Attribute | ast.Name):
            word = node.attr if isinstance(node, ast.Attribute) else node.id
            assert word not in ("environ", "getenv", "exec", "eval", "__import__"), f"line {node.lineno}: {word}"
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"sys"}, f"line {node.lineno}: a recipe reads no environment"
        if isinstance(node, ast.ImportFrom):
            others = [f"recipes.{name}" for name in NAMES]
            assert not any(node.module == other or node.module.startswith(other + ".") for other in others)
    assert [ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)] == ["recipe"]
    guards = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    assert guards == ["not __package__", "__name__ == '__main__'"]
    assert ast.unparse(tree.body[-1].body[0]) == "main(recipe)"


@pytest.mark.parametrize("name", read_shelf())
def test_a_recipe_on_the_shelf_says_how_it_is_run(name):
    text = ast.get_docstring(ast.parse((ROOT / "recipes" / f"{name}.py").read_text()))
    assert "--dry-run" in text
    assert f"recipes/{name}.py" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_name_of_its_file(name):
    assert RECIPES[name].name == name


@pytest.mark.parametrize("name", NAMES)
def test_importing_it_does_nothing(name):
    run_ranks(_import_it, 1, name)


def _import_it(name):
    environment, path, folder = dict(os.environ), list(sys.path), sorted(ROOT.iterdir())
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        module = importlib.import_module(f"recipes.{name}")
    assert isinstance(module.recipe, Recipe)
    assert (dict(os.environ), list(sys.path), sorted(ROOT.iterdir()), said.getvalue()) == (environment, path, folder, "")
    import torch.distributed as dist

    assert not dist.is_initialized()


@pytest.mark.parametrize("name", NAMES)
def test_num_params_is_what_transformers_builds(name):
    assert run_ranks(_count, 1, RECIPES[name].model)[0] == RECIPES[name].num_params


def _count(config):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.fixture(scope="module")
def dry_runs():
    """{(name, world size): text of the dry run, or the problems}, of each layout at its first size."""
    return dict(zip(FIRST_SIZES, run_ranks(_dry_runs, 1)[0], strict=True))


def _dry_runs():
    from recipes.common.checks.dry_run import describe_run
    from recipes.common.checks.recipe_checks import check_recipe
    from recipes.common.recipe import derive_sizes

    texts = []
    for name, world_size in FIRST_SIZES:
        try:
            layout, _ = check_recipe(RECIPES[name], world_size, check_machine=False)
            texts.append(describe_run(RECIPES[name], layout, derive_sizes(RECIPES[name], layout, world_size)))
        except RecipeError as error:
            texts.append(str(error))
    return texts


@pytest.mark.parametrize(("name", "world_size"), sorted(set(SIZES) - set(FIRST_SIZES)))
def test_another_size_of_a_layout_divides_its_batch(name, world_size):
    """All that a size changes is arithmetic."""
    assert layout_problems(RECIPES[name], RECIPES[name].layouts[world_size], world_size) == []


@pytest.mark.parametrize(("name", "world_size"), FIRST_SIZES)
def test_dry_run_at_each_layout(dry_runs, name, world_size):
    text, recipe = dry_runs[name, world_size], RECIPES[name]
    layout, batch = recipe.layouts[world_size], recipe.batch
    data = world_size // (layout.tensor * layout.pipeline)
    readers = data // layout.context
    accumulation = batch.global_seqs // (batch.micro_seqs * readers)
    names = "data ranks" if layout.context == 1 else "groups of context ranks"
    assert text.startswith(f"{recipe.name}: {recipe.num_params:,} parameters"), text
    assert f"{world_size} GPUs = tensor {layout.tensor} x pipeline {layout.pipeline} x data {data}" in text
    assert f"{batch.global_seqs * batch.seq_len:,} tokens a step" in text
    assert f"x {readers} {names} x {accumulation} accumulated" in text
    stages = text[text.index("stage  layers") :].splitlines()[1:]
    assert len(stages) == layout.pipeline
    assert sum(float(line.split()[-2]) for line in stages) == pytest.approx(100, abs=0.1 * layout.pipeline)


def test_dry_run_of_llama_1b_on_64_gpus(tmp_path, warm):
    """As a program, from another folder."""
    command = [str(warm), "-u", str(ROOT / "recipes" / "llama_1b.py"), "--dry-run", "--world-size", "64"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout[result.stdout.index("\n{") :])["gradient_accumulation_steps"] > 0
    for part in (
        "1,235,814,400 parameters",
        "64 GPUs = tensor",
        "accumulated",
        "2,097,152 tokens a step",
        '"bf16"',
        '"stage": 1',
    ):
        assert part in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_makes_as_many_calls_for_128_gpus_as_for_8():
    """What makes it take seconds: one rank stands for all, one layer for its kind, and no weight has memory."""
    calls, bytes_held = run_ranks(_cost_of_dry_runs, 1)[0]
    assert calls[1] < 1.2 * calls[0] < 2_000_000, calls
    assert bytes_held < 1 << 30


def _cost_of_dry_runs():
    """Return the calls of llama_1b's dry run at each size, and the memory that both took."""
    calls, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for world_size in (8, 128):
        sys.argv = ["recipe", "--dry-run", "--world-size", str(world_size)]
        with cProfile.Profile() as counted, contextlib.redirect_stdout(io.StringIO()):
            main(replace(RECIPES["llama_1b"], layouts={world_size: RECIPES["llama_1b"].layouts[64]}))
        calls.append(pstats.Stats(counted).total_calls)
    return calls, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


# held to plain transformers at this width elsewhere: the quickstart by the gate's own tests (tests/tools/verify), the families of
# tests/test_parity.py on stages and tensor ranks at once, deepseek_v3 there and in tests/common/parallel; llamas differ from
# those in the head or, llama_1b, in the rotary scaling that llama_8b_128k has, whose context ranks no test there has
SAME_AT_THIS_WIDTH = {"llama_1b", "llama_1b_long", "llama_405b", "llama_70b", "llama_8b", "llama_8b_continued", "quickstart"}
SAME_AT_THIS_WIDTH |= {"qwen3_0_6b", "qwen3_8b", "gpt2_124m", "olmo2_7b", "mixtral_8x7b", "deepseek_v3"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - SAME_AT_THIS_WIDTH))
def test_the_numerics_gate_passes_at_tiny_width(name):
    shared = any(layout.sequence_parallel for layout in RECIPES[name].layouts.values())
    context = 2 if any(layout.context > 1 for layout in RECIPES[name].layouts.values()) else 1
    layout = Layout(tensor=2, pipeline=1 if context > 1 else 2, context=context, sequence_parallel=shared)
    trial = make_trial(RECIPES[name], layout, context, steps=2, seq_len=16, device="cpu")
    rows = verify(trial)
    assert [row.what for row in rows] == ["loss", "gradient norm", "parameter", "gradient, fp32"]
    assert [row for row in rows if not row.passed] == []


@pytest.mark.parametrize(("name", "row"), read_shelf().items())
def test_a_row_of_the_shelf_has_the_parameters_and_layouts_of_its_recipe(name, row):
    assert row == (f"{RECIPES[name].num_params:,}", ", ".join(map(str, RECIPES[name].layouts)))
