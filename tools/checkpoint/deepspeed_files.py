"""The files that DeepSpeed writes (0.14 to 0.19.8), read without running anything that is in them.

    mp_rank_{M}_model_states.pt                          one model-parallel rank, M = pipeline * tensor size + tensor rank
    layer_{L}-model_{T}-model_states.pt                  pipeline engine: weights of layer L, in the precision of training
    [bf16_]zero_pp_rank_{D}_mp_rank_{M}_optim_states.pt  ZeRO: fp32 weights and optimizer states of data rank D, flat
    zero_pp_rank_{D}_mp_rank_{M}_model_states.pt         ZeRO-3: in the place of mp_rank files
    zero/{parameter}/{fp32,exp_avg,...,step}.pt          a universal checkpoint: whole tensors (ds_to_universal)

They are pickles. torch's restricted reader (weights_only) loads tensors and plain containers; the few classes of DeepSpeed that
lie among them become empty stand-ins here, so DeepSpeed's own code does not run either.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.checkpoint.hf_names import natural
from tools.common.console import UsageError

OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
MASTER_FILE = "fp32"


class _Inert:
    """In the place of a class of DeepSpeed: takes what the file sets, and does nothing."""

    numel: int
    start: int


class _Number(int):
    """In the place of an enumeration."""


_STAND_INS = [
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class Run:
    """A checkpoint folder of DeepSpeed, and what its first model file says."""

    folder: Path
    universal: bool
    zero_stage: int  # 0 for a universal one, which does not depend on it
    tensor: int
    pipeline: int
    data: int
    step: int
    consumed_seqs: int
    skipped_steps: int


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a parameter's flattened local shard, with its states by kind."""

    name: str  # as DeepSpeed has it
    start: int
    states: dict[str, torch.Tensor]


@dataclass(frozen=True)
class RankState:
    """What one optimizer file holds."""

    pieces: list[Piece]
    optimizer_steps: int
    loss_scaler: dict[str, float | int | bool]


def load(path: Path) -> Any:
    """The content of a .pt file, its tensors mapped. Raises UsageError when it holds anything but known, harmless things."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: missing") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AttributeError, TypeError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else str(error).split("\n")[0]
        raise UsageError(f"{path}: not a file of tensors that is safe to load ({reason}); it was not loaded") from None


def find_run(folder: Path) -> Run:
    """What kind of checkpoint lies in `folder` (or in the one its `latest` names). Raises UsageError for an unknown kind."""
    for pointer in ("latest", "latest_universal"):
        if (folder / pointer).is_file() and not _names(folder, MODEL):
            folder = folder / (folder / pointer).read_text().strip()
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    models = _names(folder, MODEL)
    universal = (folder / "zero").is_dir()
    if not models or not (universal or _names(folder, OPTIMIZER)):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"{folder} is no checkpoint of DeepSpeed with ZeRO 1, 2 or 3, nor a universal one: "
            f"mp_rank_*_model_states.pt and *zero_pp_rank_*_optim_states.pt (or zero/) belong there, and there is {there}"
        )
    content = load(folder / models[0])
    ranks = sorted({int(MODEL.fullmatch(name)[2]) for name in models})
    layers = {int(LAYER.fullmatch(name)[2]) for name in _names(folder, LAYER)}
    sizes = content.get("checkpoint_parallel_dimensions") or {}
    tensor = sizes.get("tp_degree") or (len(layers) if layers else len(ranks))
    data = int(content.get("dp_world_size", 1))
    config = content.get("ds_config") if isinstance(content.get("ds_config"), Mapping) else {}
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    if not universal:
        _check_complete(folder, ranks, data)
        if stage not in (1, 2, 3):
            raise UsageError(f"{folder}: ZeRO stage {stage} by its ds_config; stages 1, 2 and 3 are known")
    if content.get("frozen_param_shapes"):
        raise UsageError(
            f"{folder}: {len(content['frozen_param_shapes'])} frozen parameters; only fully trained models are known"
        )
    counts = (int(content.get(key, 0)) for key in ("global_steps", "global_samples", "skipped_steps"))
    return Run(folder, universal, 0 if universal else stage, tensor, len(ranks) // tensor, data, *counts)


def _names(folder: Path, pattern: re.Pattern) -> list[str]:
    return sorted((p.name for p in folder.iterdir() if pattern.fullmatch(p.name)), key=natural) if folder.is_dir() else []


def _check_complete(folder: Path, ranks: list[int], data: int) -> None:
    found = {tuple(map(int, OPTIMIZER.fullmatch(name).groups())) for name in _names(folder, OPTIMIZER)}
    wanted = {(d, m) for d in range(data) for m in ranks}
    if ranks != list(range(len(ranks))) or found != wanted:
        lacking = [f"data rank {d} of mp_rank {m}" for d, m in sorted(wanted - found)]
        extra = [f"data rank {d} of mp_rank {m}" for d, m in sorted(found - wanted)]
        text = "; ".join(f"{title} {', '.join(x[:4])}" for title, x in (("no file of", lacking), ("unexpected:", extra)) if x)
        raise UsageError(f"{folder} is not whole, or holds files of two layouts: {text or f'mp_ranks {ranks}'}")


def optimizer_file(run: Run, data_rank: int, model_rank: int) -> Path:
    names = {tuple(map(int, OPTIMIZER.fullmatch(name).groups())): name for name in _names(run.folder, OPTIMIZER)}
    return run.folder / names[data_rank, model_rank]


def model_file(run: Run, model_rank: int) -> dict[str, Any]:
    names = [name for name in _names(run.folder, MODEL) if int(MODEL.fullmatch(name)[2]) == model_rank]
    return load(run.folder / names[0])


def local_shapes(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every trained parameter's shard on one model-parallel rank, in the order of the flat groups."""
    return {name: tuple(shape) for group in content["param_shapes"] for name, shape in group.items()}


def module_tensors(run: Run, model_rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and buffers in the precision of training; layer files' names carry no layer number."""
    content = model_file(run, model_rank).get("module")
    if content:
        yield from content.items()
    for name in _names(run.folder, LAYER):
        if int(LAYER.fullmatch(name)[2]) == model_rank % run.tensor:
            yield from load(run.folder / name).items()


def rank_state(run: Run, data_rank: int, model_rank: int, shapes: Mapping[str, tuple[int, ...]], before: dict) -> RankState:
    """One optimizer file. `before`: elements of each parameter that lower data ranks hold; what is here is added to it."""
    path = optimizer_file(run, data_rank, model_rank)
    content = load(path)
    try:
        state = content["optimizer_state_dict"]
        if run.zero_stage == 3:
            pieces, adam = _pieces_of_stage_3(run, data_rank, state, shapes), state["optimizer_state_dict"]["state"]
        else:
            pieces, adam = _pieces_of_stage_1(state, before), state["base_optimizer_state"]["state"]
        steps = {int(entry["step"]) for entry in adam.values() if "step" in entry}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{path}: not laid out as DeepSpeed's ZeRO stage {run.zero_stage} ({error!r})") from None
    scaler = state.get("loss_scaler")
    numbers = {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)} if isinstance(scaler, _Inert) else {}
    return RankState(pieces, max(steps, default=0), numbers)


def _pieces_of_stage_1(state: Mapping[str, Any], before: dict[str, int]) -> list[Piece]:
    """ZeRO 1 and 2, and BF16_Optimizer: each group's flat partition, with where each parameter's elements lie in it."""
    pieces = []
    for group, flat in enumerate(state["single_partition_of_fp32_groups"]):
        states = {"master": flat} | _moments(state["base_optimizer_state"]["state"].get(group, {}), flat)
        for name, address in state["param_slice_mappings"][group].items():
            here = {kind: tensor[address.start : address.start + address.numel] for kind, tensor in states.items()}
            pieces.append(Piece(name, before.get(name, 0), here))
            before[name] = before.get(name, 0) + address.numel
    return pieces


def _pieces_of_stage_3(run: Run, data_rank: int, state: Mapping[str, Any], shapes: Mapping[str, tuple]) -> list[Piece]:
    """ZeRO 3: each parameter is cut evenly over the data ranks, padded at its end; the parts lie one after another."""
    flats = state["fp32_flat_groups"]
    adam = state["optimizer_state_dict"]["state"]
    moments = [_moments(adam.get(group, {}), flat) for group, flat in enumerate(flats)]
    pieces, group, offset = [], 0, 0
    for name, shape in shapes.items():
        total = math.prod(shape)
        length = -(-total // run.data)
        while offset == flats[group].numel():  # sub-groups hold whole parameters and no padding
            group, offset = group + 1, 0
        if offset + length > flats[group].numel():
            raise IndexError(f"{name} does not end where its group does")
        start, stop = data_rank * length, min((data_rank + 1) * length, total)
        if start < stop:
            states = {"master": flats[group]} | moments[group]
            here = {kind: tensor[offset : offset + stop - start] for kind, tensor in states.items()}
            pieces.append(Piece(name, start, here))
        offset += length
    return pieces


def _moments(state: Mapping[str, Any], flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}


def universal_names(run: Run) -> list[str]:
    return sorted((path.name for path in (run.folder / "zero").iterdir() if path.is_dir()), key=natural)


def universal_states(run: Run, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """(whole tensors by kind, optimizer step) of one parameter of a universal checkpoint."""
    states, step = {}, 0
    for path in sorted((run.folder / "zero" / name).glob("*.pt")):
        content = load(path)
        if path.stem == "step":
            step = int(content)
            continue
        tensor = content.get("param") if isinstance(content, Mapping) else content
        if not torch.is_tensor(tensor):
            raise UsageError(f"{path}: holds no tensor `param`")
        states["master" if path.stem == MASTER_FILE else path.stem] = tensor
    if "master" not in states:
        raise UsageError(f"{run.folder / 'zero' / name}: no fp32.pt")
    return states, step
