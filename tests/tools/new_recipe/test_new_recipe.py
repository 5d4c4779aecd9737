"""A recipe for a size that nobody published is valid, near the wanted size, and names the source of each number."""

import ast
import os
import shlex
import subprocess

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  imported once, before processes are forked

import recipes.common.train  # noqa: F401
import tools.new_recipe.__main__  # noqa: F401
from recipes.common.recipe import ROOT
from tests.support.small_runs import call, call_file
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe
from tools.new_recipe.recipe_text import stated_fields

# --like, parameters, tokens, GPUs, more flags
WISHES = {
    "llama_8b": ("3e9", "60e9", 16, ()),
    "qwen3_8b": ("14e9", "300e9", 128, ("--layout", "tensor=8")),
    "gemma_2b": ("5e9", "100e9", 32, ("--gpu-type", "A100-80")),
    "mixtral_8x7b": ("20e9", "200e9", 64, ("--layout", "tensor=2,pipeline=4")),
    "gpt2_124m": ("350e6", "7e9", 8, ()),
    "olmo2_7b": ("13e9", "1e12", 256, ("--seq-len", "2048", "--layout", "tensor=8")),
    "gpt_neox_20b": ("7e9", "140e9", 96, ("--tokenizer", 'a "b" \\ c', "--layout", "tensor=8")),
}


def words(like, out, params="3e9", tokens="60e9", gpus=64, *more):
    return ["--params", params, "--tokens", tokens, "--gpus", gpus, "--like", like, "--out", out, *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write the recipes; return {like: (file, what the tool printed as JSON)}."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    for like, (params, tokens, gpus, more) in WISHES.items():
        out = folder / f"wish_{like}.py"
        called = call("new_recipe", *words(like, out, params, tokens, gpus, *more), "--json")
        assert called.code == 0, called.err
        found[like] = out, called.json
    return found


def _facts(path, gpus):
    from recipes.common.checks.recipe_checks import check_recipe
    from recipes.common.config.lr_schedules import tokens_of_run
    from recipes.common.model.initial_weights import build_empty
    from recipes.common.recipe import derive_sizes

    recipe = load_recipe(path)
    layout, _ = check_recipe(recipe, gpus, check_machine=False)
    count = sum(p.numel() for p in build_empty(recipe.model, "sdpa").parameters())
    sizes = derive_sizes(recipe, layout, gpus)
    whole = sizes.accumulation * sizes.data * recipe.batch.micro_seqs == recipe.batch.global_seqs
    return count, tokens_of_run(recipe), whole, recipe.model.model_type


@pytest.mark.parametrize("like", WISHES)
def test_the_recipe_is_sound_and_near_the_wish(made, like):
    path, printed = made[like]
    params, tokens, gpus, _ = WISHES[like]
    count, run_tokens, whole, family = run_ranks(_facts, 1, str(path), gpus)[0]
    assert count == load_recipe(str(path)).num_params == printed["num_params"]
    assert count == pytest.approx(float(params), rel=0.1)
    assert run_tokens == pytest.approx(float(tokens), rel=0.01)
    assert whole and family == load_recipe(str(ROOT / "recipes" / f"{like}.py")).model.model_type


@pytest.mark.parametrize("like", WISHES)
def test_every_number_says_where_it_is_from(made, like):
    """Look for the source on the number's own line, or on the comment lines right above its field."""
    text = made[like][0].read_text()
    lines, checked = text.splitlines(), 0
    tree = ast.parse(text)
    (call_of_recipe,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    for field in fields_of(call_of_recipe):
        numbers = [n for n in ast.walk(field.value) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]
        if numbers:
            own = any("  # " in line for line in lines[field.lineno - 1 : field.value.end_lineno])
            assert own or lines[field.lineno - 2].strip().startswith("# "), lines[field.lineno - 1]
            checked += 1
    assert checked > 12


def fields_of(node):
    """Yield the keywords of Recipe(...), and in place of `model` those of the config."""
    for field in node.keywords:
        if field.arg == "model":
            yield from fields_of(field.value)
        else:
            yield field


def test_the_files_are_formatted_as_the_shelf_is(made):
    files = [str(path) for path, _ in made.values()]
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check", "--ignore", "E402,I001"], ["format", "--check"]):
        done = subprocess.run(["ruff", *command, *config, *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_only_the_shape_differs_from_the_recipe_it_is_like(made):
    for like, (path, _) in made.items():
        old, new = stated_fields(ROOT / "recipes" / f"{like}.py"), stated_fields(path)
        assert list(old) == list(new)
        changed = {field for field in old if old[field] != new[field]}
        assert {field for field in changed if "vocab" in field or "rope" in field or field.endswith("_id")} == set()
        assert len(changed) >= 2


def test_a_family_takes_its_nearest_recipe(tmp_path):
    wishes = (("llama", "30e9", "tensor=8", "llama_70b"), ("qwen3", "1e9", "tensor=2", "qwen3_0_6b"))
    for wanted, params, layout, like in wishes:
        called = call("new_recipe", *words(wanted, tmp_path / f"{like}_like.py", params), "--layout", layout, "--json")
        assert called.json["like"] == like, called.err
        assert f"as {like}" in (tmp_path / f"{like}_like.py").read_text()


def test_the_next_command_is_true(tmp_path):
    """Run the printed command, which moves a recipe written elsewhere to recipes/, with a `python` that says what it is to do."""
    for name in ("recipes", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    called = call("new_recipe", *words("gpt2", tmp_path / "elsewhere.py", "350e6", "7e9", 8))
    command = called.out.splitlines()[-1].removeprefix("now: ").replace(str(ROOT / "recipes"), str(tmp_path / "recipes"))
    assert shlex.split(command)[0] == "mv"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    dry_run = call_file(*done.stdout.splitlines())
    assert dry_run.code == 0, dry_run.err
    assert "elsewhere: " in dry_run.out and "8 GPUs = tensor" in dry_run.out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"--like": "bert"},
            [
                "there is no recipes/bert.py, and no recipe of that model_type; the recipes are deepseek_v3, gemma_2b,",
                "their types deepseek_v3, gemma, gpt2, gpt_neox, llama, mixtral, olmo2, qwen3, qwen3_moe",
            ],
        ),
        (
            {"--params": "-1", "--tokens": "nan", "--gpus": "0"},
            [f"--{given} must be a number over 0" for given in ("params=-1", "tokens=nan", "gpus=0")],
        ),
        ({"--params": "1e6"}, ["--params=1e+06: no shape"]),
        ({"--params": "30e9", "--gpus": "2"}, ["no layout of this model fits"]),
        ({"--out": "{folder}/none/x.py"}, ["there is no folder"]),
        ({"--out": "{folder}/3b.py"}, ["must be a Python file with a module's name"]),
        ({"--out": "{folder}/json.py"}, ["a keyword or a standard module of Python"]),
        ({"--out": "{folder}/taken.py"}, ["taken.py exists"]),
        ({"--layout": "tensor=3"}, ["--layout=tensor=3 does not fill --gpus=64"]),
        ({"--layout": "tensors=2"}, ["tensors=2"]),
        ({"--layout": ""}, ["--layout='': '' is not tensor=N"]),
        ({"--layout": "tensor=2", "--gpu-type": "H1000"}, ["--gpu-type=H1000: not known"]),
        ({"--layout": "tensor=2", "--data": ""}, ["data=''"]),
        ({"--layout": "tensor=2", "--tokenizer": ""}, ["tokenizer=''"]),
        (
            {"--out": "{folder}/llama_1b.py"},
            ["there is a recipes/llama_1b.py, and a recipe runs only from there; give another name"],
        ),
        ({"--gpu-type": "H1000"}, ["--gpu-type=H1000: not known"]),
        ({"--seq-len": "0"}, ["--seq-len=0 must be at least 1"]),
        ({"--out": "{folder}/locked/x.py", "--layout": "tensor=2"}, ["locked/x.py"]),
    ],
)
def test_a_mistake_is_exit_2_and_nothing_is_written(tmp_path, change, told):
    (tmp_path / "taken.py").write_text("mine")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "x.py").symlink_to("/proc/none/x.py")  # cannot be written, by whomever
    before = sorted(tmp_path.rglob("*"))
    flags = {"--params": "3e9", "--tokens": "60e9", "--gpus": "64", "--like": "llama_1b", "--out": "{folder}/x.py"} | change
    called = call("new_recipe", *(word.format(folder=tmp_path) for pair in flags.items() for word in pair))
    assert called.code == 2
    assert all(each in called.err for each in told) and "Traceback" not in called.err and called.out == ""
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken.py").read_text() == "mine"
