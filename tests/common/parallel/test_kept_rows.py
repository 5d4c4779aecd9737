"""Rows that ranks have alike are kept in parts, given back to the last bit, and gathered once for all that share them."""

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
    held = shared[0]._part.untyped_storage().nbytes()
    wanted = rows.clone()
    rows.zero_()  # what was kept is a copy
    given = [each() for each in shared]
    return {
        "shared": shared[0] is shared[1] and shared[0] is not other,
        "bytes": held,
        "equal": [each.equal(wanted) for each in given] + [other().equal(wanted[:4])],
        "gathered once": given[0] is given[1] and not shared[0].is_whole,
        "undivided": isinstance(keep(wanted[:3]), torch.Tensor),
        "parts": isinstance(keep(wanted), KeptRows),
    }


def new_rows_at_an_old_address():
    """Rows that went leave their address to others: those are not taken for them."""
    start_distributed("cpu")
    keep, found, addresses = RowKeeper(dist.new_group([0, 1])), [], set()
    for value in range(8):
        rows = torch.full((4, 2**20), float(value))
        addresses.add(rows.data_ptr())
        found.append(keep(rows))
        del rows
    return len(addresses), [each().unique().tolist() for each in found]


def test_ranks_keep_parts_and_get_the_whole_back():
    for rank in run_ranks(kept, 2):
        assert rank == {"shared": True, "bytes": 3 * 4 * 4, "equal": [True] * 3, "gathered once": True, "undivided": True,
                        "parts": True}  # fmt: skip


def test_an_address_that_is_used_again_is_not_the_same_rows():
    for addresses, values in run_ranks(new_rows_at_an_old_address, 2):
        assert addresses < 8 and values == [[float(value)] for value in range(8)]
