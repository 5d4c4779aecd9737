"""Plants a wrong entry at each place of a tensor plan that is ours, and says which of them a tiny model's gradients show."""

import math
import re
from dataclasses import replace

import torch
import torch.distributed as dist

from recipes.common.engine.startup import start_distributed
from recipes.common.model.decoder import PlanError
from recipes.common.parallel import tensor_plans
from recipes.common.parallel.collectives import gather_from, split_to
from recipes.common.parallel.grid import build_grid, one_process
from recipes.common.parallel.tensor_styles import STYLES
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tools.verify.tiny_families import tiny_family

SIZE, SEQS, SEQ_LEN = 2, 2, 16
EXACT = 1e-3  # of a tensor's largest gradient, where that is no rounding itself
ROUNDING = 1e-7
WRONG = {
    "colwise": ("rowwise",),
    "rowwise": ("colwise", "no sum"),
    "packed_colwise": ("colwise",),
    "packed3_colwise": ("colwise",),
    "colwise_gather_output": ("colwise", "whole"),
    "rowwise_split_input": ("rowwise", "no sum"),
    "bank_gather_output": ("no sum of gradients",),  # the other one of the two is right in either's place
    "bank_split_input": ("no sum of banks",),
    "stacked_experts": ("whole",),
    "moe_tp_experts": ("whole",),
    "replicated_with_grad_allreduce": ("whole",),
    "biased_experts": ("moe_tp_experts", "whole"),
    "alibi_by_head": ("whole",),
    "mla_kv_a_proj": ("whole",),
    "replicate": ("whole",),  # then transformers' own plan, which shards it
}
HARMLESS = {("colwise_gather_output", "whole")}  # a projection that is not sharded, where its output is gathered


def planted(family: str) -> tuple[float, dict[str, bool]]:
    """Return (the largest difference of the plan as it is, {planted entry: found}). In `SIZE` ranks."""
    start_distributed("cpu")
    STYLES["no sum"] = replace(STYLES["rowwise"], connect=None)
    STYLES["no sum of banks"] = replace(STYLES["bank_split_input"], connect=_split_alone)
    STYLES["no sum of gradients"] = replace(STYLES["bank_gather_output"], connect=_gather_alone)
    config = tiny_family(family, Layout(tensor=SIZE)).config
    grid = build_grid(Layout(tensor=SIZE), torch.device("cpu"))
    whole = _gradients(build_stage(plan_model(config, attention="eager"), one_process(), seq_len=SEQ_LEN))
    right = _difference(config, grid, whole)
    table = tensor_plans.BUILT_IN_TENSOR if family in tensor_plans.BUILT_IN_TENSOR else tensor_plans.ADDED_TENSOR
    causal = plan_model(config, attention="eager").causal
    names = [name for name, _ in (*causal.named_modules(), *causal.named_parameters())]
    found, plan = {}, dict(table[family])
    for pattern, style in plan.items():
        if pattern.startswith("?") and not any(re.search(_rule(pattern), name) for name in names):
            continue  # this configuration has no such module
        for wrong in WRONG[style]:
            if (style, wrong) in HARMLESS or (wrong == "no sum" and ".experts." in pattern):
                continue  # banks are summed by the module that holds them
            entries = {k: v for k, v in plan.items() if k != pattern} | ({} if wrong == "whole" else {pattern: wrong})
            table[family] = entries
            try:
                found[f"{pattern} {style} -> {wrong}"] = not _difference(config, grid, whole) < 1.0
            except (PlanError, RuntimeError, ValueError, IndexError, AssertionError):
                found[f"{pattern} {style} -> {wrong}"] = True
    return right, found


def _rule(pattern: str) -> str:
    return r"\." + re.escape(pattern.removeprefix("?")).replace(r"\*", r"\d+") + "$"


def _split_alone(module, setting):
    forward = module.forward
    module.forward = lambda x, *args: forward(split_to(x, setting.grid.tensor_group), *args)


def _gather_alone(module, setting):
    forward = module.forward
    module.forward = lambda x, *args: gather_from(forward(x, *args), setting.grid.tensor_group)


def _difference(config, grid, whole) -> float:
    """Return the largest difference of a gradient, as a share of what is allowed."""
    model = plan_model(config, Layout(tensor=SIZE), attention="eager")
    stage = build_stage(model, grid, Layout(tensor=SIZE), seq_len=SEQ_LEN)
    worst = 0.0
    for name, gradient in _gradients(stage).items():
        shard = stage.tensor_plan.shards.get(name)
        wanted = whole[name] if shard is None else shard.take(whole[name], grid.tensor_rank, SIZE)
        allowed = EXACT * wanted.abs().max() + ROUNDING
        worst = max(worst, ((gradient - wanted).abs().max() / allowed).item())
    shares = torch.tensor([worst])
    dist.all_reduce(shares, op=dist.ReduceOp.MAX)
    return shares.item() if shares.isfinite().all() else float("inf")


def _gradients(stage) -> dict[str, torch.Tensor]:
    """Gradients with weights large enough that attention is not uniform, and biases that are not 0."""
    with torch.no_grad():
        for name, parameter in stage.hf_named_parameters():
            if "bias" in name:
                shape, shard = stage.whole_shapes[name], stage.tensor_plan.shards.get(name)
                wave = torch.arange(math.prod(shape)).cos().view(shape) / 4
                parameter += wave if shard is None else shard.take(wave, stage.grid.tensor_rank, SIZE)
            elif parameter.ndim > 1 and not re.search("emb|wte|wpe", name):
                parameter *= 4
    ids = torch.arange(SEQS * SEQ_LEN).view(SEQS, SEQ_LEN) * 7 % (stage.vocab_size - 3) + 3
    stage.train()(ids, labels=(ids.roll(-1, dims=1), torch.tensor(1.0 / ids.numel()))).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.hf_named_parameters()}
