"""Micro batches arrive in order, one read ahead of its use; on a CPU nothing is copied."""

import pytest
import torch

from recipes.common.runtime import device_copies
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


def test_on_a_gpu_each_copy_is_in_a_stream_of_its_own_and_waited_for_by_the_one_that_computes(monkeypatch):
    """With streams that only say what is asked of them: no copy is used before its event, none waits for the one after it."""
    said = []

    class SaidStream:
        def __init__(self, name):
            self.name, self.events = name, 0

        def __enter__(self):
            said.append(f"in {self.name}")

        def __exit__(self, *_):
            said.append(f"out of {self.name}")

        def record_event(self):
            self.events += 1
            said.append(f"event {self.events}")
            return self.events

        def wait_event(self, event):
            said.append(f"{self.name} waits for event {event}")

    main = SaidStream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SaidStream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(device_copies, "to_device", lambda tensor, device: said.append(f"copy {int(tensor)}") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: said.append(f"{int(tensor)} kept for {stream.name}")
    )
    copies = CopyAhead(torch.device("cuda", 0))((torch.tensor(i),) for i in range(2))
    for (tensor,) in copies:
        said.append(f"use {int(tensor)}")
    assert said == [
        "in side", "copy 0", "event 1", "out of side",
        "in side", "copy 1", "event 2", "out of side",
        "main waits for event 1", "0 kept for main", "use 0",
        "main waits for event 2", "1 kept for main", "use 1",
    ]  # fmt: skip
