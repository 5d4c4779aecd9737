"""Converts a checkpoint that DeepSpeed wrote itself, optimizer states included, to one that any layout can resume from.

    python -m tools.checkpoint from-deepspeed CHECKPOINTS/global_step1000 runs/NAME --model HF_FOLDER
    deepspeed recipes/NAME.py --out-dir runs/NAME --resume

Converts `engine.save_checkpoint` of our stages (pipeline engine or not) and of a Hugging Face model given to DeepSpeed unchanged,
with ZeRO 1, 2 or 3, and universal checkpoints (ds_to_universal) of either. Rejects, naming what was found: other parameter names
(Megatron), no ZeRO, frozen parameters, files of two saves, damage. HF_FOLDER holds the model's config.json, which DeepSpeed does
not save. The files are pickles: only tensors and plain values are read, no code in them runs. One file's tensors are in memory at
a time.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from recipes.common.checkpoint.files import Part
from recipes.common.config.json_files import read_json
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.sharding import RankShard, ShardSpec, rank_shard
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from tools.checkpoint import deepspeed_files as files
from tools.checkpoint.deepspeed_folder import find_checkpoint
from tools.checkpoint.hf_names import model_shapes, parameter_aliases
from tools.checkpoint.starting_checkpoint import (
    collected,
    refuse_used,
    starting_state,
    usable_tokenizer,
    whole_part,
    write_checkpoint,
)
from tools.common.console import GOOD, UsageError, printable, progress_bar, quiet_transformers
from tools.common.hf_config import build_model, read_config

Shape = tuple[int, ...]
_PREFIX = re.compile(r"(?:\d+\.)?(?:causal\.|module\.)?")  # before a Hugging Face name


@dataclass(frozen=True)
class Model:
    """The tensors that the checkpoint must hold, by the config."""

    shapes: dict[str, Shape]  # every parameter, tied ones once
    buffers: dict[str, torch.Tensor]
    aliases: dict[str, str]  # a tied head -> the embedding
    vocabulary: frozenset[str]  # embedding and head: their rows may have been padded
    shards: dict[str, ShardSpec]

    def name(self, theirs: str) -> str:
        """Strip stage and wrapper from DeepSpeed's name of a parameter: the Hugging Face name."""
        return theirs[_PREFIX.match(theirs).end() :] if theirs not in self.shapes else theirs

    def shard(self, name: str, rank: int, tensor: int) -> RankShard:
        return rank_shard(self.shards.get(name), rank, tensor)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder global_stepN, or the one with `latest` in it")
    parser.add_argument("out", type=Path, metavar="OUT", help="the run directory to make")
    parser.add_argument("--model", type=Path, metavar="HF_FOLDER", help="a folder with the model's config.json (default: FOLDER)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a tokenizer folder to keep with it (default: the model's)")


def run(args: argparse.Namespace) -> int:
    quiet_transformers()
    summary = convert(args.folder, args.out, args.model or args.folder, args.tokenizer)
    if args.json:
        print(json.dumps(summary))
        return GOOD
    was = "universal" if summary["universal"] else "pipeline {pipeline} x tensor {tensor} x data {data}, ZeRO {zero_stage}"
    print(f"{summary['checkpoint']}: {summary['tensors']} tensors, kinds {', '.join(summary['kinds'])}")
    print(f"  from {was.format(**summary)}, step {summary['step']}, {summary['optimizer_steps']} optimizer steps")
    if summary["client_state"]:
        print(f"  not converted, from client_state: {printable(', '.join(summary['client_state'][:10]))}")
    print(f"  {summary['consumed_seqs']} sequences consumed; continue with: deepspeed RECIPE --out-dir {args.out} --resume")
    return GOOD


def convert(folder: Path, out: Path, model_folder: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Write OUT/checkpoints/step_N and `latest`, and return a summary. Raises UsageError with what was found."""
    saved = find_checkpoint(folder)
    if not (model_folder / "config.json").is_file():
        raise UsageError(f"{model_folder} has no config.json; give the model's Hugging Face folder with --model")
    config = read_config(model_folder)
    refuse_used(out)
    causal = build_model(config, model_folder)
    model = describe_model(causal, saved.tensor)
    check_names(saved, model)
    tokenizer = usable_tokenizer(model_folder, tokenizer, config)
    steps, loss_scaler = check_states(saved, model)
    state = starting_state(tied=bool(model.aliases)) | {
        "step": saved.step,
        "consumed_seqs": saved.consumed_seqs,
        "skipped_steps": saved.skipped_steps,
        "optimizer_steps": steps,
        "loss_scaler": loss_scaler,
    }
    with progress_bar("converting", _input_bytes(saved)) as bar:
        rank_files = collected(universal_parts(saved, model, bar)) if saved.universal else zero_parts(saved, model, bar)
        checkpoint = write_checkpoint(out, finite(rank_files, saved.folder), state, config, tokenizer)
    index = read_json(checkpoint / "index.json")["tensors"]
    kinds = sorted({kind for entry in index.values() for kind in entry["kinds"]})
    described = {key: getattr(saved, key) for key in ("universal", "pipeline", "tensor", "data", "zero_stage", "client_state")}
    counts = {key: state[key] for key in ("step", "consumed_seqs", "optimizer_steps")}
    return {"checkpoint": str(checkpoint), "tensors": len(index), "kinds": kinds, **counts, **described}


def describe_model(causal: PreTrainedModel, tensor: int) -> Model:
    """Return what the model consists of. Raises UsageError for a family that cannot be sharded so."""
    shapes, buffers = model_shapes(causal)
    try:
        stack = find_stack(causal)
        shards = plan_tensor_parallel(causal, stack, tensor).shards
    except PlanError as error:
        raise UsageError(f"the checkpoint was saved at tensor={tensor}, and {error}") from error
    vocabulary = frozenset(f"{module}.{leaf}" for module in (stack.embedding, stack.head) for leaf in ("weight", "bias"))
    return Model(shapes, buffers, parameter_aliases(causal), vocabulary, shards)


def check_names(saved: files.DeepSpeedCheckpoint, model: Model) -> None:
    """Check that every parameter of the model is there, in the shape that the checkpoint's layout gives it, and no other."""
    problems, found = [], set()
    ranks = [None] if saved.universal else range(saved.pipeline * saved.tensor)
    for rank in ranks:
        if rank is None:
            theirs = dict.fromkeys(files.universal_names(saved))
        else:
            theirs = files.local_shapes(files.model_file(saved, rank))
        for long_name, shape in theirs.items():
            name = model.name(long_name)
            name = model.aliases.get(name, name)
            if name not in model.shapes:
                problems.append(f"unexpected: {long_name} {list(shape) if shape else ''}")
            elif shape is not None and shape != model.shard(name, 0, saved.tensor).shape(model.shapes[name]):
                wanted = list(model.shard(name, 0, saved.tensor).shape(model.shapes[name]))
                problems.append(
                    f"wrong shape: {long_name} is {list(shape)}, the config's model has {wanted} at tensor={saved.tensor}"
                )
            found.add(name)
    problems += [f"missing: {name} {list(shape)}" for name, shape in model.shapes.items() if name not in found]
    if problems:
        raise UsageError(f"{saved.folder} does not hold the model of this config:\n  {shortened(problems)}")


def check_states(saved: files.DeepSpeedCheckpoint, model: Model) -> tuple[int, dict[str, float | int | bool]]:
    """Check all optimizer files before anything is written: one step, the same kinds of states, every element of them.

    Returns (optimizer steps, the dynamic loss scaler's values).
    """
    found, scaler = _Found(), {}
    if saved.universal:
        _check_universal(saved, model, found)
    for model_rank in range(0 if saved.universal else saved.pipeline * saved.tensor):
        shapes, before = files.local_shapes(files.model_file(saved, model_rank)), {}
        held = dict.fromkeys(shapes, 0)
        for data_rank in range(saved.data):
            rank = files.rank_state(saved, data_rank, model_rank, shapes, before)
            path = files.optimizer_file(saved, data_rank, model_rank)
            found.add(path, [(fragment.name, fragment.states) for fragment in rank.fragments], rank.optimizer_steps)
            for fragment in rank.fragments:
                held[fragment.name] = held.get(fragment.name, 0) + fragment.states["master"].numel()
            scaler = rank.loss_scaler if rank.loss_scaler.get("dynamic") else scaler
        for name, count in held.items():
            wanted = math.prod(shapes[name]) if name in shapes else 0
            if count != wanted:
                there = f"the optimizer files of mp_rank {model_rank} hold {count} elements of {name}"
                found.problems.append(f"{there}, its model file has {wanted}")
    return found.step(saved.folder), scaler


def _check_universal(saved: files.DeepSpeedCheckpoint, model: Model, found: _Found) -> None:
    for theirs in files.universal_names(saved):
        states, step = files.universal_states(saved, theirs)
        found.add(saved.folder / "zero" / theirs, [(theirs, states)], step)
        name = model.name(theirs)
        shape = model.shapes[model.aliases.get(name, name)]
        for kind, values in states.items():
            whole = values[: shape[0]] if name in model.vocabulary and values.ndim else values
            if tuple(whole.shape) != shape:
                there = f"{saved.folder / 'zero' / theirs}: {kind} is {list(values.shape)}"
                found.problems.append(f"{there}, the config's model has {list(shape)}")


@dataclass
class _Found:
    """What was read of the optimizer states so far; what does not agree becomes a problem."""

    problems: list[str] = field(default_factory=list)
    kinds: frozenset[str] = frozenset()
    first: tuple[Path, int | None] | None = None  # the file read first, and its step

    def add(self, path: Path, states: Sequence[tuple[str, dict[str, torch.Tensor]]], step: int | None) -> None:
        if not states:  # a data rank beyond the last weight
            return
        if self.first is None:
            self.first, self.kinds = (path, step), frozenset(kind for _, of in states for kind in of)
            if "exp_avg_sq" in self.kinds and step is None:
                self.problems.append(f"{path}: it has Adam's moments and no step")
        elif step != self.first[1]:
            self.problems.append(f"{path} is of optimizer step {step}, {self.first[0].name} of {self.first[1]}")
        for name, of in states:
            if of.keys() != self.kinds:
                kinds = (", ".join(sorted(each)) for each in (of, self.kinds))
                self.problems.append("{}: {} has {}, another parameter {}".format(path, name, *kinds))
            for kind, values in of.items():
                if not values.is_floating_point():
                    self.problems.append(f"{path}: {kind} of {name} is {values.dtype}, no floating-point numbers")

    def step(self, folder: Path) -> int:
        """Return the optimizer's step. Raises UsageError with all problems."""
        if self.problems:
            raise UsageError(f"{folder} is damaged, or holds files of two saves:\n  {shortened(self.problems)}")
        return (self.first[1] if self.first else None) or 0


def shortened(problems: list[str]) -> str:
    return "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")


def zero_parts(saved: files.DeepSpeedCheckpoint, model: Model, bar: Any) -> Iterator[list[Part]]:
    """Yield the fragments of every optimizer file as the parts of one rank file."""
    for model_rank in range(saved.pipeline * saved.tensor):
        tensor_rank = model_rank % saved.tensor
        shapes, before = files.local_shapes(files.model_file(saved, model_rank)), {}
        for data_rank in range(saved.data):
            files.refuse_flipped(files.optimizer_file(saved, data_rank, model_rank))
            rank = files.rank_state(saved, data_rank, model_rank, shapes, before)
            yield [part for fragment in rank.fragments for part in fragment_parts(fragment, model, tensor_rank, saved.tensor)]
            bar.update(files.optimizer_file(saved, data_rank, model_rank).stat().st_size)
    yield buffer_parts(saved, model)


def finite(rank_files: Iterator[list[Part]], folder: Path) -> Iterator[list[Part]]:
    """Yield the parts of each file. Raises UsageError after the last where some were not finite."""
    broken: set[str] = set()
    for parts in rank_files:
        broken |= {f"{part.kind} {part.name}" for part in parts if part.kind != "buffer" and not np.isfinite(part.data).all()}
        yield parts
    if broken:
        shown = ", ".join(sorted(broken)[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise UsageError(f"{folder}: NaN or infinite numbers in {shown}: training cannot go on from them; nothing was kept")


def fragment_parts(fragment: files.SavedFragment, model: Model, tensor_rank: int, tensor: int) -> Iterator[Part]:
    """Yield one part a kind, without padding; nothing for what another rank holds too."""
    name = model.name(fragment.name)
    if name in model.aliases:  # the last stage's copy of a tied weight
        return
    shape, shard = model.shapes[name], model.shard(name, tensor_rank, tensor)
    if shard.rank != tensor_rank:
        return
    stop = min(fragment.start + fragment.states["master"].numel(), shard.stored_elements(shape))
    if fragment.start < stop:
        for kind, values in fragment.states.items():
            data = values[: stop - fragment.start].detach().float().numpy()
            yield Part(name, kind, shape, shard, fragment.start, stop, data)


def universal_parts(saved: files.DeepSpeedCheckpoint, model: Model, bar: Any) -> Iterator[Part]:
    """Yield whole parameters, one at a time, without the padding rows of a vocabulary."""
    for theirs in files.universal_names(saved):
        name = model.name(theirs)
        if name in model.aliases:
            continue
        for path in files.universal_files(saved, theirs):
            files.refuse_flipped(path)
        for kind, values in files.universal_states(saved, theirs)[0].items():
            whole = values[: model.shapes[name][0]] if name in model.vocabulary else values
            yield whole_part(name, kind, whole.detach().float().numpy())
            bar.update(4 * values.numel())
    yield from buffer_parts(saved, model)


def buffer_parts(saved: files.DeepSpeedCheckpoint, model: Model) -> list[Part]:
    """Return the persistent buffers, which lie beside the weights in the precision of training."""
    found: dict[str, torch.Tensor] = {}
    for rank in range(saved.pipeline * saved.tensor) if model.buffers else ():
        for theirs, tensor in files.module_tensors(saved, rank):
            found.setdefault(model.name(theirs), tensor)
    parts = []
    for name, buffer in model.buffers.items():
        if name not in found or found[name].shape != buffer.shape:
            raise UsageError(f"{saved.folder}: the buffer {name} {list(buffer.shape)} is in no model file")
        parts.append(whole_part(name, "buffer", found[name].to(buffer.dtype).numpy()))
    return parts


def _input_bytes(saved: files.DeepSpeedCheckpoint) -> int:
    pattern = "zero/**/*.pt" if saved.universal else "*_optim_states.pt"
    return sum(path.stat().st_size for path in saved.folder.glob(pattern))
