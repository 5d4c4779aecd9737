"""Makes a starting checkpoint from a Hugging Face folder, for continued pretraining in any layout.

    python -m tools.checkpoint from-hf MODEL_FOLDER runs/NAME
    deepspeed recipes/NAME.py --out-dir runs/NAME --resume

MODEL_FOLDER holds safetensors or .bin files, sharded or not, in the names that transformers publishes or those of the model
itself. The weights become the fp32 masters of step 0; there is no optimizer state. Every name and shape is checked against the
model of the folder's config, and all errors are reported together. Code in the folder is refused. `--strip PART` takes out of the
names what torch.compile and others put in. The recipe's `model` must equal that config. One tensor is in memory at a time, or one
bank of experts that transformers joins on loading.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from recipes.common.checkpoint.files import Part
from tools.checkpoint.hf_folder import Source, open_folder, strip_names, stripped, unread_weights
from tools.checkpoint.hf_names import Adopter, TensorGroup, model_shapes, parameter_aliases
from tools.checkpoint.starting_checkpoint import (
    collected,
    late_part,
    refuse_used,
    starting_state,
    usable_tokenizer,
    write_checkpoint,
)
from tools.common.console import GOOD, UsageError, human_bytes, printable, progress_bar, quiet_transformers
from tools.common.hf_config import build_model, read_config, refuse_multimodal

COMPARE_ROWS_BYTES = 1 << 25
FINITE_ELEMENTS = 1 << 22  # judged at once
MOST_WRAPPERS = 3  # around a model, one in the other
_OLD_ROTARY = "rotary_emb.inv_freq"  # in old files; transformers computes it
_OLD_MASK = re.compile(r"(?:.*\.)?(?:attn|attention|self_attn|self_attention)\.(?:bias|masked_bias|causal_mask)")
# what other programs leave in names, outermost first; torch.compile, DDP and FSDP, a wrapper of ours, a multimodal model, PEFT
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "causal", "model", "transformer")
_WRAPPERS += ("language_model", "base_model", "gpt_neox", "text_model")
_SHOWN = 20  # of what does not fit


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
        "--strip", action="append", default=[], metavar="PART", help="take PART. out of the tensors' names, such as _orig_mod"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a tokenizer folder to keep with it (default: MODEL_FOLDER's own)"
    )


def run(args: argparse.Namespace) -> int:
    quiet_transformers()
    summary = import_folder(args.folder, args.out, args.tokenizer, args.strip)
    if args.json:
        print(json.dumps(summary))
        return GOOD
    print(f"{summary['checkpoint']}: {summary['tensors']} tensors, {human_bytes(summary['bytes'])} of fp32 weights")
    if summary["dropped"]:
        more = f" and {len(summary['dropped']) - 5} more" if len(summary["dropped"]) > 5 else ""
        print(f"  left out as redundant: {printable(', '.join(summary['dropped'][:5]))}{more}")
    if summary["unread"]:
        print(f"  not read, as transformers does not read it: {', '.join(summary['unread'])}")
    print(f"  in the recipe: num_params={summary['num_params']:_}, and `model` a config equal to {args.folder / 'config.json'}")
    print(f"  continue with: deepspeed RECIPE --out-dir {args.out} --resume")
    return GOOD


def import_folder(folder: Path, out: Path, tokenizer: Path | None = None, strip: Sequence[str] = ()) -> dict[str, Any]:
    """Write OUT/checkpoints/step_00000000 and `latest`, and return a summary. Raises UsageError with all that does not match."""
    config = read_config(folder)
    refuse_multimodal(config, folder)
    refuse_used(out)
    tokenizer = usable_tokenizer(folder, tokenizer, config)
    causal = build_model(config, folder)
    sources = strip_names(open_folder(folder), strip)
    adopter = Adopter(causal)
    plan = match(causal, adopter, sources, folder)
    total = sum(math.prod(shape) * 4 for group in plan.groups for _, shape in group.targets)
    tied = bool(parameter_aliases(causal))
    broken: list[str] = []
    with progress_bar("importing", total) as bar:
        parts = _refusing(planned_parts(plan, adopter, sources, broken, bar), broken, folder)
        checkpoint = write_checkpoint(out, parts, starting_state(tied=tied), config, tokenizer)
    return {
        "checkpoint": str(checkpoint),
        "tensors": len(plan.kinds),
        "bytes": total,
        "num_params": sum(parameter.numel() for parameter in causal.parameters()),
        "tied": tied,
        "dropped": plan.dropped,
        "unread": unread_weights(folder),
    }


def _refusing(parts: Iterator[Part], broken: list[str], folder: Path) -> Iterator[list[Part]]:
    """Yield the parts of each file. Raises UsageError when all are written and `broken` has names."""
    yield from collected(parts)
    if broken:
        shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise UsageError(f"{folder}: NaN or infinite weights in {shown}: training cannot go on from them; nothing was kept")


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
        elif group.same and target not in wanted and _is_ignored(causal, target, shape):
            dropped += group.sources
            continue
        for name, shape in group.targets:
            if name not in wanted:
                problems.append(f"unexpected: {name} {list(shape)}")
            elif shape != wanted[name]:
                problems.append(f"wrong shape: {name} is {list(shape)}, the config's model has {list(wanted[name])}")
        groups.append(group)
        found |= dict(group.targets)
    missing = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    if missing and (parts := _wrappers(causal, sources, set(wanted))):
        flags = " ".join(f"--strip {part}" for part in parts)
        raise UsageError(
            f"{folder}: the program that saved it has put {' and '.join(f'`{part}.`' for part in parts)} into the names, "
            f"and transformers would load none of them; take it out with {flags}"
        )
    problems += missing
    problems += [
        f"not a float: {n}"
        for g in groups
        if g.targets[0][0] in parameters
        for n in g.sources
        if not sources[n].dtype.is_floating_point
    ]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "\n  ".join([*problems[:_SHOWN], *more])
        raise UsageError(f"{folder} does not hold the weights of its config's {type(causal).__name__}:\n  {lines}")
    kinds = dict.fromkeys(parameters, "master") | dict.fromkeys(buffers, "buffer")
    return Import(groups, kinds, {name: buffer.dtype for name, buffer in buffers.items()}, dropped)


def planned_parts(plan: Import, adopter: Adopter, sources: dict[str, Source], broken: list[str], bar: Any) -> Iterator[Part]:
    """Yield whole tensors, weights in fp32, buffers in the model's dtype; each is read when it is written.

    The names of weights that are not finite are added to `broken` then.
    """

    def read(group: TensorGroup, name: str) -> np.ndarray:
        tensors = {source: sources[source].whole() for source in group.sources}
        tensor = tensors[group.sources[0]] if group.same else adopter.adopt(tensors)[name]
        tensors.clear()
        is_weight = plan.kinds[name] == "master"
        tensor = tensor.to(torch.float32 if is_weight else plan.dtypes[name])
        if is_weight and not _all_finite(tensor):
            broken.append(name)
        bar.update(4 * tensor.numel())
        return tensor.numpy()

    for group in plan.groups:
        for name, shape in group.targets:
            kind = plan.kinds[name]
            dtype = torch.float32 if kind == "master" else plan.dtypes[name]
            yield late_part(name, kind, shape, dtype, functools.partial(read, group, name))


def _all_finite(tensor: torch.Tensor) -> bool:
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(FINITE_ELEMENTS))


def _wrappers(causal: PreTrainedModel, sources: dict[str, Source], wanted: set[str]) -> list[str]:
    """Return the parts that, taken out of the names on disk, give every tensor that the model wants; none if that is not so."""
    adopter, aliases = Adopter(causal), parameter_aliases(causal)
    present = [part for part in _WRAPPERS if any(f".{part}." in f".{name}" for name in sources)]
    for count in range(1, MOST_WRAPPERS + 1):
        for parts in combinations_with_replacement(present, count):
            shapes = {stripped(name, parts): source.shape for name, source in sources.items()}
            try:
                there = {name for group in adopter.groups(shapes) for name, _ in group.targets}
            except ValueError:  # transformers cannot join what is there
                continue
            if not wanted - {aliases.get(name, name) for name in there}:
                return list(parts)
    return []


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


def _is_ignored(causal: PreTrainedModel, name: str, shape: tuple[int, ...]) -> bool:
    """Return whether transformers computes `name` itself: what it ignores for this family, and old files' causal masks."""
    persistent = set(causal.state_dict())
    if name in {buffer for buffer, _ in causal.named_buffers()} - persistent:
        return True
    if _OLD_MASK.fullmatch(name) and (shape in ((), (1,)) or (len(shape) == 4 and shape[:2] == (1, 1))):
        return True
    patterns = {*(causal._keys_to_ignore_on_load_unexpected or ()), re.escape(_OLD_ROTARY)}
    return any(re.search(pattern, name) for pattern in patterns)
