"""Loads the newest intact checkpoint into a trainer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from recipes.common.checkpoint.changes import written_recipe
from recipes.common.checkpoint.files import CheckpointError, damage
from recipes.common.checkpoint.folders import abandon_later
from recipes.common.checkpoint.position import RunPosition, written_position
from recipes.common.checkpoint.reader import Reader
from recipes.common.checkpoint.reorder import carry_over
from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.recipe import Recipe
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints


def resume(out_dir: Path, trainer: Trainer, recipe: Recipe, *, last_step: int | None = None) -> RunPosition:
    """Load the newest checkpoint whose every byte is as written, in this layout. Collective. Returns where `recipe` goes on.

    Damaged ones are named and passed over. last_step: load none later than this, and set later ones aside.
    Raises CheckpointError when none is left.
    """
    folder = _newest_intact(out_dir, trainer, last_step)
    reader = Reader(folder)
    load_state(reader, trainer)
    state = reader.state
    if trainer.grid.rank == 0:
        print(f"resuming from {folder} (step {state['step']})", flush=True)
        if last_step is not None:
            abandon_later(out_dir, state["step"])
    return carry_over(written_position(state), recipe, written_recipe(folder))


def _newest_intact(out_dir: Path, trainer: Trainer, last_step: int | None) -> Path:
    """Return the folder on which all ranks agree. Each checks some of the files."""
    folders = [f for f in sealed_checkpoints(out_dir)[::-1] if last_step is None or checkpoint_step(f) <= last_step]
    world = dist.get_world_size()
    for folder in folders:
        found = damage(folder, stride=(trainer.grid.rank, world))
        for line in found:
            print(f"skipping a damaged checkpoint: {line}", flush=True)
        bad = torch.tensor([float(len(found))], device=trainer.grid.device)
        if world > 1:
            dist.all_reduce(bad)
        if not bad.item():
            return folder
    until = "" if last_step is None else f" up to step {last_step}"
    where = out_dir / "checkpoints"
    raise CheckpointError(f"--resume: {where} holds {len(folders)} checkpoints{until}, none intact; start without --resume")


def load_state(reader: Reader, trainer: Trainer) -> None:
    """Fill this rank's partitions from a checkpoint of any layout, then the weights that the model computes with."""
    stage = trainer.stage
    _check_same_model(reader, trainer)
    kinds = sorted(reader.kinds() - {zero_state.MASTER, "buffer"})
    if kinds or reader.state["optimizer_steps"]:
        zero_state.create_states(trainer, kinds, reader.state["optimizer_steps"])
    else:
        zero_state.drop_states(trainer)  # a start without an optimizer, in a process that may have one already
    with torch.no_grad():
        for partition in zero_state.partitions(trainer):
            for f in partition.fragments:
                held = stage.held.of(f.name)
                before = held.start(stage.whole_shapes[f.name])
                for kind, flat in partition.states.items():
                    data = reader.shard(f.name, kind, held.shard, before + f.start, before + f.stop)
                    flat[f.offset : f.offset + f.stop - f.start].copy_(torch.from_numpy(data))
        for name, buffer in stage.persistent_buffers():
            buffer.copy_(torch.from_numpy(reader.whole(name, "buffer")))
    zero_state.publish(trainer)
    zero_state.restore_scaler(trainer, reader.state["loss_scaler"])


def _check_same_model(reader: Reader, trainer: Trainer) -> None:
    problems = []
    constants = {name: tuple(buffer.shape) for name, buffer in trainer.stage.persistent_buffers()}
    for name, shape in (trainer.stage.whole_shapes | constants).items():
        if name not in reader.tensors:
            problems.append(f"{name} is not in it")
        elif reader.shape(name) != tuple(shape):
            problems.append(f"{name} is {reader.shape(name)} there and {tuple(shape)} in the recipe")
    if problems:
        raise CheckpointError(f"{reader.folder} holds another model: " + "; ".join(problems[:5]))
