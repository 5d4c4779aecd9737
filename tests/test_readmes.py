"""Tries every command that a README shows: its files exist, its tool accepts its flags as written, and the quick ones run.

The commands of one README run in order in one folder that looks like the repository, so that `cp` creates what the next line
starts. tests/launch/test_launch.py does the same for launch/README.md. Links and pictures of every page are checked too.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  imported once, before processes are forked

import recipes.common.train
from recipes.common.recipe import ROOT
from tests.test_layering import FLOORS
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe
from tools.new_recipe import __main__ as new_recipe
from tools.plan import search

READMES = (
    "README.md",
    "recipes/README.md",
    "recipes/common/README.md",
    "recipes/TRAINING.md",
    "recipes/COMPARISON.md",
    "ds_configs/README.md",
    "tools/README.md",
    "tools/plan/README.md",
    "tools/throughput/README.md",
    "tools/spikes/README.md",
    "tools/changed/README.md",
    "tools/replay/README.md",
    "tests/README.md",
)
PAGES = (*READMES, "launch/README.md", "recipes/FAMILIES.md")
README_WORDS = 1_200
FOLDERS = ("recipes", "launch", "tools", "tests", "ds_configs")
# verbs that take seconds and need no prepared data: run as written, and they must succeed
QUICK = {"tools.new_recipe": "", "tools.plan": "search explain layouts", "tools.throughput": "flops", "tools.curves": "",
         "tools.checkpoint": "advise"}  # fmt: skip


EXAMPLE = r"\| `(python -m tools\.[^`]+)` "  # the last cell of a row


def blocks(readme):
    """Yield the command lines of the bash blocks, where a backslash joins two lines, and the tools' examples in tables."""
    text = (ROOT / readme).read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.split(r"(?:^|\s\s+|\s)# ", line)[0].strip()
            if command:
                yield command
    yield from re.findall(rf"{EXAMPLE}\|$", text, flags=re.M)


def inline(readme):
    """Yield each `python ...` of the text: a tool with its flags, or a bench."""
    text = re.sub(rf"```.*?```|{EXAMPLE}", "", (ROOT / readme).read_text(), flags=re.S)
    for command in re.findall(r"`(python [^`]+)`", text):
        if not re.search(r"\bNAME\b|\bx\.py$", command):  # a placeholder for many commands
            yield command


BLOCKS = [(readme, command) for readme in READMES for command in blocks(readme)]
INLINE = [(readme, command) for readme in READMES for command in inline(readme)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return {(readme, command): what is wrong with it, or ""}."""
    wrong = {}
    for readme in READMES:
        folder = tmp_path_factory.mktemp("readme")
        commands = [command for name, command in BLOCKS if name == readme]
        said = run_ranks(_follow, 1, str(folder), commands)[0] if commands else []
        wrong |= {(readme, command): problem for command, problem in zip(commands, said, strict=True)}
    return wrong


@pytest.mark.parametrize(("readme", "command"), BLOCKS)
def test_a_command_of_a_block_is_accepted(found, readme, command):
    assert found[readme, command] == ""


def _follow(folder, commands):
    lay_out(Path(folder), commands)
    os.chdir(folder)
    for module in (search, new_recipe):  # a search of every eighth layout runs as one of all does
        module.candidates = lambda *args, own=module.candidates: own(*args)[::8]
    return [problem_of(shlex.split(command), command) for command in commands]


def lay_out(folder, commands):
    """Link the repository's files, and make a hostfile and the runs that `tools.curves` draws."""
    for name in FOLDERS:
        (folder / name).mkdir()
        for path in (ROOT / name).iterdir():
            if path.is_dir() and not any(path.glob("*.py")):
                (folder / name / path.name).mkdir()  # pictures, which commands draw again
            else:
                (folder / name / path.name).symlink_to(path)
    (folder / "hosts").write_text("a slots=8\n")
    lines = [{"step": 0, "val_loss": 8.0}]
    for step in range(1, 101):
        number = dict.fromkeys(("loss", "val_loss", "grad_norm", "lr", "update_ratio"), 5 - step / 100)
        lines.append({"step": step, "tokens": 64, "consumed_tokens": 64 * step, **number})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for word in (word for command in commands if "tools.curves" in command for word in shlex.split(command)):
        if word.startswith("runs/") and not (folder / word).exists():
            (folder / word).mkdir(parents=True)
            (folder / word / "metrics.jsonl").write_text(text)


def problem_of(words, command):
    """Return why a command would not do what the text says, or ""."""
    missing = [w for w in words if w.partition("/")[0] in FOLDERS and not Path(w).exists() and w not in made_by(words)]
    if missing:
        return f"there is no {', '.join(missing)}"
    runs_tests = command.startswith(("bash tests/run.sh", "bash tests/gpu.sh", "python -m pytest"))  # as this does
    if command == "source .venv/bin/activate" or runs_tests:  # launch/venv.sh makes the first
        return ""
    if words[0] in ("cp", "sed"):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        same = words[0] == "sed" and not done.returncode and Path(words[-1]).read_bytes() == Path(words[-3]).read_bytes()
        return done.stderr or ("changes nothing" if same else "")
    if words[0] == "bash":
        printing = words if "--print" in words else [*words[:2], "--print", *words[2:]]
        done = subprocess.run(printing, capture_output=True, text=True)
        return done.stderr or f"exit {done.returncode}" if done.returncode else ""
    if words[:2] == ["python", "-m"]:
        quick = words[2] in QUICK and (not QUICK[words[2]] or words[3] in QUICK[words[2]].split())
        return (run if quick else parse)(tool(words[2]), words[3:])
    if words[0] == "python" and words[1].startswith("recipes/"):
        start = lambda: runpy.run_path(words[1], run_name="__main__")  # noqa: E731
        return (run if "--dry-run" in words else parse)(start, words[2:])
    return "tests/test_readmes.py does not know how to try it"


def made_by(words):
    """Return the files that the command itself writes: B in `cp A B`, `sed ... > B` and `--out B`."""
    made = {words[-1]} if words[0] in ("cp", "sed") else set()
    return made | {after for word, after in pairwise(words) if word == "--out"}


def tool(name):
    spec = importlib.util.find_spec(name)
    return importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name).main


def parse(start, words):
    """Run the program up to the end of its own argument parser, with abbreviated flags turned off."""
    own = argparse.ArgumentParser.parse_args

    class Parsed(BaseException):
        pass

    def only_parse(self, *given, **more):
        own(self, *given, **more)
        raise Parsed

    with (
        patch.object(argparse.ArgumentParser, "parse_args", only_parse),
        patch.object(argparse.ArgumentParser, "_get_option_tuples", lambda self, text: []),
    ):
        try:
            return run(start, words) or "the program did not parse its arguments"
        except Parsed:
            return ""


def run(start, words):
    said, complaint = io.StringIO(), io.StringIO()
    sys.argv = ["program", *words]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        try:
            code = start()
        except SystemExit as leaving:
            code = leaving.code
    return complaint.getvalue() or f"exit {code}: {said.getvalue()}" if isinstance(code, int) and code else ""


@pytest.mark.parametrize(("readme", "command"), INLINE)
def test_a_command_in_the_text_is_accepted(readme, command):
    words = command.split()
    if words[1] == "-m":
        assert run_ranks(_parse_tool, 1, words[2], words[3:]) == [""]
    else:
        assert (ROOT / words[1]).is_file()


def _parse_tool(name, words):
    # without arguments the text only mentions the tool
    return parse(tool(name), words) if words else ("" if callable(tool(name)) else "no main()")


def test_a_wrong_command_is_noticed(tmp_path):
    """Check that this file reports commands that would fail."""
    expected = {
        "python -m tools.plan search recipes/llama_1b.py --gpu 64 --gpu-type H100": "--gpus",
        "python -m tools.plan search recipes/none.py --gpus 64 --gpu-type H100": "there is no recipes/none.py",
        "python -m tools.checkpoint lst RUN": "invalid choice",
        "python recipes/quickstart.py --out-dirs runs/x": "--out-dirs",
        "python recipes/llama_1b.py --dry-run --world-size 63": "63",
        "bash launch/local.sh --procs 8 recipes/quickstart.py": "--procs",
        "sed 's/lr=5e-3/lr=1e-3/' recipes/quickstart.py > recipes/new.py": "changes nothing",
        "rm -rf runs": "does not know",
    }
    for problem, part in zip(run_ranks(_follow, 1, str(tmp_path), list(expected))[0], expected.values(), strict=True):
        assert part in problem


def variants():
    """Return {run of TRAINING.md: the arguments of `sed` that make its recipe}."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| [\d.]", (ROOT / "recipes/TRAINING.md").read_text(), flags=re.M))
    edits = {run: re.findall(r"`(s/[^`]+)`", cell) for run, cell in rows.items()}
    return {run: edits.get((re.findall(r"^as `(\w+)`", rows[run]) or [""])[0], []) + own for run, own in edits.items()}


def test_the_variants_of_training_are_recipes(tmp_path):
    """Check that each edit of its table changes the recipe, is needed, and leaves a valid one."""
    made = variants()
    assert next(iter(made)) == "base" and made.pop("base") == [] and len(made) > 10
    for run, edits in made.items():
        assert edits, run
        for place in range(len(edits)):  # each edit is needed
            shorter = "; ".join(edits[:place] + edits[place + 1 :])
            assert edit(shorter, tmp_path / "shorter.py") != edit("; ".join(edits), tmp_path / f"{run}.py")
    files = [ROOT / "recipes/quickstart.py", *(tmp_path / f"{run}.py" for run in made)]
    quickstart, *others = run_ranks(_read, 1, [str(path) for path in files])[0]
    for run, recipe in zip(made, others, strict=True):
        assert recipe != quickstart, run
        assert recipe["tokens"] == quickstart["tokens"]
    assert "seed=1" in edit("s/steps=300,/steps=300, seed=1,/", tmp_path / "seed_1.py")


def edit(script, out):
    text = subprocess.run(["sed", script, str(ROOT / "recipes/quickstart.py")], capture_output=True, text=True, check=True).stdout
    out.write_text(text)
    return text


def _read(paths):
    from recipes.common.checks.recipe_checks import check_recipe
    from recipes.common.config.lr_schedules import tokens_of_run

    found = []
    for recipe in map(load_recipe, paths):
        check_recipe(recipe, 1, check_machine=False)
        said = {name: repr(getattr(recipe, name)) for name in ("optimizer", "schedule", "batch", "steps", "deepspeed")}
        found.append(said | {"tokens": tokens_of_run(recipe)})
    return found


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_listed_here():
    pages = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.md")}
    assert pages | {"README.md"} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_relative_links_of_a_page_exist(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.M)
            assert anchor in map(slug, headings), f"{page}: {link}"


def test_the_loop_of_the_readme_is_the_loop():
    (excerpt,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    loop = iter(inspect.getsource(recipes.common.train.train).splitlines())
    for line in excerpt.splitlines():
        if line.strip() != "...":
            assert any(line == own.removeprefix("    ") for own in loop), line


def test_the_stairs_of_the_readmes_are_the_stair():
    names = [name for floor in reversed(FLOORS) for name in floor]
    (listed,) = re.findall(r"```\n(train\.py.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert sorted(re.findall(r"^(\w+)", listed, flags=re.M)) == sorted(names)
    (drawn,) = re.findall(r"```\n(\d+   train\.py.*?)```", (ROOT / "recipes/common/README.md").read_text(), flags=re.S)
    assert [set(re.findall(r"[a-z]\w+(?=/|\.py)", line)) for line in drawn.splitlines()] == [set(f) for f in reversed(FLOORS)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_every_tool_and_verb_has_a_row_with_an_example():
    text = (ROOT / "tools" / "README.md").read_text()
    rows = dict(re.findall(rf"^\| `([^`]+)` \|[^|]+{EXAMPLE}\|$", text, flags=re.M))
    files = {path.stem for path in ROOT.glob("tools/*.py")} - {"__init__"}
    names = files | {name for path in ROOT.glob("tools/*/__main__.py") for name in run_ranks(_names_of, 1, path.parent.name)[0]}
    assert rows.keys() == names
    for name, example in rows.items():
        assert example.startswith(f"python -m tools.{name} "), example


def _names_of(tool_name):
    module = importlib.import_module(f"tools.{tool_name}.__main__")
    return [f"{tool_name} {verb}" for verb in module.VERBS] if hasattr(module, "VERBS") else [tool_name]


def test_the_pictures_exist_and_are_small():
    for readme in PAGES:
        folder = (ROOT / readme).parent
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|<img src=\"([^\"]+)\"", (ROOT / readme).read_text()):
            picture = folder / (path[0] or path[1])
            assert picture.is_file(), f"{readme}: {picture}"
            assert picture.stat().st_size < (200_000 if picture.suffix == ".png" else 60_000)
