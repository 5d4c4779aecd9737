"""Updated weights are gathered beside what runs before they are used, and each module has its own when it runs."""

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.weight_gathers import Flat, WeightGathers, wait_in_stage
from tools.common.forked_ranks import run_ranks


class _Stage(nn.Module):
    """Two layers between an embedding and a head that share a weight."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        self.after.weight = self.before.weight


def _stepped(beside):
    """Which weights are under way after each module, and the sum of every weight that it ran with."""
    start_distributed("cpu")
    stage, rank, flats = _Stage(), dist.get_rank(), []
    for number, parameter in enumerate(stage.parameters()):
        whole = parameter.data.view(-1)
        own = whole[2 * rank : 2 * rank + 2]
        flats.append(Flat(whole=whole, own=own, group=dist.group.WORLD, parameters=(parameter,)))
        whole.zero_()
        own.fill_(1.0 + number + 10 * rank)
    gathers = WeightGathers(flats)
    wait_in_stage(gathers, stage, [stage.before], list(stage.layers), [stage.after])
    gathers.beside_next_step = beside
    gathers.start()
    seen = [sorted(gathers._works)]
    stage.forward = lambda x: x
    for module in (stage, stage.before, *stage.layers, stage.after):
        module(torch.zeros(1, 2))
        seen.append(sorted(gathers._works))
    return seen, [flat.whole.sum().item() for flat in flats]


def test_each_module_waits_for_its_own_weights():
    sums = [24.0, 28.0, 32.0]
    assert run_ranks(_stepped, 2, True) == [([[0, 1, 2], [1, 2], [1, 2], [2], [], []], sums)] * 2


def test_without_a_step_to_come_all_weights_are_there_at_once():
    assert run_ranks(_stepped, 2, False) == [([[]] * 6, [24.0, 28.0, 32.0])] * 2
