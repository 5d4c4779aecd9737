"""The numerics gate: does this recipe, in this layout, on these installed versions, train what plain transformers trains?

    python -m tools.verify recipes/llama_1b.py --layout tensor=2,pipeline=2,data=2

Shrinks the recipe's own model (same family, same options), trains a few steps in the layout and in one process with plain
transformers, and prints the largest differences in loss, gradient norm, gradients and parameters, by parameter name. Gradients
come from a step of plain SGD without clipping, because Adam and clipping hide a wrong scale. Exit 1 past tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import PreTrainedConfig

from recipes.common.check import config_problems, optimizer_problems, pipeline_schedule_problems
from recipes.common.ds_config import ds_config_path, ds_config_problems, load_ds_config, precision, version_problems, zero_stage
from recipes.common.plans import PlanError
from recipes.common.proof import cut_problems
from recipes.common.recipe import AdamW, Layout, Recipe, RecipeError
from recipes.common.shrink import shrink
from tools.common.local_ranks import RankError, run_ranks
from tools.common.numerics import Outcome, Trial, gradient_trial, outcome, train_in_layout, train_plain

# (loss and gradient norm, relative; gradients and parameters, absolute). bf16 rounds at 2^-9 and Adam's first steps turn a
# rounded gradient's sign into a whole step, so parameters are held to twice the distance they can travel.
FP32 = (1e-6, 1e-5)
LOW_LOSS, LOW_NORM = 2e-3, 5e-2


@dataclass(frozen=True)
class Row:
    what: str
    where: str  # the parameter or the step of the largest difference
    difference: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # False for NaN


def main() -> None:
    flags = _parse_flags()
    try:
        recipe = load_recipe(flags.recipe)
        layout, data = parse_layout(flags.layout)
        trial = make_trial(recipe, layout, data, steps=flags.steps, seq_len=flags.seq_len, device=flags.device)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        rows = verify(trial)
    except (RankError, AssertionError) as error:
        print(f"error: the layout could not be trained: {error}", file=sys.stderr)
        sys.exit(1)
    passed = all(row.passed for row in rows)
    if flags.json:
        print(json.dumps({"recipe": recipe.name, "layout": flags.layout, "passed": passed, "rows": [asdict(r) for r in rows]}))
    else:
        print(_table(recipe, trial, rows))
    sys.exit(0 if passed else 1)


def load_recipe(path: str) -> Recipe:
    """The `recipe` of a recipe file, by path. Raises RecipeError when there is none."""
    file = Path(path)
    if not file.is_file():
        raise RecipeError("recipe", [f"{path}: there is no such file; give the path of a recipe, like recipes/llama_1b.py"])
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "recipes"  # its imports start at the repository root, as when it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code or a config's validation raises
        raise RecipeError("recipe", [f"{path} cannot be read: {type(error).__name__}: {error}"]) from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError("recipe", [f"{path} defines no `recipe = Recipe(...)`"])
    return recipe


def parse_layout(text: str) -> tuple[Layout, int]:
    """(layout, data ranks) of "tensor=2,pipeline=2,data=2,recompute_every=1,schedule=zero_bubble"; sizes not said are 1."""
    values: dict[str, int | str] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        known = name == "schedule" or (name in ("tensor", "pipeline", "data", "recompute_every") and value.isdigit())
        if not known or name in values:
            raise RecipeError(
                "--layout",
                [f"--layout={text!r}: {item!r} is not tensor=N, pipeline=N, data=N, recompute_every=N or schedule=NAME"],
            )
        values[name] = value if name == "schedule" else int(value)
    data = values.pop("data", 1)
    layout = Layout(**values)
    if min(data, layout.tensor, layout.pipeline) < 1:
        raise RecipeError("--layout", [f"--layout={text!r}: sizes start at 1"])
    if problems := pipeline_schedule_problems(layout):
        raise RecipeError("--layout", [f"--layout={text!r}: {problem}" for problem in problems])
    return layout, data


def make_trial(recipe: Recipe, layout: Layout, data: int, *, steps: int, seq_len: int, device: str) -> Trial:
    """The recipe at tiny width. Raises RecipeError with everything that keeps it from being tried."""
    ds_config = load_ds_config(recipe.deepspeed)
    problems = version_problems(_installed("deepspeed"), torch.__version__) + config_problems(recipe.model)
    problems += ds_config_problems(ds_config, ds_config_path(recipe.deepspeed), layout) + optimizer_problems(recipe.optimizer)
    try:
        model = without_dropout(shrink(recipe.model, layout))
    except (PlanError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"recipe {recipe.name!r}", [*problems, f"model: cannot be shrunk for a trial: {error}"]) from error
    if not problems:  # in a rank of its own, as all that computes: see tools.common.local_ranks
        problems = run_ranks(cut_problems, 1, recipe.model, layout, recipe.attention)[0]
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} in the layout {layout}", problems)
    return Trial(
        model=model,
        layout=layout,
        world_size=layout.tensor * layout.pipeline * data,
        optimizer=recipe.optimizer,
        deepspeed=ds_config,
        steps=steps,
        seq_len=seq_len,
        global_seqs=4 * data,
        z_loss=recipe.z_loss,
        attention=recipe.attention,
        device=device,
    )


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Random zeros differ between layouts by design; everything else must not."""
    fields = {name: 0.0 for name, value in config.to_dict().items() if name in _DROPOUTS and isinstance(value, float)}
    config.update(fields)
    return config


_DROPOUTS = frozenset(
    {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout", "dropout",
     "activation_dropout", "embedding_dropout", "resid_dropout", "embd_dropout", "ffn_dropout", "summary_first_dropout"}
)  # fmt: skip


def verify(trial: Trial) -> list[Row]:
    """Train all sides (in forked ranks) and compare."""
    trained, plain = _both(trial)
    rate = trial.optimizer.lr
    low = precision(trial.deepspeed) != "fp32"
    loss, norm = (LOW_LOSS, LOW_NORM) if low else (FP32[0], FP32[0])
    rows = [
        _worst_step("loss", trained.losses, plain.losses, loss),
        _worst_step("gradient norm", trained.grad_norms, plain.grad_norms, norm),
        _worst_tensor("parameter", trained.parameters, plain.parameters, 2 * trial.steps * rate if low else FP32[1]),
    ]
    trained, plain = _both(gradient_trial(replace(trial, deepspeed=_in_fp32(trial.deepspeed))))
    rows.append(_worst_tensor("gradient, fp32", trained.parameters, plain.parameters, FP32[1]))
    return rows


def _in_fp32(config: dict) -> dict:
    """The same ds_config without low precision: rounding would hide a wrong scale of a few per cent."""
    return {name: block for name, block in config.items() if name not in ("bf16", "fp16")}


def _both(trial: Trial) -> tuple[Outcome, Outcome]:
    if isinstance(trial.optimizer, AdamW):  # near-zero gradients would be all rounding: eps of 1e-8 divides them up to 1
        trial = replace(trial, optimizer=replace(trial.optimizer, eps=max(trial.optimizer.eps, 1e-5)))
    plain = run_ranks(train_plain, 1, trial)[0]
    shapes = {name: tensor.shape for name, tensor in plain.parameters.items()}
    return outcome(run_ranks(train_in_layout, trial.world_size, trial), shapes), plain


def _worst_step(what: str, ours: list[float], plain: list[float], bound: float) -> Row:
    relative = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, plain, strict=True)]
    worst = max(range(len(relative)), key=lambda i: relative[i] if relative[i] == relative[i] else float("inf"))
    return Row(what, f"step {worst + 1}", relative[worst], bound)


def _worst_tensor(what: str, ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], bound: float) -> Row:
    missing = sorted(set(ours) ^ set(plain))
    if missing:
        return Row(what, f"{missing[0]} is on one side only", float("nan"), bound)
    worst = {name: (ours[name] - plain[name]).abs().max().item() for name in plain}
    name = max(worst, key=lambda n: worst[n] if worst[n] == worst[n] else float("inf"))
    return Row(what, name, worst[name], bound)


def _installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _table(recipe: Recipe, trial: Trial, rows: list[Row]) -> str:
    lines = [
        f"{recipe.name}: {type(trial.model).__name__} at hidden size {trial.model.hidden_size}, tensor {trial.layout.tensor} x "
        f"pipeline {trial.layout.pipeline} x data {trial.data}, {precision(trial.deepspeed)}, "
        f"ZeRO {zero_stage(trial.deepspeed)}, {trial.steps} steps, against one process of plain transformers",
        f"{'':16}{'largest difference':>20}{'allowed':>12}  where",
    ]
    for row in rows:
        verdict = "" if row.passed else "   <-- FAILED"
        lines.append(f"{row.what:<16}{row.difference:>20.1e}{row.bound:>12.1e}  {row.where}{verdict}")
    return "\n".join(lines)


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="path of a recipe file")
    parser.add_argument("--layout", default="tensor=2,pipeline=2,data=2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs one GPU a rank")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
