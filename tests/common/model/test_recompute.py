"""A recomputed layer gives the same bits, and runs again no more than it is asked to."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from recipes.common.model.recompute import product_ops
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count, self.kept = Counter(), product_ops()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count["product" if op in self.kept else "other"] += 1
        return op(*args, **(kwargs or {}))


def step(family, attention, options):
    torch.manual_seed(0)
    config = (
        shrink(AutoConfig.for_model(family, attention_dropout=0.0), Layout()) if family in OVERWRITING else tiny_config(family)
    )
    stage = build_stage(plan_model(config, attention=attention), one_process(), Layout(**options), seq_len=16).train()
    ids = torch.arange(3, 35).view(2, 16)
    with CountProducts() as seen:
        hidden = stage(ids)
    forward = seen.count["product"]
    with CountProducts() as seen:
        hidden.square().mean().backward()
    return hidden.detach(), [p.grad for p in stage.parameters()], forward, seen.count["product"], seen.count["other"]


def compare(family, attention):
    plain, again, kept = (step(family, attention, options) for options in ({}, {"recompute": "full"}, {"recompute": "selective"}))
    equal = [
        a is b is None or a.equal(b)
        for other in (again, kept)
        for a, b in zip([plain[0], *plain[1]], [other[0], *other[1]], strict=True)
    ]
    return all(equal), [each[2] for each in (plain, again, kept)], [each[3:] for each in (plain, again, kept)]


# families that add in place to what a product gave: seen as it is, and through a view, where torch's own keeps what is written
OVERWRITING = ("gpt_oss", "falcon")
CASES = [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("mixtral", "sdpa"), *((each, "eager") for each in OVERWRITING)]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_products_that_are_kept_are_not_computed_again(family, attention):
    equal, forward, backward = run_ranks(compare, 1, family, attention)[0]
    assert equal
    assert forward[0] == forward[1] == forward[2] > 0
    (plain, others), (again, _), (kept, others_kept) = backward
    assert plain < again  # whole layers ran again
    assert kept == plain  # no product did
    assert others < others_kept  # but what lies between them
