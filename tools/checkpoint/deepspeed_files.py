"""Reads the files that DeepSpeed writes (0.14 to 0.19.8), without running anything in them.

    mp_rank_{M}_model_states.pt                          one model-parallel rank, M = pipeline * tensor size + tensor rank
    layer_{L}-model_{T}-model_states.pt                  pipeline engine: weights of layer L, in the precision of training
    [bf16_]zero_pp_rank_{D}_mp_rank_{M}_optim_states.pt  ZeRO: fp32 weights and optimizer states of data rank D, flat
    zero_pp_rank_{D}_mp_rank_{M}_model_states.pt         ZeRO-3: in place of mp_rank files
    zero/{parameter}/{fp32,exp_avg,...,step}.pt          a universal checkpoint: whole tensors (ds_to_universal)

They are pickles. torch's restricted reader (weights_only) loads tensors and plain containers; the few DeepSpeed classes among
them become empty stand-ins, so DeepSpeed's own code does not run either.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.checkpoint.hf_names import natural
from tools.checkpoint.stand_ins import STAND_INS, Inert
from tools.common.console import UsageError

OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
MASTER_FILE = "fp32"


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """A checkpoint folder that DeepSpeed wrote, and what its first model file says."""

    folder: Path
    universal: bool
    zero_stage: int  # 0 for a universal one, which does not depend on it
    tensor: int
    pipeline: int
    data: int
    step: int
    consumed_seqs: int
    skipped_steps: int
    client_state: tuple[str, ...]  # names of what the user saved with it, which is not converted


@dataclass(frozen=True)
class SavedFragment:
    """Elements [start, start + numel) of a parameter's flattened local shard, with their states by kind."""

    name: str  # DeepSpeed's
    start: int
    states: dict[str, torch.Tensor]


@dataclass(frozen=True)
class RankState:
    """The content of one optimizer file."""

    fragments: list[SavedFragment]
    optimizer_steps: int | None  # None for an optimizer that does not count them
    loss_scaler: dict[str, float | int | bool]


def load(path: Path) -> Any:
    """Load a .pt file, its tensors mapped. Raises UsageError when it holds anything but tensors, plain values and stand-ins."""
    try:
        path.stat()  # a missing file would be no zip
        if not zipfile.is_zipfile(path):
            raise EOFError("no zip as torch.save writes it: empty, cut short or damaged")
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: missing") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else str(error).split("\n")[0]
        cure = "; if you trust it, load it with torch.load(..., weights_only=False) and save it without that" if found else ""
        raise UsageError(f"{path}: not a file of tensors that is safe to load ({reason}); it was not loaded{cure}") from None


def refuse_flipped(path: Path) -> None:
    """Raise UsageError where the file's bytes are not those of its own checksums, which torch.load does not compare."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        wrong = str(error)
    if wrong:
        raise UsageError(f"{path}: damaged, {wrong} differs from its checksum; copy it again, or use an earlier checkpoint")


def file_names(folder: Path, pattern: re.Pattern) -> list[str]:
    return sorted((p.name for p in folder.iterdir() if pattern.fullmatch(p.name)), key=natural) if folder.is_dir() else []


def optimizer_file(saved: DeepSpeedCheckpoint, data_rank: int, model_rank: int) -> Path:
    names = {tuple(map(int, OPTIMIZER.fullmatch(name).groups())): name for name in file_names(saved.folder, OPTIMIZER)}
    return saved.folder / names[data_rank, model_rank]


def model_file(saved: DeepSpeedCheckpoint, model_rank: int) -> dict[str, Any]:
    names = [name for name in file_names(saved.folder, MODEL) if int(MODEL.fullmatch(name)[2]) == model_rank]
    return load(saved.folder / names[0])


def local_shapes(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained parameter's shard on one model-parallel rank, in the order of the flat groups."""
    return {name: tuple(shape) for group in content["param_shapes"] for name, shape in group.items()}


def module_tensors(saved: DeepSpeedCheckpoint, model_rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights and buffers in the precision of training; names in layer files carry no layer number."""
    content = model_file(saved, model_rank).get("module")
    if content:
        yield from content.items()
    for name in file_names(saved.folder, LAYER):
        if int(LAYER.fullmatch(name)[2]) == model_rank % saved.tensor:
            yield from load(saved.folder / name).items()


def rank_state(
    saved: DeepSpeedCheckpoint, data_rank: int, model_rank: int, shapes: Mapping[str, tuple[int, ...]], before: dict
) -> RankState:
    """Read one optimizer file. `before`: elements of each parameter on lower data ranks; this rank's are added to it."""
    path = optimizer_file(saved, data_rank, model_rank)
    content = load(path)
    try:
        state = content["optimizer_state_dict"]
        if saved.zero_stage == 3:
            fragments, adam = _fragments_of_stage_3(saved, data_rank, state, shapes), state["optimizer_state_dict"]["state"]
        else:
            fragments, adam = _fragments_of_stage_1(state, before), state["base_optimizer_state"]["state"]
        steps = {_whole(entry["step"]) for entry in adam.values() if "step" in entry}
        if len(steps) > 1:
            raise ValueError(f"optimizer steps {sorted(steps)} in one file")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path}: not laid out as DeepSpeed's ZeRO stage {saved.zero_stage} ({error!r})") from None
    scaler = state.get("loss_scaler")
    numbers = {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)} if isinstance(scaler, Inert) else {}
    return RankState(fragments, max(steps, default=None), numbers)


def _whole(step: Any) -> int:
    """Return an optimizer's step, a number or a tensor of one. Raises ValueError for another."""
    value = step.item() if torch.is_tensor(step) and step.numel() == 1 else step
    if type(value) not in (int, float) or value != value // 1 or value < 0:
        raise ValueError(f"step={value!r} must be a whole number from 0")
    return int(value)


def _fragments_of_stage_1(state: Mapping[str, Any], before: dict[str, int]) -> list[SavedFragment]:
    """Read ZeRO 1 and 2, and BF16_Optimizer: each group's flat partition, and where each parameter's elements lie in it."""
    fragments = []
    for group, flat in enumerate(state["single_partition_of_fp32_groups"]):
        states = {"master": flat} | _moments(state["base_optimizer_state"]["state"].get(group, {}), flat)
        for name, address in state["param_slice_mappings"][group].items():
            here = {kind: tensor[address.start : address.start + address.numel] for kind, tensor in states.items()}
            fragments.append(SavedFragment(name, before.get(name, 0), here))
            before[name] = before.get(name, 0) + address.numel
    return fragments


def _fragments_of_stage_3(
    saved: DeepSpeedCheckpoint, data_rank: int, state: Mapping[str, Any], shapes: Mapping[str, tuple]
) -> list[SavedFragment]:
    """Read ZeRO 3: each parameter is partitioned evenly over the data ranks, padded at its end; the parts follow one another."""
    flats = state["fp32_flat_groups"]
    adam = state["optimizer_state_dict"]["state"]
    moments = [_moments(adam.get(group, {}), flat) for group, flat in enumerate(flats)]
    fragments, group, offset = [], 0, 0
    for name, shape in shapes.items():
        total = math.prod(shape)
        length = -(-total // saved.data)
        while offset == flats[group].numel():  # sub-groups hold whole parameters and no padding
            group, offset = group + 1, 0
        if offset + length > flats[group].numel():
            raise IndexError(f"{name} does not end where its group does")
        start, stop = data_rank * length, min((data_rank + 1) * length, total)
        if start < stop:
            states = {"master": flats[group]} | moments[group]
            here = {kind: tensor[offset : offset + stop - start] for kind, tensor in states.items()}
            fragments.append(SavedFragment(name, start, here))
        offset += length
    if (group + 1, offset) != (len(flats), flats[group].numel()):
        raise IndexError("its groups hold more than the parameters of the model file")
    return fragments


def _moments(state: Mapping[str, Any], flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the states that have a number for each weight; one number is for all. Raises ValueError where some lack theirs."""
    found = {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.ndim}
    for kind, value in found.items():
        if value.shape != flat.shape:
            raise ValueError(f"{kind} is {list(value.shape)}, the weights beside it {list(flat.shape)}")
    return found


def universal_names(saved: DeepSpeedCheckpoint) -> list[str]:
    return sorted((path.name for path in (saved.folder / "zero").iterdir() if path.is_dir()), key=natural)


def universal_files(saved: DeepSpeedCheckpoint, name: str) -> list[Path]:
    return sorted((saved.folder / "zero" / name).glob("*.pt"))


def universal_states(saved: DeepSpeedCheckpoint, name: str) -> tuple[dict[str, torch.Tensor], int | None]:
    """Return (whole tensors by kind, optimizer step or None) of one parameter of a universal checkpoint."""
    states, step = {}, None
    for path in universal_files(saved, name):
        content = load(path)
        if path.stem == "step":
            try:
                step = _whole(content)
            except ValueError as error:
                raise UsageError(f"{path}: {error}") from None
            continue
        tensor = content.get("param") if isinstance(content, Mapping) else content
        if not torch.is_tensor(tensor):
            raise UsageError(f"{path}: holds no tensor `param`")
        states["master" if path.stem == MASTER_FILE else path.stem] = tensor
    if "master" not in states:
        raise UsageError(f"{saved.folder / 'zero' / name}: no fp32.pt")
    return states, step
