"""Puts what a chunk receives in its place in the unmodified model, and takes out what the next one needs.

While a chunk runs, the whole base model's forward runs, with placeholders where other layers are. Received values enter before
the layers that are given them; what a later layer is given is read where its placeholder is called.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.sharding import TensorPlan
from recipes.common.parallel.grid import Grid
from recipes.common.pipeline.packing import Packing, pack, packing_of, read_packing, unpack
from recipes.common.pipeline.placeholders import PlaceholderEmbedding
from recipes.common.pipeline.places import Crossings, Place, leaf, put

MORE_THAN_PARTS = "its layers hand on more than hidden states, which sequence_parallel does not share between tensor ranks"


class Carrier:
    """Carries hidden states alone into and out of a rank's chunks."""

    def __init__(
        self, causal: PreTrainedModel, stack: Stack, chunks: tuple[range, ...], *, shards: int, first: bool, last: bool
    ) -> None:
        """chunks: this rank's. shards: tensor ranks that hold a part of each sequence between the layers. first, last: whether
        the model's first and last chunk are among them."""
        self._base, self._chunks, self._shards = causal.get_submodule(stack.base), chunks, shards
        self._first, self._last = first, last
        self._width = causal.config.get_text_config().hidden_size
        self._received: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None
        layers = causal.get_submodule(stack.layers)
        for index, chunk in enumerate(chunks):
            if not self.starts(index):
                layers[chunk[0]].register_forward_pre_hook(self._inject, with_kwargs=True)
            if not self.ends(index):
                layers[chunk[-1]].register_forward_hook(self._capture)

    def starts(self, chunk: int) -> bool:
        """Return whether one of this rank's chunks is the model's first."""
        return self._first and chunk == 0

    def ends(self, chunk: int) -> bool:
        return self._last and chunk == len(self._chunks) - 1

    def begin(self, chunk: int, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int, int]:
        """Take what enters a chunk. Returns the base model's input, the number of sequences, and their length."""
        if self.starts(chunk):
            return {"input_ids": x}, *x.shape
        self._received = x
        self._type_placeholders(x.dtype)
        # hidden states need not look like an embedding, nor, with sequence parallelism, hold all that this rank's layers see
        seqs, length = x.shape[0], x.shape[1] * self._shards
        # only its shape and type count
        return {"inputs_embeds": x.new_zeros(seqs, length, self._width)}, seqs, length

    def end(self, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what leaves a chunk. hidden: the base model's own result."""
        sent = hidden if self.ends(chunk) else self._sent
        self.clear()
        return sent

    def clear(self) -> None:
        """Let go of tensors, at the end of a chunk's forward pass, however it ends."""
        self._received = self._sent = None

    def _type_placeholders(self, dtype: torch.dtype) -> None:
        for module in self._base.modules():
            if isinstance(module, PlaceholderEmbedding):
                module.dtype = dtype

    def _inject(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _capture(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._sent = output[0] if isinstance(output, tuple) else output


class MessageCarrier(Carrier):
    """Carries messages of several tensors (`Crossings`), each packed into one: hidden states, ids, and what else there is."""

    def __init__(
        self,
        causal: PreTrainedModel,
        stack: Stack,
        chunks: tuple[range, ...],
        crossings: Crossings,
        all_chunks: list[range],
        placeholders: dict[str, nn.Module],
        *,
        first: bool,
        last: bool,
    ) -> None:
        """all_chunks: the model's. placeholders: as of Stage."""
        super().__init__(causal, stack, (), shards=1, first=first, last=last)
        self._chunks, self._running = chunks, -1
        places = [all_chunks.index(chunk) for chunk in chunks]
        self._incoming = [crossings.messages[place] for place in places]
        self._outgoing = [crossings.messages[place + 1] if place + 1 < len(all_chunks) else () for place in places]
        self._values: dict[Place, torch.Tensor] = {}
        self._ids: torch.Tensor | None = None
        self._leading = (0, 0)
        self._packings: dict[tuple, Packing] = {}
        self._headers: dict[Packing, torch.Tensor] = {}
        layers = causal.get_submodule(stack.layers)
        for index, chunk in enumerate(chunks):
            entered = {place.layer for member in self._incoming[index] for place in member if place.layer in chunk}
            left = {member[0].layer for member in self._outgoing[index] if member}
            for layer in sorted(entered | left):
                module = layers[layer]
                if layer not in chunk:
                    module = placeholders.get(f"{stack.layers}.{layer}", module)
                module.register_forward_pre_hook(partial(self._arrive, index, layer), with_kwargs=True)
        self._dtype_of = next(layers[chunks[0][0]].parameters())

    def begin(self, chunk: int, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int, int]:
        self._running = chunk
        self._leading = (x.shape[0], x.shape[1])
        if self.starts(chunk):
            self._ids = x
            return {"input_ids": x}, *x.shape
        incoming = self._incoming[chunk]
        form = (chunk, x.shape, x.dtype)
        if form not in self._packings:
            self._packings[form] = read_packing(x, len(incoming))
        members = unpack(self._packings[form], x)
        self._values = {place: value for member, value in zip(incoming, members, strict=True) for place in member}
        self._ids = members[1]
        self._type_placeholders(self._dtype_of.dtype)
        return {"input_ids": self._ids}, *x.shape[:2]

    def end(self, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        outgoing = self._outgoing[chunk]
        tensors = tuple(self._values[member[0]] if member else self._ids for member in outgoing)
        if not tensors:
            self.clear()
            return hidden
        packing, form = packing_of(tensors, self._leading), ("out", chunk, self._leading)
        if self._packings.setdefault(form, packing) != packing:
            raise ValueError("what this model's layers hand on changes its shape from one micro batch to the next")
        if packing not in self._headers:
            self._headers[packing] = torch.tensor(packing.header(), device=hidden.device)
        self.clear()
        return pack(packing, self._headers[packing], tensors)

    def clear(self) -> None:
        self._values, self._ids, self._running = {}, None, -1

    def _arrive(
        self, chunk: int, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if chunk != self._running:
            return None
        if layer in self._chunks[chunk]:
            for member in self._incoming[chunk]:
                for place in member:
                    if place.layer == layer:
                        args, kwargs = put(args, kwargs, place.path, self._values[place])
            return args, kwargs
        for member in self._outgoing[chunk]:
            if member and member[0].layer == layer and member[0] not in self._values:
                self._values[member[0]] = leaf(args, kwargs, member[0].path)
        return None


def carrier_of(
    causal: PreTrainedModel,
    stack: Stack,
    tensor_plan: TensorPlan,
    chunks: tuple[range, ...],
    all_chunks: list[range],
    crossings: Crossings,
    placeholders: dict[str, nn.Module],
    grid: Grid,
) -> Carrier:
    """Let what crosses the cuts in and out of this rank's chunks, when all else has been done to its layers."""
    ends = {"first": grid.is_first_stage, "last": grid.is_last_stage}
    if not crossings.messages:
        shards = tensor_plan.size if tensor_plan.blocks else 1
        return Carrier(causal, stack, chunks, shards=shards, **ends)
    if tensor_plan.blocks:  # the checks have said so
        raise PlanError(f"model_type={causal.config.model_type}: {MORE_THAN_PARTS}")
    return MessageCarrier(causal, stack, chunks, crossings, all_chunks, placeholders, **ends)
