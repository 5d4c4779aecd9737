"""Follows what one decoder layer holds: saves in its forward pass, and adds to that in its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes.common.model.recompute import product_ops
from tools.plan.rehearsal.kernels import moved_bytes, starts_kernel


@dataclass(frozen=True)
class Bytes:
    """Bytes that every tensor rank has whole, bytes that the tensor ranks divide, and bytes that each gathers from all."""

    whole: float = 0.0  # between blocks, where sequence parallelism divides them
    sharded: float = 0.0
    gathered: float = 0.0  # inside a block that computes with the whole width, of the whole sequence

    @property
    def total(self) -> float:
        return self.whole + self.sharded + self.gathered

    def on_rank(self, tensor: int, sequence_ranks: int) -> float:
        """Return one rank's bytes. sequence_ranks: over how many sequence parallelism divides the whole ones."""
        return self.whole / sequence_ranks + self.sharded / tensor + self.gathered


@dataclass(frozen=True)
class Work:
    """What a layer's passes start on the GPU for one sequence."""

    kernels: float = 0.0  # of every kind
    moved: Bytes = Bytes()  # by those that are neither products nor attention


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes that one layer holds of one sequence, and what its passes start."""

    forward: Work
    backward: Work

    saved: Bytes  # from its forward to its backward pass
    products: Bytes  # outputs of matrix products and attention, which selective recomputation keeps
    factors: Bytes  # of its weights' gradients: the products' inputs, and as much as their outputs
    working: tuple[Bytes, ...]  # above what is saved, when the backward pass holds most: one of them, whatever the sharding


class LayerLog(TorchDispatchMode):
    """One layer's storages, each counted once. width: of the hidden states."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self._width, self._products = width, product_ops()
        self._weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        self._saved: dict[tuple[int | None, int], Bytes] = {}  # by event, None of what the layer was given, and storage
        self._kept: dict[int, Bytes] = {}  # outputs of products, by event
        self._factors: dict[Hashable, Bytes] = {}  # of products with weights
        self._live: dict[int, int] = {}  # storage -> its event
        self._events: list[tuple[int, Bytes]] = []  # (-1, what came) or (its event, what went)
        self._gradients: dict[int, Bytes] = {}  # events that were weight gradients
        self._begun = 0  # events before the backward pass; 0: it has not begun
        self._work = {False: Work(), True: Work()}  # in the backward pass?
        self._gathered = 0  # modules that gather their outputs, whose gradients are still to come
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def gather(self, gathering: Sequence[nn.Module], splitting: Sequence[nn.Module]) -> None:
        """Count what lies between modules that gather their outputs and those that split their inputs as gathered, both ways."""

        def enter(module: nn.Module, args: Any) -> None:
            self._gathered += 1

        def leave(gradient: torch.Tensor) -> None:
            self._gathered -= 1

        def split(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            entered, self._gathered = self._gathered, 0
            args[0].register_hook(lambda gradient: setattr(self, "_gathered", entered))

        for module in gathering:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(lambda module, args, output: output.register_hook(leave) and None)
        for module in splitting:
            module.register_forward_pre_hook(split)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer both ways. Returns its outputs, which lead no further back."""
        with self, torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            out = forward(*map(_cut, args), **{name: _cut(value) for name, value in kwargs.items()})
        hidden = out[0] if isinstance(out, tuple) else out
        self._saved = {(came, key): size for (came, key), size in self._saved.items() if self._live.get(key) == came}
        self._begun = len(self._events)
        with self:
            torch.autograd.backward([hidden], [torch.empty_like(hidden)])
        return (_cut(hidden), *out[1:]) if isinstance(out, tuple) else _cut(hidden)

    def keep(self, tensor: torch.Tensor) -> None:
        """Count a tensor that the layer keeps for its backward pass."""
        if (key := _key(tensor)) not in self._weights:
            came = self._live.get(key)
            self._saved.setdefault((came, key), self._bytes(tensor) if came is None else self._events[came][1])

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.keep(tensor)
        return tensor

    def __torch_dispatch__(self, op: Any, kinds: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self._count(op, args, kwargs or {}, out)
        taken = {_key(each): each for each in _tensors((args, kwargs))}
        made = [each for each in _tensors(out) if _key(each) not in taken]
        for each in made:
            self._come(each)
        if op in self._products and not self._begun:
            outputs = {self._live[_key(each)]: self._bytes(each) for each in made}
            self._kept |= outputs
            if not self._weights.isdisjoint(taken):
                inputs = {key: each for key, each in taken.items() if key not in self._weights}
                self._factors |= {("in", self._live.get(key), key): self._bytes(each) for key, each in inputs.items()}
                self._factors |= {("out", event): size for event, size in outputs.items()}
        return out

    def measured(self) -> LayerBytes:
        saved, kept, factors = (sum_bytes(sizes.values()) for sizes in (self._saved, self._kept, self._factors))
        work = {"forward": self._work[False], "backward": self._work[True]}
        return LayerBytes(saved=saved, products=kept, factors=factors, working=self._working(), **work)

    def _count(self, op: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Add a kernel and what it moves. Its largest tensor says whether tensor ranks divide that."""
        name = op._schema.name.partition("::")[2]
        if not starts_kernel(op, name):
            return
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        before, moved = self._work[self._begun > 0], Bytes()
        if inputs + outputs and op not in self._products and "attention" not in name:
            largest = max([*inputs, *outputs], key=torch.Tensor.numel)
            shape = self._bytes(largest)
            moved = scaled(shape, moved_bytes(op, name, inputs, outputs) / max(shape.total, 1.0))
        self._work[self._begun > 0] = Work(before.kernels + 1, sum_bytes([before.moved, moved]))

    def _bytes(self, tensor: torch.Tensor) -> Bytes:
        """Count the storage. Tensors as wide as the hidden states lie between blocks: every tensor rank has them whole."""
        size = float(tensor.untyped_storage().nbytes())
        if self._gathered:
            return Bytes(gathered=size)
        return Bytes(whole=size) if tensor.ndim < 4 and tensor.shape[-1:] in ((self._width,), (1,)) else Bytes(sharded=size)

    def _come(self, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        if key not in self._live:
            self._live[key] = len(self._events)
            self._events.append((-1, self._bytes(tensor)))
            weakref.finalize(tensor.untyped_storage(), self._go, key).atexit = False

    def _go(self, key: int) -> None:
        came = self._live.pop(key)
        self._events.append((came, self._events[came][1]))

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        """Note a weight's gradient, and free it, as training does. Banks of experts count where it is added up."""
        if (came := self._live.get(_key(parameter.grad))) is not None:
            size = float(parameter.grad.untyped_storage().nbytes())
            self._gradients[came] = Bytes(sharded=size if parameter.ndim < 3 else 0.0)
        parameter.grad = None

    def _working(self) -> tuple[Bytes, ...]:
        """Return the moments of the backward pass that hold most, of one kind of bytes or of several."""
        held = Bytes()
        moments = {held}
        for index, (came, size) in enumerate(self._events[self._begun :], self._begun):
            size = self._gradients.get(index if came < 0 else came, size)
            sign = 1.0 if came < 0 else -1.0
            held = Bytes(*(have + sign * more for have, more in zip(astuple(held), astuple(size), strict=True)))
            moments.add(held)
        fullest: list[Bytes] = []
        for moment in sorted(moments, key=astuple, reverse=True):
            if not any(other.sharded >= moment.sharded and other.gathered >= moment.gathered for other in fullest):
                fullest.append(moment)
        return tuple(fullest)


def _cut(value: Any) -> Any:
    """Return a tensor that has a gradient as one where backward passes end."""
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def mean_work(works: Sequence[Work]) -> Work:
    count = len(works)
    return Work(sum(each.kernels for each in works) / count, scaled(sum_bytes(each.moved for each in works), 1 / count))


def scaled(size: Bytes, by: float) -> Bytes:
    return Bytes(*(by * each for each in astuple(size)))


def sum_bytes(sizes: Iterable[Bytes]) -> Bytes:
    return Bytes(*map(sum, zip(*map(astuple, (Bytes(), *sizes)), strict=True)))
