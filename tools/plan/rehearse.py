"""`rehearse RECIPE --gpus N`: runs one rank's real step at real shapes on this machine, without a GPU, and counts what it does.

The trainer, DeepSpeed and the model are the real ones. Stand-ins: a CUDA device without memory or kernels, and a process group of
all N ranks that sends nothing. Shown: the memory's peak by line of source, kernels and bytes by part, each wait of the host for
the device, messages by group; beside them what `explain` predicts, with a hint where they part. Not shown: time, and what a
kernel itself would refuse. Needs g++, or a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.config.placement import ONE_PASS, coordinates
from recipes.common.recipe import Layout, Recipe, derive_sizes
from tools.common.console import FAILED, GOOD, UsageError, quiet_transformers
from tools.common.devices import DEVICES, find_device
from tools.common.recipe_io import load_recipe, parse_layout, states_data
from tools.plan.rehearsal.predicted import predict
from tools.plan.rehearsal.rehearsal_case import Rehearsal
from tools.plan.rehearsal.rehearsing import Rehearser
from tools.plan.rehearsal.report import report_json, report_text
from tools.plan.rehearsal.step_summary import summarize


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which of them to rehearse (default: %(default)s)")
    parser.add_argument("--layout", help="as for `explain`, but data, which follows (default: the recipe's for N GPUs)")
    gpu_types = ", ".join(device.name for device in DEVICES)
    parser.add_argument("--gpu-type", default="H100", help=f"whose memory counts: one of {gpu_types} (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=12, metavar="K", help="lines of source to show (default: %(default)s)")


def run(flags: argparse.Namespace) -> int:
    quiet_transformers()
    if flags.gpus < 1:
        raise UsageError(f"--gpus={flags.gpus}: must be 1 or more")
    if flags.lines < 0:
        raise UsageError(f"--lines={flags.lines}: must be 0 or more")
    device, recipe = find_device(flags.gpu_type), load_recipe(flags.recipe)
    recipe, layout = choose_layout(recipe, flags.gpus, flags.layout)
    if not 0 <= flags.rank < flags.gpus:
        raise UsageError(f"--rank={flags.rank}: the ranks of {flags.gpus} GPUs are 0 to {flags.gpus - 1}")
    with Rehearser() as rehearser:  # it imports while the recipe is checked, and rehearses while the planner predicts
        check_recipe(recipe, flags.gpus, check_machine=False)
        accumulation = derive_sizes(recipe, layout, flags.gpus).accumulation
        steps = step_lengths(layout, accumulation)
        rehearsal = Rehearsal(recipe=recipe, layout=layout, world_size=flags.gpus, rank=flags.rank, micro_batches=steps)
        rehearser.start(rehearsal, device)
        stage = coordinates(flags.rank, flags.gpus, layout).pipeline_rank
        prediction = predict(recipe, layout, flags.gpus, stage, accumulation, device)
        result, stand_in = rehearser.result(), rehearser.stand_in
    summary = summarize(result, accumulation)
    if flags.json:
        print(json.dumps(report_json(rehearsal, summary, prediction, device, stand_in)))
    else:
        print(report_text(rehearsal, summary, prediction, device, stand_in, lines=flags.lines))
    return FAILED if summary.broken or summary.peak > device.memory else GOOD


def choose_layout(recipe: Recipe, gpus: int, given: str | None) -> tuple[Recipe, Layout]:
    """Return the recipe with one layout for `gpus`, the one given or its own, and that."""
    if given is not None:
        layout, data = parse_layout(given)
        if states_data(given) and layout.tensor * layout.pipeline * data != gpus:
            raise UsageError(f"--layout={given}: does not fill --gpus={gpus}; correct it, or leave out data=")
    elif gpus in recipe.layouts:
        layout = recipe.layouts[gpus]
    else:
        known = ", ".join(map(str, recipe.layouts))
        raise UsageError(f"--gpus={gpus}: {recipe.name} has layouts for {known} GPUs; give one of those, or a --layout")
    return replace(recipe, layouts={gpus: layout}), layout


def step_lengths(layout: Layout, accumulation: int) -> tuple[int, ...]:
    """Return the micro batches of the steps to rehearse: a first one, in which states are made, and two that differ by one.

    The last fills the pipeline as a whole step does, so that its peak is a step's. A zero bubble keeps weight gradients for
    later, more of them the longer its steady part is.
    """
    full = layout.pipeline if layout.pipeline_schedule == ONE_PASS and layout.chunks == 1 else 2 * layout.pipeline
    last = max(2, min(full, accumulation))
    return 1, last - 1, last
