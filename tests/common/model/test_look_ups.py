"""What a look-up adds to its weight's sum, row by row, is the gradient that autograd computes of the whole table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recipes.common.model.look_ups import add_rows_read
from recipes.common.model.main_grads import give_main_grad
from tools.common.forked_ranks import run_ranks


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


def sums(make, dtype, by_rows):
    """The sum of two micro batches' gradients, in which ids come several times, and how often the weight's hook was told."""
    torch.manual_seed(0)
    module, told = make().to(dtype), []
    total = torch.zeros(11, 6)

    def hook(weight):
        told.append(weight.grad is None)
        if weight.grad is not None:
            total.add_(weight.grad)
            weight.grad = None

    module.weight.register_post_accumulate_grad_hook(hook)
    if by_rows:
        add_rows_read(module)
        give_main_grad(module.weight, total, lambda: False)
    for _ in range(2):
        ids, factors = torch.randint(0, 11, (2, 20)), torch.randn(2, 20, 6, dtype=dtype)
        (module(ids) * factors).sum().backward()
    with torch.no_grad():
        found = module(ids)
    return total, told, found


MAKERS = {
    "plain": lambda: nn.Embedding(11, 6),
    "padding": lambda: nn.Embedding(11, 6, padding_idx=4),
    "scaled": lambda: Scaled(11, 6),
    "by frequency": lambda: nn.Embedding(11, 6, scale_grad_by_freq=True),  # left to autograd
}


def compared(kind, dtype):
    (wanted, _, values), (found, told, same) = (sums(MAKERS[kind], dtype, by_rows) for by_rows in (False, True))
    return ((found - wanted).abs().max() / wanted.abs().max()).item(), told, values.equal(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKERS)
def test_rows_are_added(kind, dtype):
    off, told, same = run_ranks(compared, 1, kind, dtype)[0]
    assert off <= (1e-6 if dtype == torch.float32 else 1e-2) and same
    assert told == [kind != "by frequency"] * 2


def outside_a_sum():
    module = nn.Embedding(11, 6)
    add_rows_read(module)
    ids = torch.randint(0, 11, (4,))
    out = module(ids)
    out.sum().backward()
    return out.equal(F.embedding(ids, module.weight)) and module.weight.grad is not None


def test_a_weight_without_a_sum_is_autograds():
    assert run_ranks(outside_a_sum, 1) == [True]
