"""One way to build a trainer: each of its parts is made once."""

import pytest
from transformers import LlamaForCausalLM

from recipes.common.recipe import SGD, Layout
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
