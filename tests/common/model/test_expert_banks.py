"""A deferred gradient of a bank of experts is the one that autograd computes at once, to the last bit."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from recipes.common.model.expert_banks import defer_bank_gradients
from recipes.common.model.linears import deferrable_fraction
from recipes.common.model.weight_grad_store import WeightGradStore
from tools.common.forked_ranks import run_ranks

KINDS = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}  # [experts, out, in]; [experts, in, out], with biases


@pytest.mark.parametrize("family", KINDS)
def test_gradients(family):
    assert run_ranks(_compared, 1, family) == [([True] * 6, [True] * 2, family == "mixtral")]


def _compared(family):
    """[of each parameter and the input, after two micro batches, equal], [banks wait], whether all that is in it is deferred."""
    config = AutoConfig.for_model(family, hidden_size=16, intermediate_size=32, num_local_experts=4)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    plain, deferred, store = KINDS[family](config), KINDS[family](config), WeightGradStore()
    for parameter, other in zip(plain.parameters(), deferred.parameters(), strict=True):
        other.data.copy_(parameter.data.normal_())
    defer_bank_gradients(deferred, store)
    equal, waiting = [], []
    for index in (torch.tensor([[0, 1], [3, 0], [1, 3]]), torch.tensor([[2, 1]])):
        tokens, weights = torch.randn(len(index), 16), torch.rand(index.shape)
        inputs = [tokens.clone().requires_grad_() for _ in range(2)]
        store.begin()
        outs = [experts(x, index, weights) for experts, x in zip((plain, deferred), inputs, strict=True)]
        before = [bank.grad is None or bank.grad.clone() for bank in deferred.parameters() if bank.ndim == 3]
        for out in outs:
            out.square().sum().backward()
        after = [bank.grad is None or bank.grad for bank in deferred.parameters() if bank.ndim == 3]
        waiting.append(all(a is b or a.equal(b) for a, b in zip(before, after, strict=True)))
        store.compute_oldest()
        equal += [outs[0].equal(outs[1]), inputs[0].grad.equal(inputs[1].grad)]
        equal.append(all(a.grad.equal(b.grad) for a, b in zip(plain.parameters(), deferred.parameters(), strict=True)))
    return equal, waiting, deferrable_fraction(deferred) == 1.0
