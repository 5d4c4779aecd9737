"""Finds out what a folder that DeepSpeed wrote holds, and whether it is the whole of one save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common.config.inside import leads_out
from tools.checkpoint.deepspeed_files import LAYER, MODEL, OPTIMIZER, DeepSpeedCheckpoint, file_names, load
from tools.common.console import UsageError

# what DeepSpeed itself puts into a model file; the rest is the user's client_state
_OWN_KEYS = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
        "checkpoint_parallel_dimensions",
        "universal_checkpoint_info",
        "zero_optimizer_state",
        "autotp_config",
    }
)


def find_checkpoint(folder: Path) -> DeepSpeedCheckpoint:
    """Describe the checkpoint in `folder`, or in the one its `latest` names. Raises UsageError for an unknown kind."""
    for pointer in ("latest", "latest_universal"):
        if (folder / pointer).is_file() and not file_names(folder, MODEL):
            name = (folder / pointer).read_text(encoding="utf-8", errors="replace").strip()
            if why := leads_out(name):
                raise UsageError(f"{folder / pointer}: {why}; give the folder itself")
            folder = folder / name
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    models = file_names(folder, MODEL)
    universal = (folder / "zero").is_dir()
    if not models or not (universal or file_names(folder, OPTIMIZER)):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"{folder} is neither a DeepSpeed checkpoint with ZeRO 1, 2 or 3 nor a universal one: "
            f"expected mp_rank_*_model_states.pt and *zero_pp_rank_*_optim_states.pt (or zero/), found {there}"
        )
    headers = {name: _read_header(folder / name, universal) for name in models}
    header = headers[models[0]]
    for name, other in headers.items():
        if other.facts != header.facts:
            differing = [key for key, value in header.facts.items() if other.facts[key] != value]
            said = (", ".join(f"{key}={of.facts[key]}" for key in differing) for of in (header, other))
            both = " and ".join(f"{file} of {words}" for file, words in zip((models[0], name), said, strict=True))
            raise UsageError(f"{folder} holds files of two saves: {both}; give a folder that one save wrote whole")
    ranks = sorted({int(MODEL.fullmatch(name)[2]) for name in models})
    layers = {int(LAYER.fullmatch(name)[2]) for name in file_names(folder, LAYER)}
    tensor = header.facts["tp_degree"] or (len(layers) if layers else len(ranks))
    data, stage = header.facts["dp_world_size"], header.facts["ZeRO stage"]
    if not universal:
        _check_complete(folder, ranks, data)
        if stage not in (1, 2, 3):
            raise UsageError(f"{folder}: its ds_config has ZeRO stage {stage}; stages 1, 2 and 3 can be converted")
    if len(ranks) % tensor:
        raise UsageError(f"{folder}: {len(ranks)} mp_rank files are no whole stages of {tensor} tensor ranks; copy all of them")
    if frozen := sum(each.frozen for each in headers.values()):
        raise UsageError(f"{folder}: {frozen} frozen parameters; only fully trained models can be converted")
    counts = (header.facts[key] for key in ("global_steps", "global_samples", "skipped_steps"))
    client = tuple(sorted(header.client_state))
    return DeepSpeedCheckpoint(folder, universal, 0 if universal else stage, tensor, len(ranks) // tensor, data, *counts, client)


@dataclass(frozen=True)
class _Header:
    """What a model file says of the whole checkpoint."""

    facts: dict[str, int]  # the same in all model files of one save
    frozen: int
    client_state: frozenset[str]


def _read_header(path: Path, universal: bool) -> _Header:
    """Read what a model file says beside its weights. Raises UsageError with all that DeepSpeed would not have written."""
    content = load(path)
    if not isinstance(content, Mapping):
        raise UsageError(f"{path}: holds {type(content).__name__}, not the state of a model")
    config, sizes = content.get("ds_config"), content.get("checkpoint_parallel_dimensions") or {}
    zero = (config.get("zero_optimization") or {}) if isinstance(config, Mapping) else {}
    facts = {
        "dp_world_size": content.get("dp_world_size", 1),
        "global_steps": content.get("global_steps", 0),
        "global_samples": content.get("global_samples", 0),
        "skipped_steps": content.get("skipped_steps", 0),
        "tp_degree": (sizes.get("tp_degree") or 0) if isinstance(sizes, Mapping) else sizes,
        "ZeRO stage": zero.get("stage", 0) if isinstance(zero, Mapping) else zero,
    }
    least = {"dp_world_size": 1}
    problems = [
        f"{key}={value!r} must be a whole number from {least.get(key, 0)}"
        for key, value in facts.items()
        if type(value) is not int or value < least.get(key, 0)
    ]
    groups, frozen = content.get("param_shapes"), content.get("frozen_param_shapes") or {}
    if not universal and not _are_shapes(groups):
        problems.append("param_shapes must be a list of a shape for each name")
    if not isinstance(frozen, Mapping):
        problems.append("frozen_param_shapes must be a shape for each name")
    if problems:
        raise UsageError(f"{path}: DeepSpeed did not write it so, or it is damaged: {'; '.join(problems)}")
    return _Header(facts, len(frozen), frozenset(str(key) for key in content.keys() - _OWN_KEYS))


def _are_shapes(groups: Any) -> bool:
    return isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping)
        and all(
            isinstance(name, str) and isinstance(shape, list | tuple) and all(type(size) is int for size in shape)
            for name, shape in group.items()
        )
        for group in groups
    )


def _check_complete(folder: Path, ranks: list[int], data: int) -> None:
    of_rank: dict[tuple[int, ...], list[str]] = {}
    for name in file_names(folder, OPTIMIZER):
        of_rank.setdefault(tuple(map(int, OPTIMIZER.fullmatch(name).groups())), []).append(name)
    twice = next((names for names in of_rank.values() if len(names) > 1), [])
    if twice := twice or _both_forms(folder):
        raise UsageError(f"{folder} holds files of two saves: {' and '.join(twice)} are of one rank; remove the other save's")
    found = set(of_rank)
    wanted = {(d, m) for d in range(data) for m in ranks}
    if ranks != list(range(len(ranks))) or found != wanted:
        lacking = [f"data rank {d} of mp_rank {m}" for d, m in sorted(wanted - found)]
        extra = [f"data rank {d} of mp_rank {m}" for d, m in sorted(found - wanted)]
        text = "; ".join(f"{title} {', '.join(x[:4])}" for title, x in (("no file of", lacking), ("unexpected:", extra)) if x)
        raise UsageError(f"{folder} is incomplete, or holds files of two layouts: {text or f'mp_ranks {ranks}'}")


def _both_forms(folder: Path) -> list[str]:
    """Return two model files, one as ZeRO 3 names them and one as the others do, where there are both."""
    firsts = {MODEL.fullmatch(name)[1] is None: name for name in file_names(folder, MODEL)}
    return [firsts[True], firsts[False]] if len(firsts) == 2 else []
