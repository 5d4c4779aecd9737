"""Rows that ranks have alike are kept in parts, given back to the last bit, and gathered once for all that share them."""

import numpy as np
import torch
import torch.distributed as dist

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.kept_rows import KeptRows, RowKeeper
from tools.common.forked_ranks import run_ranks


def kept():
    start_distributed("cpu")
    keep = RowKeeper(dist.new_group([0, 1]))
    rows = torch.arange(24.0).view(6, 4)
    shared = [keep(rows), keep(rows.view(2, 3, 4).view(6, 4))]
    other = keep(rows[:4])
    held = shared[0].part.untyped_storage().nbytes()
    wanted = rows.clone()
    rows.zero_()  # what was kept is a copy
    given = [each() for each in shared]
    return {
        "shared": shared[0] is shared[1] and shared[0] is not other,
        "bytes": held,
        "equal": [each.equal(wanted) for each in given] + [other().equal(wanted[:4])],
        "gathered once": given[0].data_ptr() == given[1].data_ptr() and not shared[0].is_whole,
        "undivided": isinstance(keep(wanted[:3]), torch.Tensor),
        "parts": isinstance(keep(wanted), KeptRows),
    }


def other_rows_of_the_same_storage():
    """What is written where rows were is not taken for them once they are gone."""
    start_distributed("cpu")
    keep, memory = RowKeeper(dist.new_group([0, 1])), np.empty((4, 3), np.float32)
    found = []
    for value in (1.0, 2.0):
        memory[:] = value
        rows = torch.from_numpy(memory)  # a storage of its own at the same address
        found.append((rows.data_ptr(), keep(rows)))
        del rows
    return found[0][0] == found[1][0], [kept().unique().tolist() for _, kept in found]


def test_ranks_keep_parts_and_get_the_whole_back():
    for rank in run_ranks(kept, 2):
        assert rank == {"shared": True, "bytes": 3 * 4 * 4, "equal": [True] * 3, "gathered once": True, "undivided": True,
                        "parts": True}  # fmt: skip


def test_an_address_that_is_used_again_is_not_the_same_rows():
    for same_address, values in run_ranks(other_rows_of_the_same_storage, 2):
        assert same_address and values == [[1.0], [2.0]]
