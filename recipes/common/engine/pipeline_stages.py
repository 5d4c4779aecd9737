"""Gives DeepSpeed's pipeline engine a stage a rank, in the place of layers that it would cut itself."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from recipes.common.engine.deepspeed_patches import share_groups
from recipes.common.pipeline.stage import Stage
from recipes.common.pipeline.tied_embeddings import TiedHead, gradient_of


class PipelineStages(PipelineModule):
    """Gives DeepSpeed's pipeline engine one stage a rank, which our executor runs, and the weights that are tied over stages."""

    def __init__(self, stage: Stage, topology: PipeModelDataParallelTopology) -> None:
        self._tied: list[tuple[torch.nn.Parameter, dist.ProcessGroup]] = []
        self.tied_head: TiedHead | None = None  # embedding and head on this rank
        # an entry for each stage; only this rank's is built
        layers = [stage] * topology.get_dim("pipe")
        with share_groups(stage.grid):
            super().__init__(layers, topology=topology, partition_method="uniform")
        if stage.stack.tied and stage.grid.tie_group is not None and (stage.is_first or stage.is_last):
            name = f"{stage.stack.embedding}.weight"
            weight = dict(stage.hf_named_parameters())[name]
            weight.ds_pipe_replicated = not stage.is_first  # norms and clipping count it once
            self._tied = [(weight, stage.grid.tie_group)]

    def get_tied_weights_and_groups(self) -> list[tuple[SimpleNamespace, dist.ProcessGroup]]:
        """Return the gradients that the engine sums over a group, once a step: `grad`, or `_hp_grad` under bf16.

        fp16 gradients add up in `grad_accum`, which the engine does not read: the copies of the weight would drift apart.
        """
        if self.tied_head is not None:
            self.tied_head.add_gradient()
        return [(SimpleNamespace(grad=gradient_of(w), _hp_grad=gradient_of(w)), group) for w, group in self._tied]

    def late_weights(self) -> list[torch.nn.Parameter]:
        """Return the weights whose gradients change after the passes of a step, by the sums above."""
        return [weight for weight, _ in self._tied] + ([] if self.tied_head is None else [self.tied_head.weight])
