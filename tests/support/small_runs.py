"""Trains small runs, compares their states, and calls a tool or a bench in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from recipes.common.checkpoint.reader import Reader
from recipes.common.config.ds_config import load_ds_config, merge_ds_config
from recipes.common.data.shards import tokenizer_hash
from recipes.common.recipe import Layout, Recipe, derive_sizes
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.train import start_run, train
from tests.support.tiny import VOCAB, ds_config, tiny_recipe, write_shards
from tools.common.forked_ranks import run_ranks


def write_data(folder: Path) -> Path:
    """Write token shards with a tokenizer that transformers loads: VOCAB words, w3 to w130 after three special ones."""
    write_shards(folder)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["tokenizer_hash"] = tokenizer_hash(tokenizer)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def small_recipe(data: Path, model: PreTrainedConfig, **fields: Any) -> Recipe:
    return tiny_recipe(data, model=model, num_params=0, **fields)


def train_run(recipe: Recipe, out_dir: Path, layout: Layout, world_size: int, *, resume: bool = False, steps: int = 2) -> Path:
    """Train a whole run on forked ranks in `layout`, unchecked. Returns its newest checkpoint."""
    run_ranks(train_on_rank, world_size, recipe, str(out_dir), layout, world_size, resume, steps)
    return out_dir / "checkpoints" / "latest"


def train_on_rank(recipe: Recipe, out_dir: str, layout: Layout, world_size: int, resume: bool, steps: int) -> None:
    """Train on this rank, as `train_run` has it."""
    sizes = derive_sizes(recipe, layout, world_size)
    config = merge_ds_config(ds_config(recipe.deepspeed), recipe, sizes, sizes.accumulation)
    train(start_run(recipe, layout, sizes, config, Path(out_dir), resume_run=resume, max_steps=steps))


def run(
    recipe: Recipe,
    world_size: int,
    out_dir: Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    max_steps: int | None = None,
    skips: tuple[tuple[int, int], ...] = (),
    accept: tuple[str, ...] = (),
) -> dict[int, dict[str, Any]]:
    """Train a whole run on forked ranks, unchecked, as a launcher would start it. Returns metrics.jsonl's records by step."""
    run_ranks(_run, world_size, recipe, world_size, str(out_dir), resume, resume_step, max_steps, skips, accept)
    return {r["step"]: r for r in read_metrics(Path(out_dir) / "metrics.jsonl") if "loss" in r}


def _run(
    recipe: Recipe,
    world_size: int,
    out_dir: str,
    resume: bool,
    resume_step: int | None,
    max_steps: int | None,
    skips: tuple[tuple[int, int], ...],
    accept: tuple[str, ...],
) -> None:
    layout = recipe.layouts[world_size]
    sizes = derive_sizes(recipe, layout, world_size)
    config = merge_ds_config(load_ds_config(recipe.deepspeed), recipe, sizes, sizes.accumulation)
    starts = {"resume_run": resume, "resume_step": resume_step, "max_steps": max_steps, "skips": skips, "accept": accept}
    train(start_run(recipe, layout, sizes, config, Path(out_dir), **starts))


def masters(out_dir: Path, kind: str = "master") -> dict[str, np.ndarray]:
    """Read the whole tensors of a run's newest checkpoint: fp32 weights, or the optimizer state `kind`."""
    reader = Reader(out_dir / "checkpoints" / "latest")
    return {name: reader.whole(name, kind) for name in reader.names(kind)}


def assert_same_state(a: Path, b: Path, bound: float) -> None:
    """Assert that the newest checkpoints of two runs differ by at most `bound` in weights and optimizer states."""
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        left, right = masters(a, kind), masters(b, kind)
        assert left.keys() == right.keys()
        for name in left:
            worst = np.abs(left[name] - right[name]).max()
            assert worst <= bound, f"{kind} of {name} differs by {worst:.1e}"


@dataclass(frozen=True)
class Called:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Parse what --json printed: one object, and nothing else."""
        return json.loads(self.out)


def call(tool: str, *arguments: object) -> Called:
    """Run `python -m tools.TOOL ARGUMENTS` in a forked process."""
    return _called(f"tools.{tool}", arguments)


def call_each(tool: str, calls: Sequence[Sequence[object]]) -> list[Called]:
    """Run `python -m tools.TOOL ARGUMENTS` for each of `calls`, one after another in one forked process."""
    name = _main_of(f"tools.{tool}")
    told = run_ranks(_call_each, 1, name, [[str(argument) for argument in arguments] for arguments in calls])[0]
    return [Called(*each) for each in told]


def call_bench(bench: str, *arguments: object) -> Called:
    """Run `python -m tests.bench.BENCH ARGUMENTS` in a forked process."""
    return _called(f"tests.bench.{bench}", arguments)


def _called(module: str, arguments: tuple[object, ...]) -> Called:
    return Called(*run_ranks(_call, 1, _main_of(module), [str(argument) for argument in arguments])[0])


def _main_of(module: str) -> str:
    """Return the name of the module that `python -m` runs, imported: once here, not in every fork."""
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None
    name = module + ".__main__" * is_package
    importlib.import_module(name)
    return name


def call_file(path: Path, *flags: object, **variables: str | None) -> Called:
    """Run `python PATH FLAGS` in a forked process, with these environment variables; without those that are None."""
    return Called(*run_ranks(_call_file, 1, str(path), [str(flag) for flag in flags], variables)[0])


def _call_file(path: str, flags: list[str], variables: dict[str, str | None]) -> tuple[int, str, str]:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv = [path, *flags]
    return _captured(lambda: runpy.run_path(path, run_name="__main__") and 0)


def _call(module: str, arguments: list[str]) -> tuple[int, str, str]:
    return _captured(lambda: importlib.import_module(module).main(arguments))


def _call_each(module: str, calls: list[list[str]]) -> list[tuple[int, str, str]]:
    return [_call(module, arguments) for arguments in calls]


def _captured(main: Callable[[], int]) -> tuple[int, str, str]:
    """Return the exit code of `main` and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as leaving:  # argparse
            code = leaving.code
    return code, out.getvalue(), err.getvalue()
