"""Writes a flat recipe for a size that is not on the shelf, with the source of each number beside it.

    python -m tools.new_recipe --params 3e9 --tokens 60e9 --gpus 64 --like llama --out recipes/llama_3b.py

--like names a recipe (llama_8b), or a `model_type`: then the recipe of that type nearest in size. The model keeps its proportions
(head size, grouped heads, width of the feed-forward) and gets a new width and depth. Learning rate and batch follow the rules of
arXiv 2401.02954; the layout is the planner's first choice. The file is a start: read it and edit it.
"""

from __future__ import annotations

import argparse
import json
import keyword
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.config.ds_config import load_ds_config
from recipes.common.recipe import ROOT, AdamW, Batch, Cosine, Layout, Recipe, RecipeError
from tools.common.console import GOOD, UsageError, exit_code, machine_words, quiet_transformers
from tools.common.devices import DEVICES, GIB, find_device
from tools.common.recipe_io import load_recipe, parse_layout, states_data
from tools.new_recipe.recipe_text import stated_fields, write_text
from tools.new_recipe.scaling_rules import Hyperparameters, hyperparameters
from tools.new_recipe.shape import ModelShape, choose_shape
from tools.plan.coefficients import read_coefficients
from tools.plan.evaluate import candidates, judge
from tools.plan.model_cases import read_model


def main(argv: list[str] | None = None) -> int:
    flags = _parse_flags(argv)
    words = sys.argv[1:] if argv is None else argv
    quiet_transformers()
    return exit_code(lambda: _run(flags, words))


def _run(flags: argparse.Namespace, words: list[str]) -> int:
    out = Path(flags.out)
    if problems := _problems(flags, out):
        raise UsageError("\n".join(["tools.new_recipe:", *(f"  - {problem}" for problem in problems)]))
    like = _like(flags.like, flags.params)
    template = load_recipe(str(like))
    seq_len = flags.seq_len or template.batch.seq_len
    stated = stated_fields(like)
    shape = choose_shape(template.model, {f: getattr(template.model, f) for f in stated}, flags.params, seq_len)
    try:
        recipe, numbers, layout_source = _fill(flags, template, set(stated), shape, out.stem, seq_len)
        check_recipe(recipe, flags.gpus, check_machine=False)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    text = write_text(
        recipe,
        gpus=flags.gpus,
        like=like.stem,
        stated=stated,
        shape=shape,
        numbers=numbers,
        layout_source=layout_source,
        seq_source="seq_len as asked for" if flags.seq_len else f"seq_len as {like.stem}",
        command="python -m tools.new_recipe " + shlex.join(words),
    )
    _write(out, text)
    if flags.json:
        facts = {"recipe": str(out), "like": like.stem, "num_params": shape.num_params, "steps": numbers.steps, "lr": numbers.lr}
        print(json.dumps(facts))
    else:
        print(f"{out}: like {like.stem}, {shape.num_params:,} parameters, {numbers.steps:,} steps")
        print(_next(out, flags.gpus))
    return GOOD


def _write(out: Path, text: str) -> None:
    """Write all of it or nothing, and never over an existing file."""
    try:
        with out.open("x") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                out.unlink()  # a full disk leaves half a file
                raise
    except OSError as error:
        raise UsageError(f"--out={out}: {machine_words(error) or error}") from error


def _next(out: Path, gpus: int) -> str:
    """Return the next command. A recipe runs only from recipes/: it imports `recipes.common` from the folder above its own."""
    dry_run = f"--dry-run --world-size {gpus}"
    if out.resolve().parent == ROOT / "recipes":
        return f"now: python {shlex.quote(str(out))} {dry_run}"
    place = ROOT / "recipes" / out.name
    return f"now: mv {shlex.quote(str(out))} {shlex.quote(str(place))} && python {shlex.quote(str(place))} {dry_run}"


def _fill(
    flags: argparse.Namespace, template: Recipe, stated: set[str], shape: ModelShape, name: str, seq_len: int
) -> tuple[Recipe, Hyperparameters, str]:
    """Return the recipe, its hyperparameters, and the source of its layout.

    The rule's batch comes first, then the layout for it, then the batch that divides over the layout's data ranks.
    """
    numbers = hyperparameters(shape.layer_params, flags.tokens, seq_len, 1)
    recipe = replace(
        template,
        name=name,
        model=type(template.model)(**{field: getattr(template.model, field) for field in stated} | shape.fields),
        num_params=shape.num_params,
        tokenizer=f"/data/{name}/tokenizer" if flags.tokenizer is None else flags.tokenizer,
        data=f"/data/{name}/tokens" if flags.data is None else flags.data,
        batch=Batch(seq_len=seq_len, micro_seqs=1, global_seqs=max(numbers.global_seqs, flags.gpus)),
        schedule=Cosine(warmup_steps=0),
        steps=numbers.steps,
        z_loss=1e-4,
        deepspeed="zero1_bf16.json",
    )
    layout, data, micro_seqs, source = _given(flags) if flags.layout is not None else _planned(recipe, flags.gpus, flags.gpu_type)
    numbers = hyperparameters(shape.layer_params, flags.tokens, seq_len, micro_seqs * data // layout.context)
    recipe = replace(
        recipe,
        layouts={flags.gpus: layout},
        batch=Batch(seq_len=seq_len, micro_seqs=micro_seqs, global_seqs=numbers.global_seqs),
        optimizer=AdamW(lr=numbers.lr, weight_decay=0.1),
        schedule=Cosine(warmup_steps=numbers.warmup_steps, min_lr=numbers.lr / 10),
        steps=numbers.steps,
    )
    return recipe, numbers, source


def _given(flags: argparse.Namespace) -> tuple[Layout, int, int, str]:
    """Return (layout, data ranks, sequences of a micro batch, source) of --layout."""
    layout, data = parse_layout(flags.layout)
    replica = layout.tensor * layout.pipeline
    filled = flags.gpus % (replica * layout.context) == 0 and (not states_data(flags.layout) or data * replica == flags.gpus)
    if not filled:
        raise UsageError(f"--layout={flags.layout} does not fill --gpus={flags.gpus}; correct it, or leave out data=")
    return layout, flags.gpus // replica, 1, "given"


def _planned(recipe: Recipe, gpus: int, gpu_type: str) -> tuple[Layout, int, int, str]:
    """Return (layout, data ranks, sequences of a micro batch, source) of the planner's first choice."""
    device = find_device(gpu_type)
    facts = read_model(recipe, load_ds_config(recipe.deepspeed))
    plans, rejected = judge(facts, candidates(facts, gpus, device), device, read_coefficients(None), device.price)
    if not plans:
        why = rejected[-1].why if rejected else "no layout divides them"
        raise UsageError(f"--gpus={gpus} {device.name}: no layout of this model fits ({why}); use more GPUs or a smaller model")
    plan = plans[0]
    source = (
        f"planned on {device.name}: {plan.peak[1] / GIB:.0f} GiB a GPU, MFU {plan.mfu:.0%}, {plan.days:.2g} days; not measured"
    )
    return plan.candidate.layout, plan.candidate.data, plan.candidate.micro_seqs, source


def _like(name: str, num_params: float) -> Path:
    """Return the file of the recipe `name`, or of the recipe nearest in parameters whose `model_type` is `name`."""
    shelf = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py")) if path.stem != "__init__"}
    if name in shelf:
        return shelf[name]
    recipes = {stem: load_recipe(str(path)) for stem, path in shelf.items()}
    family = {stem: abs(math.log(r.num_params / num_params)) for stem, r in recipes.items() if r.model.model_type == name}
    if not family:
        types = sorted({recipe.model.model_type for recipe in recipes.values()})
        raise UsageError(
            f"--like={name}: there is no recipes/{name}.py, and no recipe of that model_type; "
            f"the recipes are {', '.join(shelf)}; their types {', '.join(types)}"
        )
    return shelf[min(family, key=lambda stem: family[stem])]


def _problems(flags: argparse.Namespace, out: Path) -> list[str]:
    given = {name: getattr(flags, name) for name in ("params", "tokens", "gpus")}
    problems = [f"--{name}={value:g} must be a number over 0" for name, value in given.items() if not 0 < value < math.inf]
    if flags.seq_len is not None and flags.seq_len < 1:
        problems.append(f"--seq-len={flags.seq_len} must be at least 1")
    if flags.gpu_type.lower() not in {device.name.lower() for device in DEVICES}:
        problems.append(f"--gpu-type={flags.gpu_type}: not known; use one of {', '.join(device.name for device in DEVICES)}")
    place = ROOT / "recipes" / out.name
    if out.suffix != ".py" or not out.stem.isidentifier():
        problems.append(f"--out={out} must be a Python file with a module's name, such as recipes/llama_3b.py")
    elif keyword.iskeyword(out.stem) or out.stem in sys.stdlib_module_names:
        problems.append(f"--out={out}: {out.stem} is a keyword or a standard module of Python; give another name")
    elif not out.parent.is_dir():
        problems.append(f"--out={out}: there is no folder {out.parent}")
    elif out.exists():
        problems.append(f"--out={out} exists; give another name, or remove it")
    elif place.exists():
        problems.append(f"--out={out}: there is a recipes/{out.name}, and a recipe runs only from there; give another name")
    return problems


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.new_recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=float, required=True, help="parameters, with embeddings and head, such as 3e9")
    parser.add_argument("--tokens", type=float, required=True, help="tokens to train on, such as 60e9")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run")
    parser.add_argument(
        "--like", required=True, metavar="RECIPE", help="a recipe on the shelf, or a model_type, whose proportions to keep"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, such as recipes/llama_3b.py")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence (default: RECIPE's)")
    parser.add_argument("--layout", metavar="LAYOUT", help="tensor=2,pipeline=4,... (default: the planner's first choice)")
    parser.add_argument("--gpu-type", default="H100", help="GPU type for the planner (default: %(default)s)")
    parser.add_argument("--data", help="the prepared data (default: /data/NAME/tokens)")
    parser.add_argument("--tokenizer", help="the tokenizer's folder (default: /data/NAME/tokenizer)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
