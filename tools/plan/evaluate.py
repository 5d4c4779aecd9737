"""Judges candidate layouts: why one cannot run, or its predicted memory, time and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes.common.checks.context_checks import context_head_problems, context_trial_problems
from recipes.common.checks.family_trials import partition_problems, sequence_problems
from recipes.common.checks.model_checks import depth_problems, group_problems
from recipes.common.checks.recipe_checks import layout_problems, option_problems
from recipes.common.config.ds_checks import ds_config_problems
from recipes.common.config.ds_config import ds_config_path, precision
from recipes.common.config.lr_schedules import tokens_of_run
from recipes.common.config.placement import ONE_PASS, ZERO_BUBBLE
from recipes.common.recipe import PIPELINE_SCHEDULES, RECOMPUTE, Layout
from tools.common.devices import GIB, Device
from tools.plan.coefficients import Coefficients
from tools.plan.memory_model import MemoryCase, interval, stage_totals
from tools.plan.model_cases import Candidate, ModelFacts, time_cases
from tools.plan.rank_params import expert_counts, expert_sizes
from tools.plan.stage_memory import memory_case
from tools.plan.time_model import step_parts

MOST_CHUNKS = 8  # a stage: messages grow with them
SHORTEST_SLICE = 4096  # tokens: with fewer, more sequences' ranks do better than context ranks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The prediction for a candidate that can run."""

    candidate: Candidate
    memory: MemoryCase
    stage_bytes: np.ndarray  # [stages]: as the driver would show at the peak
    peak: tuple[float, float, float]  # bytes of the fullest stage: low, predicted, high (90% interval)
    parts: dict[str, float]  # seconds of a step
    seconds: float
    tokens_per_second: float
    mfu: float
    days: float
    cost: float  # US dollars
    energy: float  # kWh

    @property
    def safe(self) -> bool:
        return self.peak[2] < self.memory.capacity


@dataclass(frozen=True)
class Rejected:
    candidate: Candidate
    why: str


def candidates(facts: ModelFacts, gpus: int, device: Device) -> list[Candidate]:
    """Return every split of `gpus` with tensor parallelism inside a node, micro batches of powers of two, all layout options.

    Context ranks share sequences one at a time, where each still has a long slice. Of a mixture, any power of two of data ranks
    may share the experts.
    """
    found, counts = [], expert_counts(facts.causal, facts.stack)
    for tensor in (size for size in range(1, min(gpus, device.node) + 1) if gpus % size == 0):
        for pipeline in (size for size in range(1, gpus // tensor + 1) if gpus // tensor % size == 0):
            data = gpus // (tensor * pipeline)
            most = max(facts.recipe.batch.global_seqs // data, 1)
            sizes = {2**power for power in range(most.bit_length())} | {facts.recipe.batch.micro_seqs}
            for context in context_sizes(data, facts.recipe.batch.seq_len):
                layouts = [
                    Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        expert=expert,
                        sequence_parallel=shared,
                        pipeline_schedule=schedule,
                        chunks=chunks,
                        recompute=recompute,
                    )
                    for recompute in RECOMPUTE
                    for expert in expert_sizes(counts, data)
                    for shared in (False, True)[: 1 + (tensor > 1)]
                    for schedule, chunks in schedules_of(pipeline, len(facts.work.layers))
                ]
                for micro_seqs in sorted(size for size in sizes if size <= most) if context == 1 else [1]:
                    found += [Candidate(layout=layout, data=data, micro_seqs=micro_seqs) for layout in layouts]
    return found


def schedules_of(pipeline: int, depth: int) -> list[tuple[str, int]]:
    """Return (schedule, chunks a stage) worth a look: with more chunks only where the longest has fewer layers."""
    if pipeline == 1:
        return [(ONE_PASS, 1)]
    lengths = {chunks: -(-depth // (pipeline * chunks)) for chunks in range(1, min(depth // pipeline, MOST_CHUNKS) + 1)}
    shorter = [chunks for chunks in lengths if chunks > 1 and lengths[chunks] < lengths[chunks - 1]]
    return [(schedule, 1) for schedule in PIPELINE_SCHEDULES] + [(s, v) for v in shorter for s in (ONE_PASS, ZERO_BUBBLE)]


def context_sizes(data: int, seq_len: int) -> list[int]:
    """Return the context sizes worth a look: powers of two."""
    powers = (2**power for power in range(data.bit_length()))
    return [size for size in powers if data % size == 0 and (size == 1 or seq_len >= size * SHORTEST_SLICE)]


def judge(
    facts: ModelFacts, found: Sequence[Candidate], device: Device, coefficients: Coefficients, price: float
) -> tuple[list[Plan], list[Rejected]]:
    """Return (plans: the fastest safe ones first, then those whose interval reaches the GPU's memory; the rejected)."""
    whys = why_not(facts, found)
    rejected = [Rejected(candidate, why) for candidate, why in zip(found, whys, strict=True) if why]
    able = [candidate for candidate, why in zip(found, whys, strict=True) if not why]
    fitting, memories = [], []
    for candidate in able:
        case = memory_case(facts, candidate, device)
        totals = stage_totals(coefficients.memory, case)
        if totals.max() >= case.capacity:
            rejected.append(Rejected(candidate, _too_large(case, totals)))
        else:
            fitting.append(candidate)
            memories.append((case, totals))
    if not fitting:
        return [], rejected
    cases = time_cases(facts, fitting, device)
    parts = step_parts(coefficients.time, cases, coefficients.factors(device, cases))
    plans = [
        _plan(
            facts,
            candidate,
            *memories[i],
            {name: float(of[i]) for name, of in parts.items()},
            device,
            coefficients,
            price,
        )
        for i, candidate in enumerate(fitting)
    ]
    return sorted(plans, key=lambda plan: (not plan.safe, plan.seconds)), rejected


def why_not(facts: ModelFacts, found: Sequence[Candidate]) -> list[str]:
    """Return for each candidate what rules it out before memory is counted, or ""."""
    by_pipeline = pipeline_problems(facts, {_pipeline_of(candidate.layout) for candidate in found})
    shared = Layout(tensor=2, sequence_parallel=True)
    shares = any(candidate.layout.sequence_parallel for candidate in found)
    of_sequences = (sequence_problems(facts.recipe.model, shared, facts.recipe.attention) if shares else []) or [""]
    masked = {"mask_documents": facts.recipe.mask_documents}
    splits = any(candidate.layout.context > 1 for candidate in found)
    of_context = context_trial_problems(facts.recipe.model, Layout(context=2), facts.recipe.attention, **masked) if splits else []
    of_family = (of_sequences[0], (of_context or [""])[0])
    return [_why_not(facts, candidate, by_pipeline, *of_family) for candidate in found]


def _too_large(case: MemoryCase, totals: np.ndarray) -> str:
    worst = int(totals.argmax())
    stage = case.stages[worst]
    return (
        f"memory: stage {worst} needs {totals[worst] / GIB:.0f} of {case.capacity / GIB:.0f} GiB (weights, gradients and "
        f"optimizer {stage.states / GIB:.0f}, activations of {stage.in_flight} micro batches {stage.stored / GIB:.0f})"
    )


def _plan(
    facts: ModelFacts,
    candidate: Candidate,
    case: MemoryCase,
    totals: np.ndarray,
    parts: dict[str, float],
    device: Device,
    coefficients: Coefficients,
    price: float,
) -> Plan:
    batch, seconds = facts.recipe.batch, sum(parts.values())
    rate = batch.global_seqs * batch.seq_len / seconds
    low, high = interval(float(totals.max()), coefficients.memory_spread)
    hours = tokens_of_run(facts.recipe) / rate / 3600
    return Plan(
        candidate=candidate,
        memory=case,
        stage_bytes=totals,
        peak=(low, float(totals.max()), high),
        parts=parts,
        seconds=seconds,
        tokens_per_second=rate,
        mfu=rate * facts.flops / (candidate.gpus * device.peak(precision(facts.ds_config))),
        days=hours / 24,
        cost=hours * candidate.gpus * price,
        energy=hours * candidate.gpus * device.watts / 1000,
    )


def _pipeline_of(layout: Layout) -> Layout:
    """Return only the fields of a layout that decide the partition into stages, and whether the ds_config allows it."""
    names = ("pipeline", "pipeline_schedule", "chunks", "layers_per_stage")
    return Layout(expert=min(layout.expert, 2), **{name: getattr(layout, name) for name in names})


def pipeline_problems(facts: ModelFacts, pipelines: set[Layout]) -> dict[Layout, str]:
    """Return for each pipeline why it cannot run, or "": depth, family, ds_config, stages without matrices."""
    recipe, depth = facts.recipe, len(facts.work.layers)
    file, found = ds_config_path(recipe.deepspeed), {}
    of_family = []
    if any(1 < each.pipeline <= depth for each in pipelines):  # try a tiny model of the family, once
        of_family = partition_problems(recipe.model, Layout(pipeline=2), recipe.attention)
    wrong = {each: option_problems(each, recipe.batch.seq_len) or depth_problems(each, depth) for each in pipelines}
    able = [each for each in pipelines if not wrong[each]]
    groups = dict(
        zip(able, group_problems(facts.causal, facts.stack, [(each, facts.own_layers(each)) for each in able]), strict=True)
    )
    for each, problems in wrong.items():
        if not problems:
            problems = (of_family if each.pipeline > 1 else []) + ds_config_problems(facts.ds_config, file, each) + groups[each]
        found[each] = problems[0] if problems else ""
    return found


def _why_not(facts: ModelFacts, candidate: Candidate, by_pipeline: dict[Layout, str], of_sequences: str, of_context: str) -> str:
    """Return what rules a candidate out before memory is counted, or ""."""
    layout, counts = candidate.layout, facts.rank_params(candidate.layout)
    if isinstance(counts, str):
        return f"tensor={layout.tensor}: {counts}"
    if by_pipeline[_pipeline_of(layout)]:
        return by_pipeline[_pipeline_of(layout)]
    if layout.sequence_parallel and of_sequences:
        return of_sequences
    if layout.context > 1:
        problems = context_head_problems(facts.recipe.model, layout, facts.recipe.attention)
        if problems or of_context:
            return (problems or [of_context])[0]
    recipe = replace(facts.recipe, batch=replace(facts.recipe.batch, micro_seqs=candidate.micro_seqs))
    problems = layout_problems(recipe, layout, candidate.gpus)
    return problems[0] if problems else ""
