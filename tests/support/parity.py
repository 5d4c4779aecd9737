"""Makes trials of tiny models, and compares a layout with plain one-process transformers."""

from typing import Any

import pytest
from transformers import PreTrainedConfig

from recipes.common.recipe import AdamW, Layout
from tests.support.tiny import ds_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Outcome, Trial, outcome, train_in_layout, train_plain

ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)  # eps above rounding, so that near-zero gradients do not become whole steps
LOSS_BOUND, TENSOR_BOUND = 1e-6, 1e-5
OPTIONS = (
    "recompute",
    "recompute_every",
    "sequence_parallel",
    "context",
    "context_heads",
    "offload_activations",
    "mlp_chunk_tokens",
    "experts",
    "expert",
    "pipeline_schedule",
    "chunks",
    "layers_per_stage",
)


def trial_of(config: PreTrainedConfig, pipeline: int, tensor: int, data: int, **fields: Any) -> Trial:
    options = {name: fields.pop(name) for name in OPTIONS if name in fields}
    # two steps: the second one's numbers depend on all that the first one left
    defaults = {"optimizer": ADAMW, "deepspeed": ds_config("zero1_fp32.json"), "global_seqs": 4, "steps": 2}
    return Trial(
        model=config,
        layout=Layout(pipeline=pipeline, tensor=tensor, **options),
        world_size=pipeline * tensor * data,
        **(defaults | fields),
    )


def both(trial: Trial) -> tuple[Outcome, Outcome]:
    plain = run_ranks(train_plain, 1, trial)[0]
    shapes = {name: tensor.shape for name, tensor in plain.parameters.items()}
    return outcome(run_ranks(train_in_layout, trial.world_size, trial), shapes), plain


def assert_equal(trial: Trial, *, loss: float = LOSS_BOUND, tensor: float = TENSOR_BOUND) -> Outcome:
    """Hold a layout to the oracle, whose outcome is returned."""
    trained, plain = both(trial)
    assert trained.losses == pytest.approx(plain.losses, rel=loss)
    assert trained.grad_norms[0] == pytest.approx(plain.grad_norms[0], rel=LOSS_BOUND)
    assert trained.grad_norms == pytest.approx(plain.grad_norms, rel=2e-5)  # of weights that Adam has moved apart by rounding
    assert trained.parameters.keys() == plain.parameters.keys()
    assert trained.buffers.keys() == plain.buffers.keys()
    assert all(trained.buffers[name].equal(wanted) for name, wanted in plain.buffers.items())
    for name, wanted in plain.parameters.items():
        difference = (trained.parameters[name] - wanted).abs().max().item()
        assert difference <= tensor, f"{name} differs by {difference:.1e}"
    return plain
