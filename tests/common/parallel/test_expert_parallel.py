"""Experts spread over data ranks train what one process of plain transformers trains, however their tokens are spread."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.expert_parallel import spread_experts
from recipes.common.parallel.experts import CALLED
from recipes.common.parallel.grid import build_grid
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout, Router
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.parity import assert_same, both_of_each, trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial

GLOBAL, SEQUENCE = Router(loss="global_batch", coefficient=0.1), Router(loss="sequence", coefficient=0.1, z_loss=1e-2)
# pipeline, tensor, data, and what else: each option once or twice, beside another one of the others each time
LAYOUTS = {
    "sliced by tensor ranks": (1, 2, 2, {"expert": 2, "recompute": "full"}),
    "whole on tensor ranks": (1, 2, 2, {"expert": 2, "experts": "tensor", "router": GLOBAL}),
    "with context ranks": (1, 1, 4, {"expert": 4, "context": 2, "mlp_chunk_tokens": 5}),
    "zero bubbles": (2, 1, 2, {"expert": 2, "pipeline_schedule": "zero_bubble", "router": SEQUENCE}),
    "folded": (2, 1, 2, {"expert": 2, "pipeline_schedule": "zero_bubble_v", "recompute": "selective"}),
}


def layout_trial(name):
    pipeline, tensor, data, fields = LAYOUTS[name]
    readers, layers = data // fields.get("context", 1), 4 if name == "folded" else 2
    config = tiny_config("mixtral", num_hidden_layers=layers)
    return trial_of(config, pipeline, tensor, data, global_seqs=2 * readers, **fields)


def family_trial(family):
    """Biases of experts; a stage without any; shared experts, and biases of routers that move."""
    if family == "qwen3_moe":
        config = tiny_config(family, num_experts=4, mlp_only_layers=[0, 1], moe_intermediate_size=48)
        return trial_of(config, 2, 1, 2, expert=2, global_seqs=4)
    config = shrink(AutoConfig.for_model(family, attention_dropout=0.0), Layout(expert=2))
    fields = {"router": Router(loss=None, bias_rate=0.01)} if family == "deepseek_v3" else {}
    return trial_of(config, 1, 1, 2, expert=2, global_seqs=4, **fields)


FAMILIES = ("gpt_oss", "qwen3_moe", "deepseek_v3")
TWO_STEPS = ("sliced by tensor ranks", "zero bubbles", "deepseek_v3")  # whose biases show from the second step on
TRIALS = {name: layout_trial(name) for name in LAYOUTS} | {family: family_trial(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def trained():
    """(name, steps) -> (what the layout left, what the oracle left)."""
    gradients = {(name, 1): gradient_trial(trial) for name, trial in TRIALS.items()}
    return both_of_each(gradients | {(name, 2): TRIALS[name] for name in TWO_STEPS})


@pytest.mark.parametrize("name", TRIALS)
def test_gradients_of_layouts_and_families(trained, name):
    assert_same(*trained[name, 1])


@pytest.mark.parametrize("name", TWO_STEPS)
def test_two_steps_of_adamw(trained, name):
    assert_same(*trained[name, 2])


def test_half_precision_tracks_fp32():
    """As in tests/test_parity.py and test_fp16.py; a norm that counted experts once a rank would be off by more."""
    config, fields = tiny_config("mixtral", num_hidden_layers=2), {"expert": 2, "global_seqs": 4}
    trials = {
        "bf16": trial_of(config, 1, 1, 4, deepspeed=ds_config("zero1_bf16.json"), **fields),
        "fp16": trial_of(config, 1, 2, 2, deepspeed=fp16_config(initial_scale_power=12), **fields),
    }
    for name, (found, plain) in both_of_each(trials, allow_fp16).items():
        assert found.skipped == [False] * trials[name].steps
        assert found.losses == pytest.approx(plain.losses, rel=5e-4)
        assert found.grad_norms == pytest.approx(plain.grad_norms, rel=2e-2)
        worst = max((found.parameters[n] - p).abs().max().item() for n, p in plain.parameters.items())
        assert worst <= 2 * trials[name].steps * trials[name].optimizer.lr


EXPERTS, TOKENS, CHOSEN = 8, 12, 2
LOADS = {
    "as they come": lambda index, rank: index,
    "one expert has no token": lambda index, rank: torch.where(index == 5, 6, index),
    "two ranks have no token": lambda index, rank: index % 4,
    "all tokens go to one": lambda index, rank: torch.full_like(index, 3),
    "one rank sends nothing": lambda index, rank: torch.full_like(index, EXPERTS) if rank == 1 else index,
    "nothing travels": lambda index, rank: torch.full_like(index, EXPERTS),
}


def test_any_load():
    """Values, and gradients of tokens, weights and experts, against all experts on one rank."""
    for differences in run_ranks(_any_load, 4):
        assert differences.keys() == LOADS.keys()
        for name, difference in differences.items():
            assert difference < 1e-6, name


def _any_load():
    device = start_distributed("cpu")
    grid = build_grid(Layout(expert=4), device)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=EXPERTS)
    config._experts_implementation = "grouped_mm"
    return {name: _difference(config, grid, load) for name, load in LOADS.items()}


def _difference(config, grid, load):
    """The largest, on this rank, as a part of the largest value: the experts' gradients are of all ranks' tokens."""
    generator = torch.Generator().manual_seed(3)
    whole, own = MixtralExperts(config), MixtralExperts(config)
    whole._is_expert_parallel = True  # here too an index may be beyond the experts
    part = slice(grid.expert_rank * EXPERTS // grid.expert, (grid.expert_rank + 1) * EXPERTS // grid.expert)
    for (leaf, parameter), _ in zip(whole.named_parameters(), own.parameters(), strict=True):
        parameter.data.normal_(generator=generator).mul_(0.1)
        own._parameters[leaf] = torch.nn.Parameter(parameter.data[part].clone())
    spread_experts(torch.nn.ModuleDict({"experts": own}), {"experts": CALLED}, grid)
    inputs = []
    for rank in range(grid.expert):
        tokens, weights = torch.randn(TOKENS, 16, generator=generator), torch.rand(TOKENS, CHOSEN, generator=generator)
        index = torch.rand(TOKENS, EXPERTS, generator=generator).topk(CHOSEN).indices
        inputs.append((tokens, load(index, rank), weights))
    scales = [torch.randn(TOKENS, 16, generator=generator) for _ in inputs]
    found, wanted = [], []
    for rank, ((tokens, index, weights), scale) in enumerate(zip(inputs, scales, strict=True)):
        leaves = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        out = whole(leaves[0], index, leaves[1])
        (out * scale).sum().backward()
        if rank == grid.rank:
            wanted = [out, *(leaf.grad for leaf in leaves)]
            mine = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
            here = own(hidden_states=mine[0], top_k_index=index, top_k_weights=mine[1])
            (here * scale).sum().backward()
            found = [here, *(leaf.grad for leaf in mine)]
    dist.barrier()
    found += [parameter.grad for parameter in own.parameters()]
    wanted += [parameter.grad[part] for parameter in whole.parameters()]
    return max((a - b).abs().max().item() / max(b.abs().max().item(), 1.0) for a, b in zip(found, wanted, strict=True))
