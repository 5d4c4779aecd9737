"""One way to build a trainer: each of its parts is made once."""

import pytest
import torch.distributed as dist
from transformers import LlamaForCausalLM

from recipes.common.engine import build_trainer as build_trainer_module
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.startup import device_is_bound, start_distributed
from recipes.common.pipeline import stage as stage_module
from recipes.common.pipeline.schedules import Costs
from recipes.common.recipe import SGD, Layout, RecipeError
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer


def _models_built(trial):
    built, construct = [], LlamaForCausalLM.__init__

    def counted(self, *args, **kwargs):
        built.append(self)
        construct(self, *args, **kwargs)

    LlamaForCausalLM.__init__ = counted
    trainer = build_trial_trainer(trial)
    return len(built), built[0] is trainer.stage.causal


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2), Layout(tensor=2, sequence_parallel=True)], ids=str)
def test_a_trainer_builds_its_model_once(layout):
    """A large model takes seconds to construct, even without memory."""
    world = layout.pipeline * layout.tensor
    trial = Trial(
        model=tiny_config("llama"), layout=layout, world_size=world, optimizer=SGD(lr=1.0), deepspeed=ds_config("zero1_fp32.json")
    )
    assert run_ranks(_models_built, world, trial) == [(1, True)] * world


def test_a_schedule_that_bound_groups_cannot_run_is_refused():
    """Somebody else started the process group with a device, on whose one stream a group this order deadlocks."""
    for found in run_ranks(_refusal_in_bound_groups, 4):
        assert "pipeline_schedule='zero_bubble_v' with pipeline=4 and 20 micro batches in a step would wait for ever" in found
        assert "start it without device_id" in found


def _refusal_in_bound_groups():
    build_trainer_module.device_is_bound = lambda: True
    stage_module.pass_costs = lambda *_: (Costs(1.0, 1.6, 1.0),) * 8  # as of a model whose attention costs much
    layout = Layout(pipeline=4, pipeline_schedule="zero_bubble_v")
    model = tiny_config("llama", num_hidden_layers=8)
    config = ds_config("zero1_fp32.json") | {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}
    options = {"device_type": "cpu", "seq_len": 16, "ramp": [20]}
    try:
        build_trainer(model, layout, SGD(lr=1.0), config | {"gradient_accumulation_steps": 8}, **options)
    except RecipeError as error:
        return str(error)


def test_groups_of_ours_are_not_bound():
    assert run_ranks(_bound, 2) == [False, False]


def _bound():
    start_distributed("cpu")
    dist.barrier()
    return device_is_bound()
