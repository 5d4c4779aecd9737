"""Counts the memory that lives only inside a step: activations, logits and gradients, from the tensors, on any device.

Activations are what autograd saves for the micro batches in flight, and the layer inputs that recomputation saves: each storage
once, without weights. Not counted are the shards that sequence parallelism saves and gathers again, the products that selective
recomputation saves, and the factors that a zero-bubble schedule keeps after a backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from recipes.common.engine.trainer import Trainer


class LiveBytes:
    """Counts the bytes of storages that something holds, now and at the peak."""

    def __init__(self, ignored: set[int]) -> None:
        self.peak = 0
        self._now, self._ignored, self._holders = 0, ignored, {}

    def hold(self, tensor: torch.Tensor, holder: object) -> None:
        """Count `tensor`'s storage for as long as `holder` lives."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._ignored and size:
            weakref.finalize(holder, self._release, address, size).atexit = False
            self._holders[address] = self._holders.get(address, 0) + 1
            self._now += size if self._holders[address] == 1 else 0
            self.peak = max(self.peak, self._now)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self._now -= size


class _Saved:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextmanager
def count_step(trainer: Trainer) -> Iterator[dict[str, int]]:
    """Fill in the bytes of "activations", "logits" and "gradients" of the step taken inside."""
    stage = trainer.stage
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*stage.parameters(), *stage.buffers())}
    live, found = LiveBytes(owned), {"activations": 0, "logits": 0, "gradients": 0}
    gradients: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        live.hold(tensor, saved)
        return saved

    def keep_input(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        live.hold(hidden, hidden)

    def see_logits(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        found["logits"] = max(found["logits"], output.untyped_storage().nbytes())

    def see_gradients(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        masters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for gradient in (parameter.grad for parameter in (*masters, *stage.parameters())):
            if gradient is not None:
                gradients[gradient.untyped_storage().data_ptr()] = gradient.untyped_storage().nbytes()

    layers = stage.causal.get_submodule(stage.stack.layers)
    with ExitStack() as hooks:
        for index in stage.own_layers:
            hooks.callback(layers[index].register_forward_pre_hook(keep_input, with_kwargs=True).remove)
        if stage.is_last:
            hooks.callback(stage.causal.get_submodule(stage.stack.head).register_forward_hook(see_logits).remove)
        hooks.callback(trainer.optimizer.register_step_pre_hook(see_gradients).remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            yield found
    found["activations"] = live.peak
    found["gradients"] = sum(gradients.values())
