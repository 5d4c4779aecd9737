"""Tensors among the arguments of a layer, in dicts and tuples, are found and exchanged; what the base model keeps, with them."""

import torch

from recipes.common.pipeline.places import leaf, leaves, put
from tools.common.forked_ranks import run_ranks


def _exchanged():
    kept, stream = torch.zeros(2, 3), torch.zeros(2)
    shared = {"kv": (torch.zeros(1), torch.zeros(1))}
    args, kwargs = (kept, None), {"shared": shared, "mask": stream, "same": stream[:1]}
    assert [path for path, _ in leaves(args, kwargs)] == [
        (0,),
        (1,),
        ("shared", "kv", 0),
        ("shared", "kv", 1),
        ("mask",),
        ("same",),
    ]
    value = torch.ones(2, 3, requires_grad=True)
    args, kwargs = put(args, kwargs, (0,), value)
    assert args[0] is kept and kept.eq(1).all() and kept.requires_grad  # overwritten: its gradient is the value's
    args, kwargs = put(args, kwargs, ("shared", "new", 1), torch.ones(4))
    assert shared["new"][0] is None and leaf(args, kwargs, ("shared", "new", 1)).shape == (4,)  # in the dict that others hold
    args, kwargs = put(args, kwargs, ("mask",), torch.ones(2))
    assert kwargs["mask"].eq(1).all() and stream.eq(0).all()  # another argument has the same memory: not overwritten
    args, kwargs = put(args, kwargs, (1,), torch.ones(1))
    assert args[1].eq(1) and leaf(args, kwargs, ("shared", "none", 0)) is None
    wide = torch.zeros(1).expand(5)
    args, _ = put((wide,), {}, (0,), torch.ones(5))
    assert args[0] is not wide and wide.eq(0).all()
    return True


def test_values_are_put_where_they_belong():
    assert run_ranks(_exchanged, 1) == [True]
