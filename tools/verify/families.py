"""Judges model types: a tiny model of each trains in layouts and in one process of plain transformers.

One configuration serves all layouts of a type, so that the oracle trains once. What rounding alone makes is measured only where a
fixed bound is missed. Time goes into starting ranks, not into computing: a type's code is imported once, before they are forked,
and each rank trains all that its layout is judged by.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from recipes.common.checks.context_checks import context_head_problems, context_trial_problems
from recipes.common.checks.expert_trial import expert_trial_problems
from recipes.common.checks.family_trials import partition_problems
from recipes.common.checks.tiny_trial import trial_problems
from recipes.common.config.ds_config import load_ds_config
from recipes.common.model.decoder import PlanError
from recipes.common.parallel.tensor_plans import whole_matrices
from recipes.common.parallel.tiny_model import field_of
from recipes.common.pipeline.stage import plan_model
from recipes.common.recipe import AdamW, Layout
from tools.common.console import UsageError, progress_bar
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.parity import Outcome, Trial, gradient_trial, outcome, train_in_layout, train_plain, train_stirred
from tools.verify.family_export import try_export
from tools.verify.family_log import FamilyLog
from tools.verify.family_verdict import FAILED_GATE, LEFT_OUT, PASSED, REFUSED, UNDECIDED, FamilyVerdict
from tools.verify.gate import SAMPLES, WorstDifference, worst_step, worst_tensor
from tools.verify.tiny_families import EXPERTS, LeftOutError, family_names, load_family, tiny_family

LAYOUTS: dict[str, tuple[Layout, int]] = {
    "pipeline=2": (Layout(pipeline=2), 1),
    "tensor=2": (Layout(tensor=2), 1),
    "tensor=2,pipeline=2": (Layout(tensor=2, pipeline=2), 1),
    "tensor=2,pipeline=2,data=2": (Layout(tensor=2, pipeline=2), 2),
    "context=2": (Layout(context=2), 2),
    "expert=2": (Layout(expert=2), 2),  # of mixtures alone
}
_ATTENTION = "eager"
_OPTIMIZER = AdamW(lr=1e-3, eps=1e-5, clip=0.5)  # eps above rounding, so that near-zero gradients do not become whole steps
STEP_BOUND, TENSOR_BOUND = 1e-6, 1e-5  # relative; absolute
_LONGEST_REASON = 400


def judge_families(
    names: Sequence[str] | None, layouts: Mapping[str, tuple[Layout, int]], log: FamilyLog, *, steps: int, seq_len: int
) -> list[FamilyVerdict]:
    """Judge these types (None: all) in each layout, those aside that the log has. Raises UsageError for an unknown name."""
    known = family_names()
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UsageError(f"--family {name}: the installed transformers knows no causal model type of this name{hint}")
    verdicts: list[FamilyVerdict] = []
    with progress_bar("families", len(names or known), unit="family") as bar:
        for name in known if names is None else dict.fromkeys(names):
            missing = {words: each for words, each in layouts.items() if log.find(name, words) is None}
            for verdict in _judge(name, missing, steps=steps, seq_len=seq_len) if missing else ():
                log.add(verdict)
                verdicts.append(verdict)
            verdicts += [found for words in layouts if (found := log.find(name, words)) is not None]
            bar.update()
    order = list(layouts)
    return sorted(verdicts, key=lambda verdict: (verdict.family, order.index(verdict.layout)))


def _judge(name: str, layouts: Mapping[str, tuple[Layout, int]], *, steps: int, seq_len: int) -> Iterator[FamilyVerdict]:
    """Yield the verdicts of a type. Its tiny model, and what plain transformers makes of it, come from one rank."""
    load_family(name)  # once, here: every rank that is forked has its code
    length = {"steps": steps, "seq_len": seq_len}
    try:
        known = run_ranks(_describe, 1, name, dict(layouts), length)[0]
    except RankError as error:
        known = {"left_out": f"its tiny model cannot be described: {_last_line(error)}"}
    if "left_out" in known:
        yield from (FamilyVerdict(family=name, layout=w, outcome=LEFT_OUT, reason=known["left_out"]) for w in layouts)
        return

    @cache
    def stirred(gradient: bool, readers: int) -> list[Outcome]:
        return run_ranks(train_stirred, SAMPLES, _trials(known["config"], Layout(), readers, length)[gradient])

    exported = ""  # EXPORTED, or what is wrong with the export; empty: not tried
    for words, (layout, data) in layouts.items():
        readers = data // layout.context
        facts = {"family": name, "layout": words, "experts": known["experts"], "tied": known["tied"]}
        facts["whole"] = known["whole"].get(words, 0.0)
        if layout.expert > 1 and not known["experts"]:
            yield FamilyVerdict(**facts, outcome=LEFT_OUT)
            continue
        if reason := known["refused"].get(words):
            yield FamilyVerdict(**facts, outcome=REFUSED, reason=reason)
            continue
        trials = _trials(known["config"], layout, data, length)
        try:
            assert "plain_failed" not in known, known["plain_failed"]
            rows, trained = _compare(trials, known["plain"][readers], lambda gradient, each=readers: stirred(gradient, each))
            wrong = [f"{row.what} of {row.where} differs by {row.difference:.1e}" for row in rows if not row.passed]
            if not (exported or wrong):  # whole tensors: one layout's are enough
                exported = run_ranks(try_export, 1, known["config"], trained, known["tied"])[0]
        except (RankError, AssertionError) as error:
            yield FamilyVerdict(**facts, outcome=FAILED_GATE, reason=f"it could not be trained: {_last_line(error)}")
            continue
        facts |= {"rows": [asdict(row) for row in rows], "export": exported}
        yield FamilyVerdict(**facts, outcome=_outcome(rows), reason="; ".join(wrong))


def _outcome(rows: Sequence[WorstDifference]) -> str:
    """Judge the differences: those of AdamW's steps, then those of the step of plain SGD."""
    steps, gradients = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    wrong = [row for row in steps if not row.passed]
    if not all(row.passed for row in gradients):
        return FAILED_GATE
    if wrong:  # AdamW makes whole steps of gradients that are rounding
        return UNDECIDED if all(row.floor is not None and row.difference <= row.floor for row in wrong) else FAILED_GATE
    return PASSED


def _describe(name: str, layouts: dict[str, tuple[Layout, int]], length: dict[str, int]) -> dict[str, Any]:
    """Return the tiny model, why layouts are refused, and what plain transformers makes of it; or why the type is left out."""
    widest = Layout(
        tensor=max(layout.tensor * layout.context for layout, _ in layouts.values()),  # context ranks divide heads too
        pipeline=max(layout.pipeline for layout, _ in layouts.values()),
        expert=max(layout.expert for layout, _ in layouts.values()),
        chunks=max(layout.chunks for layout, _ in layouts.values()),
    )
    try:
        config = tiny_family(name, widest).config
    except LeftOutError as reason:
        return {"left_out": str(reason)}
    refused, whole, tied = {}, {}, False
    problems = trial_problems(config, _ATTENTION)

    @cache
    def partitioned(pipeline: int) -> list[str]:
        return partition_problems(config, Layout(pipeline=pipeline), _ATTENTION)

    for words, (layout, _) in layouts.items():
        try:
            planned = plan_model(config, layout, attention=_ATTENTION)
            tied = planned.stack.tied
            if layout.tensor > 1:
                matrices = [p.numel() for p in planned.causal.get_submodule(planned.stack.layers).parameters() if p.ndim > 1]
                kept = whole_matrices(planned.causal, planned.stack, planned.tensor_plan.shards)
                whole[words] = sum(kept.values()) / max(sum(matrices), 1)
            found = [*problems, *partitioned(layout.pipeline), *_context_problems(config, layout)]
            found += expert_trial_problems(config, layout, _ATTENTION)
        except PlanError as error:
            found = [str(error)]
        except Exception as error:  # a family's own code may raise anything
            found = [f"its model is not built: {type(error).__name__}: {' '.join(str(error).split())}"]
        if found:
            refused[words] = "; ".join(found)[:_LONGEST_REASON]
    experts = next((n for each in EXPERTS if isinstance(n := field_of(config, each), int)), 0)
    asked = {data // layout.context for words, (layout, data) in layouts.items() if words not in refused}
    known = {"config": config, "refused": refused, "whole": whole, "tied": tied, "experts": experts}
    try:
        plain = {readers: [train_plain(t) for t in _trials(config, Layout(), readers, length)] for readers in asked}
    except Exception as error:  # a family's own code may raise anything
        return {**known, "plain_failed": f"plain transformers does not train it: {type(error).__name__}: {error}"}
    return {**known, "plain": plain}


def _context_problems(config: PreTrainedConfig, layout: Layout) -> list[str]:
    found = context_head_problems(config, layout, _ATTENTION)
    return found or context_trial_problems(config, layout, _ATTENTION, mask_documents=False)


def _trials(config: PreTrainedConfig, layout: Layout, data: int, length: dict[str, int]) -> list[Trial]:
    """Return the steps of AdamW, and the one of plain SGD that shows the gradients."""
    steps = Trial(
        model=config,
        layout=layout,
        world_size=layout.tensor * layout.pipeline * data,
        optimizer=_OPTIMIZER,
        deepspeed=load_ds_config("zero1_fp32.json"),
        global_seqs=2 * data // layout.context,
        attention=_ATTENTION,
        **length,
    )
    return [steps, gradient_trial(steps)]


def _train_in_turn(trials: list[Trial]) -> list[dict[str, Any]]:
    """Train each in these ranks: starting ranks takes longer than what a tiny model computes."""
    return [train_in_layout(trial) for trial in trials]


def _compare(
    trials: list[Trial], plain: list[Outcome], stirred: Callable[[bool], list[Outcome]]
) -> tuple[list[WorstDifference], Outcome]:
    """Train in the layout; return the differences, and what the steps of AdamW made.

    Where a fixed bound is missed, the bound follows from what rounding alone makes.
    """
    ranks, rows, outcomes = run_ranks(_train_in_turn, trials[0].world_size, trials), [], []
    for gradient, oracle in enumerate(plain):
        shapes = {name: tensor.shape for name, tensor in oracle.parameters.items()}
        trained = outcome([each[gradient] for each in ranks], shapes)
        outcomes.append(trained)
        found = _rows(trained, oracle, [], bool(gradient))
        if not all(row.passed for row in found):
            measured = _rows(trained, oracle, stirred(bool(gradient)), bool(gradient))
            found = [row if row.passed else again for row, again in zip(found, measured, strict=True)]
        rows += found
    return rows, outcomes[0]


def _rows(trained: Outcome, plain: Outcome, stirred: list[Outcome], gradient: bool) -> list[WorstDifference]:
    step, tensor = (None, None) if stirred else (STEP_BOUND, TENSOR_BOUND)
    losses, norms = [each.losses for each in stirred], [each.grad_norms for each in stirred]
    end = ", SGD" if gradient else ""
    return [
        worst_step(f"loss{end}", trained.losses, plain.losses, step, losses),
        worst_step(f"gradient norm{end}", trained.grad_norms, plain.grad_norms, step, norms),
        worst_tensor("gradient" if gradient else "parameter", trained, plain, stirred, tensor),
    ]


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:_LONGEST_REASON]
