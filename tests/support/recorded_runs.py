"""Makes runs with a record, in miniature: a small model trained in this process, whose faults are those of large runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from recipes.common.config.field_effects import flat_fields
from recipes.common.recipe import Layout
from recipes.common.run_dir.metrics import encode
from recipes.common.run_dir.run_files import recipe_to_dict
from recipes.common.run_dir.segments import append_segment
from tests.support.tiny import ds_config, tiny_recipe

VOCAB, WIDTH, LENGTH, BATCH = 61, 16, 32, 2
LR, BETAS, CLIP, WARMUP = 0.03, (0.9, 0.95), 0.1, 8


def example_facts(**other: Any) -> dict[str, Any]:
    """Return the facts of a run as the record holds them; `other`: with "__" for the dots."""
    content = json.loads(json.dumps(recipe_to_dict(tiny_recipe(Path("data/tokens")))))
    facts = {f"recipe.{name}": value for name, value in flat_fields(content).items()}
    facts |= {f"deepspeed.{name}": value for name, value in flat(ds_config("zero1_fp32.json")).items()}
    facts |= {f"layout.{name}": value for name, value in json.loads(json.dumps(asdict(Layout()))).items()}
    facts |= {
        "deepspeed.gradient_clipping": CLIP,
        "deepspeed.gradient_accumulation_steps": 4,
        "recipe.optimizer.lr": LR,
        "recipe.optimizer.betas": list(BETAS),
        "recipe.optimizer.clip": CLIP,
        "recipe.schedule.warmup_steps": WARMUP,
        "recipe.steps": 64,
        "sizes.world": 1,
        "sizes.data": 1,
        "sizes.accumulation": 4,
        "sizes.tokens_per_step": BATCH * LENGTH,
        "seed.recipe": 1234,
        "algorithm.order": 1,
        "algorithm.initial_weights": 1,
        "package.torch.version": "2.9.0",
        "package.torch.files": "sha256:" + 64 * "1",
        "package.deepspeed.version": "0.19.8",
        "package.deepspeed.files": "sha256:" + 64 * "2",
        "package.tqdm.version": "4.67.1",
        "library.cuda": "13.0",
        "library.nccl": "2.27.5",
        "library.python": "3.12.3",
        "threads.torch": 2,
        "host.0.name": "node-a",
        "host.0.cpu": "EPYC 9654",
        "host.0.gpus": ["Tesla V100-SXM2-32GB"],
        "rank_hosts": [0],
        "git.commit": 40 * "a",
        "git.patch": "",
        "code.hash": "sha256:" + 64 * "c",
        "data.tokens.hash": "sha256:" + 64 * "3",
        "data.tokens.inputs": "sha256:" + 64 * "4",
        "data.tokens.contents": "sha256:" + 64 * "5",
        "data.tokens.train_00000": "sha256:" + 64 * "6",
        "data.tokens.tokenizer": "sha256:" + 64 * "7",
        "tokenizer.hash": "sha256:" + 64 * "7",
    }
    return facts | {name.replace("__", "."): value for name, value in other.items()}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a miniature; steps count from 1."""

    counter_reset_after: int = 0  # Adam's step counter is not restored
    sampler_reset_after: int = 0  # the data are read from their start again
    warmup_counter: Callable[[int], int] = lambda step: step  # what the warm-up counts
    unclipped_copy: bool = False  # a second copy of the norm's weight is not clipped
    untied_after_step: int = 10**9  # the second copy of the tied weight gets only its own gradient from then on
    reload_after: int = 0  # a checkpoint is loaded, which holds one copy of the tied weight
    reversed_sums: bool = False  # sums in another order, as on another device
    bad_data_after: int = 0  # tokens that break the numbers


def train_miniature(
    steps: int, faults: Faults | None = None, *, seed: int = 0, tied: bool = False, ease: float = 0.05
) -> list[dict[str, Any]]:
    """Train a small language model and return the records of metrics.jsonl. In a process of its own: others fork from this one.

    ease: the largest share of a sequence that is one token; it makes some batches easier than others.
    """
    torch.set_num_threads(1)
    faults = faults or Faults()
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, VOCAB, (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(99))
    hardness = torch.rand(steps, generator=torch.Generator().manual_seed(98))  # of a step
    weights = {
        "embedding": torch.randn(VOCAB, WIDTH, generator=generator) * 0.3,
        "head": torch.randn(VOCAB, WIDTH, generator=generator) * 0.3,
        "norm": torch.ones(WIDTH),
    }
    if tied:
        weights["head"] = weights["embedding"].clone()
    parameters = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    copy = torch.nn.Parameter(parameters["norm"].detach().clone())  # what another tensor rank holds
    optimizer = torch.optim.AdamW([*parameters.values(), copy], lr=LR, betas=BETAS, eps=1e-8, weight_decay=0.0)
    records, place = [], 0
    for step in range(1, steps + 1):
        if step == faults.sampler_reset_after + 1 > 1:
            place = 0
        if step == faults.counter_reset_after + 1 > 1:
            for state in optimizer.state.values():
                state["step"].zero_()
        if step == faults.reload_after + 1 > 1:
            with torch.no_grad():
                parameters["head"].copy_(parameters["embedding"])
        batch = data[place * BATCH : (place + 1) * BATCH].clone()
        batch[:, : int(LENGTH * hardness[place] * ease)] = 7
        place += 1
        lr = LR * min(faults.warmup_counter(step) / WARMUP, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = _loss(parameters, batch, reverse=faults.reversed_sums)
        if 0 < faults.bad_data_after < step:
            loss = loss * math.nan
        optimizer.zero_grad()
        loss.backward()
        if tied:
            own = parameters["head"].grad.clone()
            both = own + parameters["embedding"].grad
            parameters["embedding"].grad.copy_(both)
            parameters["head"].grad.copy_(both if step < faults.untied_after_step else own)
        raw = parameters["norm"].grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), CLIP)
        copy.grad = raw if faults.unclipped_copy else parameters["norm"].grad.clone()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.step()
        update = math.sqrt(sum(float((p.detach() - before[name]).double().square().sum()) for name, p in parameters.items()))
        records.append(
            {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "update_norm": update, "seconds": 0.1}
            | {"tokens": BATCH * LENGTH, "consumed_tokens": step * BATCH * LENGTH, "consumed_seqs": step * BATCH}
        )
        records[-1]["norm_copy_apart"] = float((copy - parameters["norm"]).detach().abs().max())
        records[-1]["tie_apart"] = float((parameters["head"].detach() - parameters["embedding"].detach()).abs().max())
    return records


def _loss(parameters: Mapping[str, torch.Tensor], batch: torch.Tensor, *, reverse: bool) -> torch.Tensor:
    hidden, head = parameters["embedding"][batch[:, :-1]] * parameters["norm"], parameters["head"]
    if reverse:  # the same dot products, summed from their other end
        hidden, head = hidden.flip(-1), head.flip(-1)
    return cross_entropy((hidden @ head.T).flatten(0, 1), batch[:, 1:].flatten())


def write_miniature(
    folder: Path, records: list[dict[str, Any]], *segments: tuple[str, int, Mapping[str, Any]], patch: bytes | None = None
) -> Path:
    """Write a run directory: metrics, and a record with a segment for each (cause, step, facts). Of the private columns none."""
    folder.mkdir(parents=True)
    private = ("norm_copy_apart", "tie_apart")
    lines = [encode({key: value for key, value in record.items() if key not in private}) for record in records]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    for number, (cause, step, facts) in enumerate(segments, 1):
        append_segment(folder, cause=cause, step=step, attempt=number, run_id="miniature", facts=facts, patch=patch)
    return folder
