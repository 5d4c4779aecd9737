"""A message holds tensors of any types bit for bit, and their gradients."""

import torch

from recipes.common.pipeline.packing import pack, packing_of, read_packing, unpack
from tools.common.forked_ranks import run_ranks


def _there_and_back():
    hidden = torch.randn(2, 3, 5).bfloat16().requires_grad_()
    state = torch.tensor([[1e-40, -0.0], [float("inf"), 1 / 3]]).requires_grad_()  # fp32 in a bf16 message
    choices, mask = torch.tensor([2**40, -7]), torch.tensor([True, False, True])
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    tensors = (hidden, choices, mask, state, nothing)
    packing = packing_of(tensors, (2, 3))
    message = pack(packing, torch.tensor(packing.header()), tensors)
    assert message.dtype == torch.bfloat16 and message.shape[:2] == (2, 3)
    assert 0 <= message.numel() * 2 - packing.num_bytes < 2 * 3 * 2  # no more than the members need, in whole columns
    received = message.detach().clone().requires_grad_()
    found = read_packing(received, len(tensors))
    assert found == packing
    members = unpack(found, received)
    assert all(member.dtype == each.dtype and member.equal(each) for member, each in zip(members, tensors, strict=True))
    assert [member.requires_grad for member in members] == [True, False, False, True, False]
    members[0].mul_(3)  # a layer may overwrite what it is given
    (members[0].float().sum() + (members[3][1] * 1e-30).sum()).backward()
    message.backward(received.grad)
    assert hidden.grad.eq(3).all()
    assert state.grad.tolist() == torch.tensor([[0, 0], [1e-30, 1e-30]]).tolist()
    return True


def test_bits_and_gradients_come_back():
    assert run_ranks(_there_and_back, 1) == [True]
