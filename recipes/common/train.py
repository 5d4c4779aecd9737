"""main(recipe): checks everything, starts the run on this rank, and trains. The one loop of the project is `train` below."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.common.anomalies.recovery import Recovery
from recipes.common.anomalies.rewinds import Rewind, history_at_start, lr_factors, skips_ahead
from recipes.common.checkpoint.changes import check_resume, resume_flag_problems
from recipes.common.checkpoint.files import CheckpointError, out_dir_problems, writing_problems
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.reorder import first_order
from recipes.common.checkpoint.resume import resume
from recipes.common.checkpoint.saver import Saver
from recipes.common.checks.dry_run import describe_run
from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.checks.recipe_file import report_recipe_file
from recipes.common.config.arguments import parse_flags, place_of
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.config.field_effects import NEEDS_CONSENT
from recipes.common.config.field_types import mistyped_fields
from recipes.common.config.lr_schedules import global_seqs_at, learning_rate_at
from recipes.common.data.batches import open_train, open_validation, step_micro_batches, validation_micro_batches
from recipes.common.data.prefetcher import Prefetcher
from recipes.common.engine.build_trainer import build_recipe_trainer
from recipes.common.engine.determinism import set_determinism
from recipes.common.engine.trainer import NONFINITE, TOO_HIGH, StepResult, Trainer
from recipes.common.monitor.monitor import RunMonitor
from recipes.common.monitor.phases import Phases
from recipes.common.parallel.dropout import seed_dropout
from recipes.common.parallel.grid import Grid
from recipes.common.recipe import Layout, Recipe, RecipeError, Sizes, derive_sizes, due
from recipes.common.record.recording import Told, open_run_dir
from recipes.common.run_dir.checkpoint_folders import step_folder
from recipes.common.run_dir.lease import Lease, hold_run
from recipes.common.run_dir.run_log import RunLog
from recipes.common.runtime.exits import end_rank, guard_rank, refusals
from recipes.common.runtime.garbage import collect_as_usual, collect_by_steps, collect_if_due
from recipes.common.runtime.gpus import place_problems
from recipes.common.runtime.screen import keep_screen
from recipes.common.runtime.stop_signal import StopRequest
from recipes.common.runtime.supervisor_link import SupervisorLink

SKIPS_IN_A_ROW = 32  # steps that overflow and do not apply: fp16's scale has then fallen from its start to 1
sys.excepthook = report_recipe_file  # of errors in a recipe's file, which imports this module before it declares anything


def main(recipe: Recipe, file_problems: Sequence[str] = ()) -> None:
    """Train `recipe` as the command line says: the entry point of every recipe file. file_problems: what is wrong with that.

    Exit codes: 0 finished or stopped on request, and the last state is on disk; 1 failed; 2 the recipe or the flags are wrong;
    3 the numbers are useless; 4 the last state could not be saved.
    """
    keep_screen()
    flags = parse_flags(recipe.name)
    rank, world_size = place_of(os.environ)
    world_size = flags.world_size or world_size
    link = SupervisorLink(rank)
    out_dir = Path(flags.out_dir).expanduser().resolve()
    try:
        found = [*file_problems, *([] if flags.dry_run else start_problems(recipe, flags, out_dir))]
        layout, ds_config = check_recipe(recipe, world_size, check_machine=not flags.dry_run, flag_problems=found)
    except RecipeError as error:
        if rank == 0 or place_problems(os.environ):  # every rank finds the same recipe
            print(f"error: {error}", file=sys.stderr)
        link.report_exit("disk_error" if writing_problems(out_dir) else "user_error")
        sys.exit(2)
    sizes = derive_sizes(recipe, layout, world_size)
    ds_config = merge_ds_config(ds_config, recipe, sizes, sizes.accumulation)
    if flags.dry_run:
        if rank == 0:
            print(describe_run(recipe, layout, sizes))
            print(json.dumps(ds_config, indent=2))
        return
    start = {name: getattr(flags, name) for name in ("resume_step", "max_steps", "accept", "trace_steps")}
    with guard_rank(out_dir, rank, link.report_exit):
        with hold_run(out_dir, link.report_exit) if rank == 0 else contextlib.nullcontext() as lease:
            with refusals(rank, link.report_exit, RecipeError, CheckpointError):
                if lease and (found := out_dir_problems(out_dir, flags.resume, flags.resume_step)):
                    raise CheckpointError("; ".join(found))  # another job came and went since the checks
                start |= {"resume_run": flags.resume, "skips": flags.skip, "lease": lease}
                run = start_run(recipe, layout, sizes, ds_config, out_dir, **start)
            finished = train(run)
        end_rank(lambda: link.report_exit("finished" if finished else "stopped"))


def start_problems(recipe: Recipe, flags: Namespace, out_dir: Path) -> list[str]:
    """Return what keeps a run from its start here, beside the recipe: its launcher and GPUs, --out-dir, the resume."""
    if problems := place_problems(os.environ) + writing_problems(out_dir):
        return problems
    problems = out_dir_problems(out_dir, flags.resume, flags.resume_step)
    if flags.resume and not mistyped_fields(recipe):
        problems += resume_flag_problems(recipe, out_dir, flags.resume_step, flags.accept, flags.max_steps)
    return problems


@dataclass(frozen=True)
class Run:
    """One start of a run, on this rank: all that the loop works with."""

    recipe: Recipe
    trainer: Trainer
    position: RunPosition  # where the loop begins
    last_step: int
    phases: Phases
    saver: Saver
    monitor: RunMonitor
    recovery: Recovery
    stop: StopRequest
    log: RunLog | None  # on rank 0


def train(run: Run) -> bool:
    """Train to the run's last step. Returns whether it was reached: False after a request to stop."""
    recipe, trainer, phases, recovery = run.recipe, run.trainer, run.phases, run.recovery
    position, skips_in_a_row, stopping = run.position, 0, False
    batches = open_reader(recipe, trainer.grid, position)
    collect_by_steps()
    if position.step == 0 and recipe.evaluation.every_steps:
        write_record(run, {"step": 0} | evaluate(recipe, trainer))
    while position.step < run.last_step and not stopping:
        step = position.step + 1
        phases.enter(step, "data")
        started = time.perf_counter()
        seqs = global_seqs_at(recipe.batch, position.consumed_seqs)
        tokens = seqs * recipe.batch.seq_len
        lr = learning_rate_at(recipe, step, position.consumed_tokens(recipe.batch.seq_len) + tokens) * recovery.lr_factor(step)
        trainer.set_global_seqs(seqs)
        seed_dropout(recipe.seed, step, trainer.grid)
        micro_batches = batches.next(position.consumed_seqs, seqs)

        phases.enter(step, "step")
        run.monitor.before_step(step)
        votes = (run.stop.requested(), trainer.grid.rank == 0 and run.saver.due_by_time(), run.saver.failed())
        result = trainer.train_step(micro_batches, lr, tokens, votes, recovery.norm_ceiling())
        stopping, time_to_save, save_failed = result.votes

        phases.enter(step, "log")
        collect_if_due(step)
        position = position.after_step(seqs, skipped=result.skipped)
        skips_in_a_row = skips_in_a_row + 1 if result.skipped else 0
        record = step_record(recipe, position, result, lr, tokens, time.perf_counter() - started, batches.wait_seconds)
        with recovery.box_at_end(position):
            record |= run.monitor.after_step(step, result, micro_batches, tokens)
        if recipe.evaluation.every_steps and (due(recipe.evaluation.every_steps, step) or step == run.last_step):
            phases.enter(step, "evaluate")
            record |= evaluate(recipe, trainer)
        record |= recovery.observe(record)
        write_record(run, record)

        rewound = recovery.decide(position, hopeless(run, step, result, skips_in_a_row), skipped=result.skipped)
        if rewound is not None:
            position, skips_in_a_row, stopping = rewound, 0, False
            batches.close()
            batches = open_reader(recipe, trainer.grid, position)
            continue
        run.saver.give_up(save_failed)
        if stopping or time_to_save or step == run.last_step or run.saver.due(step):
            phases.enter(step, "save")
            run.saver.save(position)
    batches.close()
    return end_run(run, position)


def start_run(
    recipe: Recipe,
    layout: Layout,
    sizes: Sizes,
    ds_config: dict[str, Any],
    out_dir: Path,
    *,
    resume_run: bool,
    resume_step: int | None = None,
    max_steps: int | None = None,
    skips: tuple[tuple[int, int], ...] = (),
    accept: Sequence[str] = (),
    trace_steps: range = range(0),
    lease: Lease | None = None,
) -> Run:
    """Build this rank's trainer, resume where asked, and open the run directory. lease: of that, on rank 0.

    skips, accept, trace_steps: as the flags give them.
    """
    phases = Phases(out_dir, int(os.environ.get("RANK", "0")), trace_steps)
    set_determinism(recipe.determinism)
    trainer = build_recipe_trainer(recipe, layout, ds_config, draw=not resume_run)
    changes, position, history = [], RunPosition(order=first_order(recipe)).skip(skips), ()
    if resume_run:
        position, history = _first_position(recipe, out_dir, trainer, resume_step, skips)
        changes = check_resume(recipe, out_dir, step_folder(out_dir, position.step), accept)
    resumed_step = position.step if resume_run else None
    told = Told(
        recipe=recipe,
        layout=layout,
        sizes=sizes,
        ds_config=ds_config,
        resumed_step=resumed_step,
        skips=position.skips,
        lr_factors=lr_factors(history),
        reading=asdict(position.order),
        accepted=[change.recorded() for change in changes if change.effect in NEEDS_CONSENT],
    )
    log = open_run_dir(out_dir, told, trainer)
    for change in changes if log is not None else ():
        log.note(f"going on with {change}: {'accepted; ' * (change.effect in NEEDS_CONSENT)}changes {change.effect.value}")
    saver = Saver(out_dir, trainer, recipe, log, resumed_step, lease)
    monitor = RunMonitor(trainer, recipe, out_dir, resumed_step=resumed_step, log=log)
    recovery = Recovery(recipe, out_dir, trainer, saver, monitor, log)
    recovery.start(position, history, resumed=resume_run)
    phases.start(trainer)
    trainer.leave_weights_to_next_step()
    last_step = min(recipe.steps, max_steps or recipe.steps)
    return Run(recipe, trainer, position, last_step, phases, saver, monitor, recovery, StopRequest(), log)


def end_run(run: Run, position: RunPosition) -> bool:
    """Wait until the last state is on disk and close what `start_run` opened. Return whether the run's last step was reached.

    Raises UnsavedError where the state cannot be saved.
    """
    enter_end = functools.partial(run.phases.enter, position.step, "end")
    enter_end()
    collect_as_usual()
    run.stop.end()
    run.trainer.wait_for_weights()
    run.saver.finish_last(position, lambda: run.stop.name is not None, enter_end)
    run.monitor.close()
    if run.log is not None:
        if position.step < run.last_step:
            cause = run.stop.name or "a signal to another rank"
            run.log.note(f"stopped by {cause} after saving step {position.step}; continue with --resume")
        run.log.close()
    return position.step >= run.last_step


def _first_position(
    recipe: Recipe, out_dir: Path, trainer: Trainer, resume_step: int | None, skips: tuple[tuple[int, int], ...]
) -> tuple[RunPosition, tuple[Rewind, ...]]:
    """Resume. Returns the position, without the sequences that the run's rewinds skip, and those rewinds."""
    history = history_at_start(out_dir)
    position = resume(out_dir, trainer, recipe, last_step=resume_step)
    return position.skip((*skips, *skips_ahead(history, position))), history


def write_record(run: Run, record: dict[str, Any]) -> None:
    """Write a line of metrics.jsonl on rank 0, with what the saver has to report since the line before."""
    if run.log is not None:
        run.log.write(record | run.saver.report())


def open_reader(recipe: Recipe, grid: Grid, position: RunPosition) -> Prefetcher:
    """Open this rank's micro batches, step by step. Stages that use none of them read none."""
    stream = open_train(recipe.data, recipe.batch.seq_len, position.order)
    reads = grid.is_first_stage or grid.is_last_stage or recipe.mask_documents

    def read(consumed: int, global_seqs: int) -> list[torch.Tensor]:
        if not reads:
            return [torch.empty(0)] * (global_seqs // (recipe.batch.micro_seqs * grid.readers))
        return step_micro_batches(
            stream,
            seed=recipe.seed,
            consumed=consumed,
            global_seqs=global_seqs,
            micro_seqs=recipe.batch.micro_seqs,
            data_rank=grid.reader,
            data_size=grid.readers,
            skips=position.skips,
        )

    def following(consumed: int, global_seqs: int) -> tuple[int, int]:
        return consumed + global_seqs, global_seqs_at(recipe.batch, consumed + global_seqs)

    return Prefetcher(read, following)


def evaluate(recipe: Recipe, trainer: Trainer) -> dict[str, float]:
    """Return {"val_loss": on the held-out split}; with a blend the mean over its folders, and "val_loss/FOLDER" for each."""
    seqs, grid = recipe.evaluation.seqs, trainer.grid
    losses = {}
    for name, stream in open_validation(recipe.data, recipe.batch.seq_len).items():
        micro_batches = validation_micro_batches(
            stream, seqs=seqs, micro_seqs=recipe.batch.micro_seqs, data_rank=grid.reader, data_size=grid.readers
        )
        losses[f"val_loss/{Path(name).name}"] = trainer.evaluate(micro_batches, seqs * recipe.batch.seq_len)
    mean = sum(losses.values()) / len(losses)
    return {"val_loss": mean} | (losses if len(losses) > 1 else {})


def step_record(
    recipe: Recipe, position: RunPosition, result: StepResult, lr: float, tokens: int, seconds: float, wait_seconds: float
) -> dict[str, Any]:
    record = {
        "step": position.step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": tokens,
        "consumed_seqs": position.consumed_seqs,
        "consumed_tokens": position.consumed_tokens(recipe.batch.seq_len),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait_share": wait_seconds / seconds,
    }
    if recipe.z_loss:
        record["log_z_squared"] = result.log_z_squared
    if result.loss_scale != 1.0 or position.skipped_steps:
        record |= {"loss_scale": result.loss_scale, "skipped_steps": position.skipped_steps}
    if result.skip_reason == TOO_HIGH:
        record["skip_reason"] = "abnormal gradient norm"
    return record


def hopeless(run: Run, step: int, result: StepResult, skips_in_a_row: int) -> tuple[int, str] | None:
    """Return since which step the run is useless, and why; None while it is not. Equal on every rank: the numbers are."""
    if result.skip_reason == NONFINITE and skips_in_a_row >= run.recipe.monitor.max_nonfinite_steps:
        first = run.monitor.nonfinite or "which tensor was first is not known"
        return step - skips_in_a_row + 1, f"{skips_in_a_row} steps in a row were not finite: {first}"
    if not result.skipped and not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        return step, f"loss is {result.loss} and the gradient norm {result.grad_norm}"
    if skips_in_a_row >= SKIPS_IN_A_ROW:
        return step - skips_in_a_row + 1, f"{skips_in_a_row} steps in a row overflowed, loss scale {result.loss_scale}"
    return None
