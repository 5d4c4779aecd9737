"""Routers are found by what families declare of them, and compute in fp32 where that is asked."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.common.model import routers
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.linears import route_products
from recipes.common.model.recompute import recompute
from recipes.common.model.routers import compute_in_fp32, find_routers, plan_routers, weighs_by_sigmoid, weighs_choices
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout, Router
from tests.support.parity import trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial, train_in_layout


@pytest.mark.parametrize(
    ("family", "found", "bias"),
    [
        ("llama", {}, None),
        ("mixtral", {f"model.layers.{i}.mlp.gate": (i, 0) for i in range(4)}, None),
        ("deepseek_v3", {f"model.layers.{i}.mlp.gate": (i, 0) for i in (1, 2, 3)},
         "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("afmoe", {f"model.layers.{i}.mlp.router": (i, 0) for i in (1, 2, 3)}, "model.layers.1.mlp.expert_bias"),
        ("ernie4_5_moe", {f"model.layers.{i}.mlp.gate": (i, 0) for i in (1, 2, 3)},
         "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"),
        ("llama4_text", {"model.layers.0.feed_forward.router": (0, 1)}, None),
    ],
)  # fmt: skip
def test_routers_and_their_biases(family, found, bias):
    causal = build_empty(shrink(AutoConfig.for_model(family), Layout()), "eager")
    stack = find_stack(causal)
    assert find_routers(causal, stack) == found
    plan = plan_routers(causal, stack, Router(coefficient=0.1))
    assert [router.name for router in plan.routers] == list(found)
    if found:
        assert plan.routers[0].bias == bias and plan.experts == 4


@pytest.mark.parametrize(("family", "experts"), [("zaya", 5), ("longcat_flash", 4 + 2)])
def test_experts_that_compute_nothing_may_be_chosen_too(family, experts):
    causal = build_empty(shrink(AutoConfig.for_model(family), Layout()), "eager")
    assert plan_routers(causal, find_stack(causal), Router(coefficient=0.1)).experts == experts
    with pytest.raises(PlanError, match="has no bias of its 4 experts"):  # what they compute is not balanced by a bias
        plan_routers(causal, find_stack(causal), Router(coefficient=0.1, bias_rate=0.1))


def test_one_router_whose_bias_is_of_other_experts_is_enough_to_refuse():
    causal = build_empty(shrink(AutoConfig.for_model("deepseek_v3"), Layout()), "eager")
    stack, asked = find_stack(causal), Router(coefficient=0.1, bias_rate=0.1)
    assert plan_routers(causal, stack, asked).bias_rate == 0.1
    causal.model.layers[2].mlp.gate.register_buffer("e_score_correction_bias", torch.zeros(5))
    with pytest.raises(PlanError, match="has no bias of its 4 experts"):
        plan_routers(causal, stack, asked)


@pytest.mark.parametrize("lacking", ["_EXPERTS", "_CHOSEN"])
def test_a_family_that_does_not_say_how_many_experts_there_are_or_are_chosen_is_refused(monkeypatch, lacking):
    causal = build_empty(tiny_config("mixtral"), "eager")
    monkeypatch.setattr(routers, lacking, ("of_no_family",))
    with pytest.raises(PlanError, match="says how many experts there are and are chosen"):
        plan_routers(causal, find_stack(causal), Router(coefficient=0.1))
    assert plan_routers(causal, find_stack(causal), Router(loss=None)).routers == ()


def test_a_loss_of_another_definition_is_refused():
    config = AutoConfig.for_model("doge", is_moe=True, num_experts=16, num_experts_per_tok=4, hidden_size=64, num_hidden_layers=2)
    causal = build_empty(config, "eager")
    stack = find_stack(causal)
    with pytest.raises(PlanError, match=r"^model_type=doge defines a router loss of its own.*Router\(loss=None\)"):
        plan_routers(causal, stack, Router())
    assert not plan_routers(causal, stack, Router(loss=None)).balances


def _in_fp32(family):
    """Return, in bf16, (largest error of the logits, types, gradient's error) of a router with and without fp32."""
    config = shrink(AutoConfig.for_model(family), Layout())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    route_products(model)
    name, (_, place) = next(iter(find_routers(model, find_stack(model)).items()))
    router, results = model.get_submodule(name), []
    weight = next(p for p in router.parameters() if p.ndim == 2)
    torch.nn.init.normal_(weight)
    hidden = torch.randn(2, 9, config.hidden_size, dtype=torch.bfloat16)
    wanted = F.linear(hidden.float(), weight.detach().float()).view(18, -1)
    exact = weight.detach().float().requires_grad_()
    F.linear(hidden.float(), exact).square().sum().backward()
    for fp32 in (False, True):
        if fp32:
            compute_in_fp32(router, place)
        out = router(hidden)
        weight.grad = None
        out[place].float().square().sum().backward()
        error = (weight.grad.float() - exact.grad).abs().max() / exact.grad.abs().max()
        results.append(((out[place].view(18, -1).float() - wanted).abs().max().item(), [o.dtype for o in out], error.item()))
        assert type(weight) is torch.nn.Parameter and weight is next(p for p in router.parameters() if p.ndim == 2)
    return results


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_in_fp32(family):
    (low_error, low_types, _), (error, types, gradient_error) = run_ranks(_in_fp32, 1, family)[0]
    assert error < 1e-5 < low_error
    assert types == [torch.float32, *low_types[1:]] and low_types[0] == torch.bfloat16
    assert gradient_error < 2**-7  # a weight's gradient is rounded to its own bf16


class _Scored(torch.nn.Module):
    """A router that starts at zero, in bf16, and weighs its choices by `score`."""

    def __init__(self, score, *, normed=True, chosen=4, dense=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.bfloat16))
        self.score, self.normed, self.chosen, self.dense = score, normed, chosen, dense

    def forward(self, hidden, *, bias):
        logits = F.linear(hidden.view(-1, 32), self.weight)
        scores = self.score(logits.float())
        chosen = (scores + bias).topk(self.chosen).indices
        weights = scores.gather(1, chosen)
        if self.dense:  # Llama 4's
            return logits, torch.zeros_like(scores).scatter(1, chosen, weights).bfloat16()
        return logits, (weights / weights.sum(-1, keepdim=True) if self.normed else 2.5 * weights).bfloat16(), chosen


def _told():
    def softmax(logits):
        return logits.softmax(-1)

    def root(logits):  # DeepSeek-V4's
        return F.softplus(logits).sqrt()

    call = (torch.zeros(2, 1, 32, dtype=torch.bfloat16),), {"bias": torch.arange(16) / 16}
    routers = [_Scored(torch.sigmoid), _Scored(torch.sigmoid, normed=False), _Scored(softmax), _Scored(root)]
    routers += [_Scored(torch.sigmoid, normed=False, chosen=1), _Scored(softmax, normed=False, chosen=1)]
    routers += [_Scored(torch.sigmoid, normed=False, chosen=1, dense=True), _Scored(softmax, normed=False, dense=True)]
    before = torch.get_rng_state()
    found = [weighs_by_sigmoid(router, 0, *call) for router in routers]
    assert before.equal(torch.get_rng_state()) and not any(router.weight.count_nonzero() for router in routers)
    assert all(weighs_choices(router(*call[0], **call[1]), 0) for router in routers)
    assert not weighs_choices((torch.zeros(2, 16),), 0)
    return found


def test_what_weighs_the_choices_of_a_router_that_starts_at_zero():
    assert run_ranks(_told, 1)[0] == [True, True, False, False, True, False, True, False]


def _recomputed(keep_products):
    """Return the gradient of a router in fp32, in a layer that is recomputed or (None) not, and of a linear after it."""
    torch.manual_seed(0)
    linears = [torch.nn.Linear(32, 32, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    layer = torch.nn.Sequential(*linears, torch.nn.Tanh())
    compute_in_fp32(layer[0], 0)
    layer[0].register_forward_hook(lambda module, args, output: output.bfloat16())
    if keep_products is not None:
        recompute(layer, keep_products=keep_products)
    layer(torch.randn(5, 32, dtype=torch.bfloat16).requires_grad_()).float().square().sum().backward()
    return [linear.weight.grad for linear in linears]


def test_a_router_in_fp32_is_recomputed():
    plain = run_ranks(_recomputed, 1, None)[0]
    for keep_products in (False, True):
        assert all(map(torch.equal, run_ranks(_recomputed, 1, keep_products)[0], plain)), keep_products


def test_a_bf16_run_with_routers_in_fp32():
    options = {"deepspeed": ds_config("zero1_bf16.json"), "pipeline_schedule": "zero_bubble", "recompute": "full"}
    losses = []
    for fp32 in (False, True):
        router = Router(coefficient=0.5, fp32=fp32)
        trial = gradient_trial(trial_of(tiny_config("mixtral"), 2, 1, 1, global_seqs=2, router=router, **options))
        losses.append(run_ranks(train_in_layout, 2, trial)[0]["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0] != losses[1]
