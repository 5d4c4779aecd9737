"""Micro batches arrive in order, one read ahead of its use; on a CPU nothing is copied."""

import pytest
import torch

from recipes.common.runtime.device_copies import CopyAhead, to_device

CPU = torch.device("cpu")


def test_on_a_cpu_a_tensor_stays_itself():
    tensor = torch.arange(6).view(2, 3)[:, 1:]
    assert to_device(tensor, CPU) is tensor


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_arrive_in_order_one_ahead(count):
    batches = [(torch.tensor(i), torch.tensor(-i)) for i in range(count)]
    read, arrived = [], []
    for first, second in CopyAhead(CPU)(read.append(i) or batch for i, batch in enumerate(batches)):
        arrived.append((int(first), int(second)))
        assert len(read) == min(len(arrived) + 1, count)
    assert arrived == [(i, -i) for i in range(count)]


def test_an_error_of_the_reader_is_raised_after_what_came_before_it():
    def reader():
        yield (torch.tensor(0),)
        yield (torch.tensor(1),)
        raise OSError("the disk is gone")

    copies = CopyAhead(CPU)(reader())
    assert int(next(copies)[0]) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(copies)
