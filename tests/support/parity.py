"""Makes trials of tiny models, and compares a layout with plain one-process transformers."""

import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import pytest
from transformers import PreTrainedConfig

from recipes.common.recipe import AdamW, Layout
from tests.support.tiny import ds_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Outcome, Trial, outcome, train_in_layout, train_plain

ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)  # eps above rounding, so that near-zero gradients do not become whole steps
Name = TypeVar("Name", bound=Hashable)
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
    return both_of_each({"": trial})[""]


def both_of_each(trials: Mapping[Name, Trial], prepare: Callable[[], None] | None = None) -> dict[Name, tuple[Outcome, Outcome]]:
    """Train each trial in its layout and by the oracle; those of as many ranks one after the other, in one start of ranks.

    prepare: what each of these ranks does first.
    """
    found = {}
    for world_size in sorted({trial.world_size for trial in trials.values()}):
        some = [name for name, trial in trials.items() if trial.world_size == world_size]
        ranks = run_ranks(_train_each, world_size, [trials[name] for name in some], prepare)
        for index, name in enumerate(some):
            plain = ranks[index % world_size][0][index]
            shapes = {parameter: tensor.shape for parameter, tensor in plain.parameters.items()}
            found[name] = outcome([trained[index] for _, trained in ranks], shapes), plain
    return found


def _train_each(trials: list[Trial], prepare: Callable[[], None] | None) -> tuple[dict[int, Outcome], list[dict[str, Any]]]:
    """Return the oracle's outcomes that this rank computes, by trial, and what it holds of each trial in its layout."""
    if prepare is not None:
        prepare()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # first: no layout has trained in this process yet
    plain = {index: train_plain(trials[index]) for index in range(rank, len(trials), world_size)}
    return plain, [train_in_layout(trial) for trial in trials]


def assert_equal(trial: Trial, *, loss: float = LOSS_BOUND, tensor: float = TENSOR_BOUND) -> Outcome:
    """Hold a layout to the oracle, whose outcome is returned."""
    trained, plain = both(trial)
    assert_same(trained, plain, loss=loss, tensor=tensor)
    return plain


def assert_same(trained: Outcome, plain: Outcome, *, loss: float = LOSS_BOUND, tensor: float = TENSOR_BOUND) -> None:
    """Hold what a layout trained to what the oracle did."""
    assert trained.losses == pytest.approx(plain.losses, rel=loss)
    assert trained.grad_norms[0] == pytest.approx(plain.grad_norms[0], rel=LOSS_BOUND)
    assert trained.grad_norms == pytest.approx(plain.grad_norms, rel=2e-5)  # of weights that Adam has moved apart by rounding
    assert trained.parameters.keys() == plain.parameters.keys()
    assert trained.buffers.keys() == plain.buffers.keys()
    assert all(trained.buffers[name].equal(wanted) for name, wanted in plain.buffers.items())
    for name, wanted in plain.parameters.items():
        difference = (trained.parameters[name] - wanted).abs().max().item()
        assert difference <= tensor, f"{name} differs by {difference:.1e}"
