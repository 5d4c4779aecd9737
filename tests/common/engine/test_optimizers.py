"""Our AdamW is torch's, to bits that do not depend on where in a flat partition an element lies."""

import pytest
import torch

from recipes.common.engine import trainer
from recipes.common.engine.optimizers import WholeUnitsAdamW, _cut, build_optimizer
from recipes.common.recipe import SGD, AdamW
from tests.support.parity import trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import build_trial_trainer

RATES = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LENGTH, STEPS = 1000, 4


def trained(pieces, kind, **fields):
    """The weights and moments after some steps, when the elements lie in `pieces` of these lengths."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(LENGTH, generator=generator)
    parts = [torch.nn.Parameter(part.clone()) for part in weights.split(pieces)]
    optimizer = kind(parts, **RATES, **fields)
    for _ in range(STEPS):
        for part, gradient in zip(parts, torch.randn(LENGTH, generator=generator).split(pieces), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
    states = [optimizer.state[part] for part in parts]
    assert all(state["step"].item() == STEPS for state in states)
    return [torch.cat(parts).detach(), *(torch.cat([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))]


def compare():
    whole = trained([LENGTH], WholeUnitsAdamW, fused=True)
    plain = trained([LENGTH], torch.optim.AdamW)
    cuts = [trained(pieces, WholeUnitsAdamW, fused=True) for pieces in ([16, 984], [1, 999], [333, 3, 664], [7] * 142 + [6])]
    drift = max(((a - b).abs() / b.abs().clamp(min=1e-3)).max().item() for a, b in zip(whole, plain, strict=True))
    return drift, [all(a.equal(b) for a, b in zip(whole, cut, strict=True)) for cut in cuts]


def test_elements_are_updated_alike_wherever_they_lie():
    drift, equal = run_ranks(compare, 1)[0]
    assert drift < 1e-5
    assert equal == [True] * 4


def kinds():
    found = []
    for each, device, offload in (
        (AdamW(lr=1e-3), "cpu", False),
        (AdamW(lr=1e-3), "cuda", False),
        (AdamW(lr=1e-3), "cuda", True),
        (SGD(lr=1e-3), "cpu", False),
    ):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(3))], "weight_decay": 0.0}]
        found.append(type(build_optimizer(groups, each, torch.device(device), offload=offload)).__name__)
    return found


def test_the_recipes_optimizer_is_built():
    assert run_ranks(kinds, 1)[0] == ["WholeUnitsAdamW", "AdamW", "WholeUnitsAdamW", "SGD"]


def asked_for(name):
    """What a trainer of this ds_config says of offload."""
    asked = []
    trainer.build_optimizer = lambda *args, offload: asked.append(offload) or build_optimizer(*args, offload=offload)
    build_trial_trainer(trial_of(tiny_config("llama", num_hidden_layers=1), 1, 1, 1, deepspeed=ds_config(name)))
    return asked


@pytest.mark.parametrize(("name", "offload"), [("zero3_offload_bf16.json", True), ("zero3_bf16.json", False)])
def test_states_in_host_memory_are_updated_there(name, offload):
    assert run_ranks(asked_for, 1, name) == [[offload]]


def without_gradient():
    frozen, moving = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    moving.grad = torch.ones(5)
    optimizer = WholeUnitsAdamW([frozen, moving], **RATES, fused=True)
    optimizer.step()
    return frozen.tolist(), moving.tolist(), len(optimizer.state)


def test_what_has_no_gradient_stays():
    frozen, moving, states = run_ranks(without_gradient, 1)[0]
    assert frozen == [1.0] * 5 and states == 1
    assert moving == pytest.approx([1.0 - 3e-3 * 0.1 - 3e-3] * 5)


@pytest.mark.parametrize(
    "bucket, sizes",
    [
        (None, [[40, 40, 40, 40, 1, 40]]),  # one group a kind
        (80, [[40], [40, 40], [40, 1], [40]]),  # full, and at each chunk's end
        (700, [[40, 40, 40], [40, 1, 40]]),  # the last chunk's 40 are less than a 16th: they go with the next
        (1600, [[40, 40, 40, 40, 1, 40]]),
    ],
)
def test_a_bucket_ends_where_it_is_full_or_a_good_part_of_it_and_a_chunk_ends(bucket, sizes):
    parameters = [torch.nn.Parameter(torch.empty(size)) for size in (40, 40, 40, 40, 1, 40)]
    chunks = [set(parameters[:3]), set(parameters[3:5]), set(parameters[5:])]
    found = _cut(parameters, bucket, chunks)
    assert [p for part in found for p in part] == parameters
    assert [[p.numel() for p in part] for part in found] == sizes
