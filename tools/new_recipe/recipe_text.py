"""Writes the text of a flat recipe: the model's fields as another recipe states them, new numbers with a reason beside each."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path

from recipes.common.recipe import Layout, Recipe
from tools.new_recipe.scaling_rules import Hyperparameters
from tools.new_recipe.shape import ModelShape

LINE = 130  # characters, as pyproject.toml says


def stated_fields(recipe_file: Path) -> dict[str, str]:
    """Return {field: its source text} of the config call in a flat recipe's `model=`."""
    source = recipe_file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "model" and isinstance(node.value, ast.Call):
            return {keyword.arg: ast.get_source_segment(source, keyword.value) for keyword in node.value.keywords if keyword.arg}
    raise AssertionError(f"{recipe_file} states no model=Config(...)")


def write_text(
    recipe: Recipe,
    *,
    gpus: int,
    like: str,
    stated: dict[str, str],
    shape: ModelShape,
    numbers: Hyperparameters,
    layout_source: str,
    seq_source: str,
    command: str,
) -> str:
    """Return the whole file. Nothing in it is looked up when it runs.

    stated: the model's fields as the recipe `like` writes them. The sources say where a number comes from; command: this call.
    """
    layout, batch = recipe.layouts[gpus], recipe.batch
    tokens = recipe.steps * batch.global_seqs * batch.seq_len
    every_steps = min(1000, max(recipe.steps // 20, 1))
    evaluation_seqs = min(1024, max(2_097_152 // batch.seq_len, 1))
    return f"""{_head(recipe, gpus, tokens, command)}
recipe = Recipe(
    name={_quoted(recipe.name)},
    model={type(recipe.model).__name__}(
{_model_fields(stated, shape, like)}
    ),
    num_params={shape.num_params:_},  # counted, without memory for one of them
    tokenizer={_quoted(recipe.tokenizer)},
    data={_quoted(recipe.data)},
    layouts={{
        # {layout_source}
        {gpus}: {_layout_text(layout)},
    }},
{_wrap(f"{seq_source}; {numbers.batch_source}", "    # ", "    # ")}
    batch=Batch(seq_len={batch.seq_len}, micro_seqs={batch.micro_seqs}, global_seqs={batch.global_seqs}),
    # lr: {numbers.lr_source}
    # betas, decay and clipping: Llama 2 and 3 (arXiv 2307.09288, 2407.21783)
    optimizer=AdamW(lr={numbers.lr:g}, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    # warm-up: {numbers.warmup_source}; a cosine to a tenth: arXiv 2203.15556, section 3.1
    schedule=Cosine(warmup_steps={numbers.warmup_steps}, min_lr={numbers.lr / 10:g}),
    steps={recipe.steps:_},  # {tokens / 1e9:.4g}B tokens, {tokens / shape.num_params:.1f} a parameter
    z_loss=1e-4,  # arXiv 2204.02311, section 5
    # twenty in the run, or one every 1000 steps; {evaluation_seqs * batch.seq_len:,} tokens each
    evaluation=Evaluation(every_steps={every_steps}, seqs={evaluation_seqs}),
    # as often, and every half hour; the newest three stay
    checkpoints=Checkpoints(every_steps={every_steps}, every_minutes=30, keep_last=3),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
"""


def _head(recipe: Recipe, gpus: int, tokens: int, command: str) -> str:
    launcher = "local.sh" if gpus <= 8 else "hostfile.sh --hostfile hosts"
    escaped = command.replace("\\", "\\\\").replace('"', '\\"')  # it stands in a docstring
    return f'''"""{recipe.num_params / 1e9:.3g}B parameters, {tokens / 1e9:.4g}B tokens, {gpus} GPUs. Measured: not yet.

    bash launch/{launcher} recipes/{recipe.name}.py --out-dir /ckpt/{recipe.name}
    python recipes/{recipe.name}.py --dry-run --world-size {gpus}

Made by:
{_wrap(escaped, "    ", "        ")}
Each number has its source beside it; none was measured.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import {type(recipe.model).__name__}

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main
'''


def _model_fields(stated: dict[str, str], shape: ModelShape, like: str) -> str:
    reasons = _shape_reasons(shape, like)
    reasons |= {field: f"as {like}" for field, value in stated.items() if field not in reasons and re.search(r"\d", value)}
    fields = stated | {field: f"{value:_}" if value >= 10_000 else str(value) for field, value in shape.fields.items()}
    return "\n".join(
        f"        {field}={value}," + (f"  # {reasons[field]}" if field in reasons else "") for field, value in fields.items()
    )


def _shape_reasons(shape: ModelShape, like: str) -> dict[str, str]:
    reasons = {}
    for field in shape.fields:
        if field in ("intermediate_size", "moe_intermediate_size"):
            reasons[field] = f"the ratio of {like}, to a multiple of 64"
        elif field == "num_key_value_heads":
            reasons[field] = f"grouped as in {like}"
        elif field in ("num_attention_heads", "n_head"):
            reasons[field] = f"the head size of {like}"
        elif field in ("num_hidden_layers", "n_layer"):
            reasons[field] = f"width / depth = {shape.aspect:.0f}; Llama 3's lie between 102 and 130 (arXiv 2407.21783, table 3)"
        else:
            reasons[field] = "the nearest to the wanted size"
    return reasons


def _layout_text(layout: Layout) -> str:
    default = Layout()
    said = {field: getattr(layout, field) for field in vars(default) if getattr(layout, field) != getattr(default, field)}
    return (
        "Layout("
        + ", ".join(f"{field}={_quoted(value) if isinstance(value, str) else value}" for field, value in said.items())
        + ")"
    )


def _quoted(text: str) -> str:
    """Quote as ruff does: in double quotes, unless the text has some."""
    return repr(text) if '"' in text else json.dumps(text, ensure_ascii=False)


def _wrap(text: str, first: str, other: str) -> str:
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, LINE, initial_indent=first, subsequent_indent=other, **options)
