"""The text of a flat recipe: the model's fields as another recipe states them, with new numbers and a reason beside each."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path

from recipes.common.recipe import Layout
from tools.new_recipe.scaling_rules import Hyperparameters
from tools.new_recipe.shape import ModelShape

LINE = 130  # characters, as pyproject.toml says

_TEXT = '''"""{title}

    bash launch/{launcher} recipes/{name}.py --out-dir /ckpt/{name}
    python recipes/{name}.py --dry-run --world-size {gpus}

Made by:
{command}
Each number has its source beside it; none was measured.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from recipes/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import {config}

from recipes.common.recipe import AdamW, Batch, Checkpoints, Cosine, Evaluation, Layout, Recipe
from recipes.common.train import main

recipe = Recipe(
    name={name_text},
    model={config}(
{model}
    ),
    num_params={num_params:_},  # counted, without memory for one of them
    tokenizer={tokenizer},
    data={data},
    layouts={{
        # {layout_source}
        {gpus}: {layout},
    }},
{batch_source}
    batch=Batch(seq_len={seq_len}, micro_seqs={micro_seqs}, global_seqs={global_seqs}),
    # lr: {lr_source}
    # betas, decay and clipping: Llama 2 and 3 (arXiv 2307.09288, 2407.21783)
    optimizer=AdamW(lr={lr:g}, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0),
    # warm-up: {warmup_source}; a cosine to a tenth: arXiv 2203.15556, section 3.1
    schedule=Cosine(warmup_steps={warmup_steps}, min_lr={min_lr:g}),
    steps={steps:_},  # {tokens:.4g}B tokens, {per_parameter:.1f} a parameter
    z_loss=1e-4,  # arXiv 2204.02311, section 5
    # twenty in the run, or one every 1000 steps; {evaluation_tokens} tokens each
    evaluation=Evaluation(every_steps={every_steps}, seqs={evaluation_seqs}),
    # as often, and every half hour; the newest three stay
    checkpoints=Checkpoints(every_steps={every_steps}, every_minutes=30, keep_last=3),
    deepspeed="zero1_bf16.json",
)

if __name__ == "__main__":
    main(recipe)
'''


def stated_fields(recipe_file: Path) -> dict[str, str]:
    """Field -> its source text, of the config call in a flat recipe's `model=`."""
    source = recipe_file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "model" and isinstance(node.value, ast.Call):
            return {keyword.arg: ast.get_source_segment(source, keyword.value) for keyword in node.value.keywords if keyword.arg}
    raise AssertionError(f"{recipe_file} states no model=Config(...)")


def write_text(
    *,
    name: str,
    like: str,
    config: str,
    stated: dict[str, str],
    shape: ModelShape,
    numbers: Hyperparameters,
    seq_len: int,
    seq_source: str,
    micro_seqs: int,
    gpus: int,
    layout: Layout,
    layout_source: str,
    tokenizer: str,
    data: str,
    command: str,
) -> str:
    """The whole file. Nothing in it is looked up when it runs."""
    reasons = _shape_reasons(shape, like)
    reasons |= {field: f"as {like}" for field, value in stated.items() if field not in reasons and re.search(r"\d", value)}
    fields = stated | {field: f"{value:_}" if value >= 10_000 else str(value) for field, value in shape.fields.items()}
    lines = (
        f"        {field}={value}," + (f"  # {reasons[field]}" if field in reasons else "") for field, value in fields.items()
    )
    model = "\n".join(lines)
    tokens = numbers.steps * numbers.global_seqs * seq_len
    every_steps = min(1000, max(numbers.steps // 20, 1))
    evaluation_seqs = min(1024, max(2_097_152 // seq_len, 1))
    made_by = command.replace("\\", "\\\\").replace('"', '\\"')  # it stands in a docstring
    return _TEXT.format(
        title=f"{shape.num_params / 1e9:.3g}B parameters, {tokens / 1e9:.4g}B tokens, {gpus} GPUs. Measured: not yet.",
        name=name,
        name_text=_quoted(name),
        launcher="local.sh" if gpus <= 8 else "hostfile.sh --hostfile hosts",
        command=_wrap(made_by, "    ", "        "),
        config=config,
        model=model,
        num_params=shape.num_params,
        tokenizer=_quoted(tokenizer),
        data=_quoted(data),
        gpus=gpus,
        layout=_layout_text(layout),
        layout_source=layout_source,
        batch_source=_wrap(f"{seq_source}; {numbers.batch_source}", "    # ", "    # "),
        seq_len=seq_len,
        micro_seqs=micro_seqs,
        global_seqs=numbers.global_seqs,
        lr_source=numbers.lr_source,
        lr=numbers.lr,
        warmup_source=numbers.warmup_source,
        warmup_steps=numbers.warmup_steps,
        min_lr=numbers.lr / 10,
        steps=numbers.steps,
        tokens=tokens / 1e9,
        per_parameter=tokens / shape.num_params,
        every_steps=every_steps,
        evaluation_seqs=evaluation_seqs,
        evaluation_tokens=f"{evaluation_seqs * seq_len:,}",
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
    """As ruff formats it: in double quotes, unless the text has some."""
    return repr(text) if '"' in text else json.dumps(text, ensure_ascii=False)


def _wrap(text: str, first: str, other: str) -> str:
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, LINE, initial_indent=first, subsequent_indent=other, **options)
