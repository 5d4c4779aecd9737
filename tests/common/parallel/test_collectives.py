"""The moves of tensor parallelism, forward and backward, against the same function on one process by torch's autograd."""

import pytest
import torch
import torch.distributed as dist

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.collectives import all_reduce, copy_to, gather_from, reduce_from, split_to
from tools.common.forked_ranks import run_ranks

WIDTH, ROWS = 12, 5


def tensors(size, count):
    """`count` [ROWS, size] tensors, the same on every rank."""
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(ROWS, size, generator=generator) for _ in range(count)]


def part(x, rank, size):
    return x.chunk(size, dim=-1)[rank]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _group():
    start_distributed("cpu")
    size = dist.get_world_size()
    return dist.new_group(list(range(size))), dist.get_rank(), size


def _copy_and_reduce():
    """A column and a row: y = sum over ranks of f_r(x), f_r(x) = sin(x * a_r), with x on every rank."""
    group, rank, size = _group()
    x, wanted_grad, *scales = tensors(WIDTH, 2 + size)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = reduce_from(torch.sin(copy_to(mine, group) * scales[rank]), group)
    wanted = sum(torch.sin(plain * scale) for scale in scales)
    y.backward(wanted_grad)
    wanted.backward(wanted_grad)
    return [close(y, wanted), close(mine.grad, plain.grad)]


def _gather():
    """What follows is the same on every rank."""
    group, rank, size = _group()
    x, weight = tensors(WIDTH, 2)
    mine, plain = part(x, rank, size).clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = torch.sin(gather_from(mine, group)), torch.sin(plain)
    y.backward(weight)
    wanted.backward(weight)
    return [close(y, wanted), close(mine.grad, part(plain.grad, rank, size))]


def _gather_partial():
    """What follows differs by rank: the whole is the sum over ranks."""
    group, rank, size = _group()
    x, *scales = tensors(WIDTH, 1 + size)
    mine, plain = part(x, rank, size).clone().requires_grad_(), x.clone().requires_grad_()
    torch.sin(gather_from(mine, group, partial=True) * scales[rank]).sum().backward()
    sum(torch.sin(plain * scale).sum() for scale in scales).backward()
    return [close(mine.grad, part(plain.grad, rank, size))]


def _split():
    """Every rank continues with its own columns."""
    group, rank, size = _group()
    x, weight = tensors(WIDTH, 2)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = torch.sin(split_to(mine, group)), torch.sin(plain)
    y.backward(part(weight, rank, size))
    wanted.backward(weight)
    return [close(y, part(wanted, rank, size)), close(mine.grad, plain.grad)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("work", [_copy_and_reduce, _gather, _gather_partial, _split], ids=lambda work: work.__name__[1:])
def test_forward_and_backward_equal_one_process(work, size):
    for checks in run_ranks(work, size):
        assert all(checks)


def test_a_group_of_one_is_the_identity():
    assert run_ranks(_alone, 1) == [True]


def _alone():
    x = torch.ones(2, 3)
    return all(move(x, None) is x for move in (copy_to, reduce_from, gather_from, split_to, all_reduce))


def test_all_reduce_leaves_its_argument_alone():
    """Also of a tensor that is not contiguous, which a backend would refuse or scramble."""
    assert run_ranks(_not_in_place, 2) == [[True, True, True]] * 2


def _not_in_place():
    group, rank, _ = _group()
    x = (torch.arange(6.0).view(2, 3) * (rank + 1)).t()
    before = x.clone()
    total = all_reduce(x, group)
    top = all_reduce(x, group, dist.ReduceOp.MAX)
    whole = torch.arange(6.0).view(2, 3).t()
    return [x.equal(before), total.equal(3 * whole), top.equal(2 * whole)]
