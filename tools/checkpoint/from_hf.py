"""Makes a starting checkpoint from a Hugging Face folder, for continued pretraining in any layout.

    python -m tools.checkpoint from-hf MODEL_FOLDER runs/NAME
    deepspeed recipes/NAME.py --out-dir runs/NAME --resume

MODEL_FOLDER holds safetensors or .bin files, sharded or not, in the names that transformers publishes or those of the model
itself. The weights become the fp32 masters of step 0; there is no optimizer state. Every name and shape is checked against the
model of the folder's config, and all errors are reported together. The recipe's `model` must equal that config. Tensors that
transformers joins on loading (banks of experts) are in memory one at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from recipes.common.checkpoint.files import Part
from recipes.common.model.initial_weights import build_empty
from tools.checkpoint.hf_folder import Source, open_folder, tokenizer_files
from tools.checkpoint.hf_names import Adopter, TensorGroup, model_shapes, parameter_aliases
from tools.checkpoint.starting_checkpoint import collected, refuse_used, starting_state, whole_part, write_checkpoint
from tools.common.console import GOOD, UsageError, human_bytes, progress_bar, quiet_transformers

COMPARE_ROWS_BYTES = 1 << 25
_OLD_ROTARY = "rotary_emb.inv_freq"  # in old files; transformers computes it


@dataclass(frozen=True)
class Import:
    """The tensors to copy: every target of the groups is a tensor of the model, each once."""

    groups: list[TensorGroup]
    kinds: dict[str, str]  # model's name -> "master" or "buffer"
    dtypes: dict[str, torch.dtype]  # of the buffers
    dropped: list[str]  # names on disk that are redundant


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="MODEL_FOLDER", help="a Hugging Face model folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the run directory to make")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a tokenizer folder to keep with it (default: MODEL_FOLDER's own)"
    )


def run(args: argparse.Namespace) -> int:
    quiet_transformers()
    summary = import_folder(args.folder, args.out, args.tokenizer)
    if args.json:
        print(json.dumps(summary))
        return GOOD
    print(f"{summary['checkpoint']}: {summary['tensors']} tensors, {human_bytes(summary['bytes'])} of fp32 weights")
    if summary["dropped"]:
        print(f"  left out as redundant: {', '.join(summary['dropped'][:5])}")
    print(f"  in the recipe: num_params={summary['num_params']:_}, and `model` a config equal to {args.folder / 'config.json'}")
    print(f"  continue with: deepspeed RECIPE --out-dir {args.out} --resume")
    return GOOD


def import_folder(folder: Path, out: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Write OUT/checkpoints/step_00000000 and `latest`, and return a summary. Raises UsageError with all that does not match."""
    config = read_config(folder)
    refuse_used(out)
    tokenizer = folder if tokenizer is None else tokenizer
    if tokenizer is not folder and not (tokenizer.is_dir() and tokenizer_files(tokenizer)):
        raise UsageError(f"--tokenizer={tokenizer}: no tokenizer files there")
    causal = build_empty(config, attention="eager")
    sources = open_folder(folder)
    adopter = Adopter(causal)
    plan = match(causal, adopter, sources, folder)
    total = sum(math.prod(shape) * 4 for group in plan.groups for _, shape in group.targets)
    tied = bool(parameter_aliases(causal))
    with progress_bar("importing", total) as bar:
        parts = read_parts(plan, adopter, sources, bar)
        checkpoint = write_checkpoint(out, collected(parts), starting_state(tied=tied), config, tokenizer)
    return {
        "checkpoint": str(checkpoint),
        "tensors": len(plan.kinds),
        "bytes": total,
        "num_params": sum(parameter.numel() for parameter in causal.parameters()),
        "tied": tied,
        "dropped": plan.dropped,
    }


def read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no Hugging Face model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder / 'config.json'}: transformers cannot read it: {error}") from error
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{folder} is quantised, and quantised weights cannot be trained; give the original model")
    return config


def match(causal: PreTrainedModel, adopter: Adopter, sources: dict[str, Source], folder: Path) -> Import:
    """Match tensors on disk to the model's. Raises UsageError with all that is missing, unexpected or of a wrong shape."""
    parameters, buffers = model_shapes(causal)
    wanted = parameters | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    aliases = parameter_aliases(causal)
    problems, groups, dropped, found = [], [], [], {}
    try:
        candidates = adopter.groups({name: source.shape for name, source in sources.items()})
    except ValueError as error:
        raise UsageError(f"{folder}: {error}") from error
    there = {name for group in candidates for name, _ in group.targets}
    for group in candidates:
        target, shape = group.targets[0]
        if group.same and target in aliases:  # a tied head, stored all the same
            original = aliases[target]
            if original not in there:
                group = TensorGroup(group.sources, ((original, shape),), True)
            else:
                dropped += group.sources
                problems += _tie_problem(candidates, group, original, sources)
                continue
        elif group.same and target not in wanted and _is_ignored(causal, target):
            dropped += group.sources
            continue
        for name, shape in group.targets:
            if name not in wanted:
                problems.append(f"unexpected: {name} {list(shape)}")
            elif shape != wanted[name]:
                problems.append(f"wrong shape: {name} is {list(shape)}, the config's model has {list(wanted[name])}")
        groups.append(group)
        found |= dict(group.targets)
    problems += [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [
        f"not a float: {n}"
        for g in groups
        if g.targets[0][0] in parameters
        for n in g.sources
        if not sources[n].dtype.is_floating_point
    ]
    if problems:
        model = type(causal).__name__
        raise UsageError(f"{folder} does not hold the weights of its config's {model}:\n  " + "\n  ".join(problems))
    kinds = dict.fromkeys(parameters, "master") | dict.fromkeys(buffers, "buffer")
    return Import(groups, kinds, {name: buffer.dtype for name, buffer in buffers.items()}, dropped)


def read_parts(plan: Import, adopter: Adopter, sources: dict[str, Source], bar: Any) -> Iterator[Part]:
    """Yield whole tensors: weights in fp32, buffers in the model's dtype."""
    for group in plan.groups:
        tensors = {name: sources[name].whole() for name in group.sources}
        found = {group.targets[0][0]: tensors[group.sources[0]]} if group.same else adopter.adopt(tensors)
        tensors.clear()
        for name in [*found]:
            tensor, kind = found.pop(name), plan.kinds[name]
            dtype = torch.float32 if kind == "master" else plan.dtypes[name]
            yield whole_part(name, kind, tensor.to(dtype).numpy())
            bar.update(4 * tensor.numel())


def _tie_problem(candidates: list[TensorGroup], head: TensorGroup, original: str, sources: dict[str, Source]) -> list[str]:
    stored = next(group.sources[0] for group in candidates if group.targets[0][0] == original)
    a, b = sources[head.sources[0]], sources[stored]
    same = a.shape == b.shape
    step = max(1, COMPARE_ROWS_BYTES // max(1, 4 * math.prod(a.shape[1:])))
    for first in range(0, a.shape[0] if same else 0, step):
        last = min(first + step, a.shape[0])
        same = same and torch.equal(a.rows(first, last).float(), b.rows(first, last).float())
    if same:
        return []
    return [f"tied: {head.sources[0]} differs from {stored}; if both are meant, set tie_word_embeddings=false in config.json"]


def _is_ignored(causal: PreTrainedModel, name: str) -> bool:
    """Whether transformers itself silently ignores `name` when it loads this family."""
    patterns = {*(causal._keys_to_ignore_on_load_unexpected or ()), re.escape(_OLD_ROTARY)}
    return any(re.search(pattern, name) for pattern in patterns)
