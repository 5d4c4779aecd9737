"""Finds out what a model's layers are given beside the hidden states: what has to cross the cuts of a pipeline with them.

Rotations and masks are computed in every stage, from shapes and positions. What depends on ids, on parameters outside the layers
or on other layers (keys and values that layers share, choices of an indexer, embeddings for each layer, the embedded input again)
has to come from the stage that has it. Which values these are is not asked of the family: a tiny model of the same depth runs
whole, and then chunk by chunk as the stages will; what a layer is given differs or not.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack, find_stack
from recipes.common.model.initial_weights import build_empty, draw_weights
from recipes.common.model.sharding import Holdings
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.placeholders import take_out
from recipes.common.pipeline.places import HIDDEN_ALONE, Crossings, Key, Member, Place, hidden_path, leaf, leaves, put
from recipes.common.recipe import Layout

# what every stage computes for itself, by transformers' names; a layer that takes nothing else, and returns its hidden states
_COMPUTED = {
    *("hidden_states", "attention_mask", "position_ids", "position_embeddings"),
    *("past_key_values", "use_cache", "cache_position"),
}
_SEQS, _SEQ_LEN = 2, 16
_MOST_PARAMETERS = 10_000_000  # of a model that is tried as it is


def find_crossings(causal: PreTrainedModel, stack: Stack, attention: str, chunks: list[range]) -> Crossings:
    """Return what crosses between `chunks` of a model. Raises PlanError where something cannot be handed on."""
    if len(chunks) == 1 or _takes_nothing_else(causal, stack):
        return HIDDEN_ALONE
    family, reasons = causal.config.model_type, []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        config = causal.config
        if sum(p.numel() for p in causal.parameters()) > _MOST_PARAMETERS:
            config = shrink(config, Layout(), layers=config.num_hidden_layers)
        whole = _Whole(config, attention)
        for more in (False, True):
            try:
                return whole.try_chunks(chunks, more=more)
            except Exception as error:  # a family's own code may raise anything on a part of the model
                reasons.append(error)
    reason = reasons[-1] if isinstance(reasons[-1], PlanError) else f"{type(reasons[-1]).__name__}: {reasons[-1]}"
    raise PlanError(f"model_type={family} cannot be partitioned into stages: {reason}") from reasons[-1]


def _takes_nothing_else(causal: PreTrainedModel, stack: Stack) -> bool:
    for kind in {type(layer) for layer in causal.get_submodule(stack.layers)}:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
        if {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - _COMPUTED:
            return False
        if "tuple" in str(inspect.signature(kind.forward).return_annotation):
            return False
    return not any(_outside(causal, stack))


def _outside(causal: PreTrainedModel, stack: Stack) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the base model's parameters that are neither in a layer nor in a module that the stack names."""
    named = tuple(f"{name}." for name in (stack.layers, *stack.before, *stack.after))
    for name, parameter in causal.get_submodule(stack.base).named_parameters(prefix=stack.base):
        if not name.startswith(named):
            yield name, parameter


class _Whole:
    """A tiny model, what its layers are given, and what it returns."""

    def __init__(self, config: PreTrainedConfig, attention: str) -> None:
        self.causal = build_empty(config, attention if attention in ("eager", "sdpa") else "sdpa")
        self.stack = find_stack(self.causal)
        draw_weights(self.causal, self.causal, "", seed=0, held=Holdings())
        self.causal.eval()
        vocab = config.get_text_config().vocab_size
        self.ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (vocab - 3) + 3
        self.given: list[dict[tuple[Key, ...], Any]] = []  # by layer: path -> value
        self.hidden: tuple[Key, ...] = ()
        self._same_tensor: dict[Place, tuple] = {}  # places of one tensor have one key
        self._alive: list[Any] = []  # or another tensor could get the memory of one
        self._outputs: set[int] = set()
        layers = self.causal.get_submodule(self.stack.layers)
        layers.requires_grad_(False)
        hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in layers]
        hooks += [layer.register_forward_hook(self._note_output) for layer in layers]
        outside = dict(_outside(self.causal, self.stack))
        self._from_outside: list[torch.Tensor] = []
        out = self.causal.get_submodule(self.stack.base)(input_ids=self.ids, use_cache=False)
        self.out = out.last_hidden_state.detach()
        for hook in hooks:
            hook.remove()
        if len(self._outputs) != 1 or len(self.given) != len(layers):
            raise PlanError("its layers return tuples of different lengths, or do not run once each")
        self.before = self._trained_before(outside)
        self.after = frozenset(outside) - self.before
        self.causal.requires_grad_(False)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        index, found = len(self.given), {}
        self.hidden = hidden_path(args, kwargs)
        for path, value in leaves(args, kwargs):
            if isinstance(value, torch.Tensor):
                self._alive.append(value)
                form = (value.data_ptr(), value.shape, value.stride(), value.dtype, value._version)
                self._same_tensor[Place(index, path)] = form
                if value.requires_grad:
                    self._from_outside.append(value)
                value = value.detach().clone()
            found[path] = value
        self.given.append(found)
        # what follows from here on must not count as what is computed outside the layers
        return tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}

    def _note_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._outputs.add(len(output) if isinstance(output, tuple) else 0)

    def _trained_before(self, outside: dict[str, nn.Parameter]) -> frozenset[str]:
        if not outside or not self._from_outside:
            return frozenset()
        total = sum(value.sum() for value in self._from_outside)
        gradients = torch.autograd.grad(total, list(outside.values()), allow_unused=True)
        return frozenset(name for name, gradient in zip(outside, gradients, strict=True) if gradient is not None)

    def try_chunks(self, chunks: list[range], *, more: bool) -> Crossings:
        """Run each chunk as a stage will. more: with ids, and with all that differs from the whole model's put right.

        Raises PlanError where that does not give what the whole model gives.
        """
        found = Crossings(outputs=self._outputs.copy().pop(), before=self.before, after=self.after)
        needed, available = [], []
        with torch.no_grad():
            for index in range(len(chunks)):
                run = _ChunkRun(self, found, chunks, index, more=more)
                needed.append(run.needed)
                available.append(run.available)
        if not more:
            return found
        messages: list[tuple[Member, ...]] = []
        wanted: list[Place] = []
        for index in reversed(range(1, len(chunks))):
            onward = [place for place in wanted if place not in available[index]]
            wanted = needed[index] + [place for place in onward if place not in needed[index]]
            if lost := [place for place in wanted if index == 1 and place not in available[0]]:
                raise PlanError(f"nothing can hand on what layer {lost[0].layer} is given as {_words(lost[0])}")
            hidden = (Place(chunks[index][0], self.hidden),)
            messages.append((hidden, (), *self._members(wanted)))
        return Crossings(**(vars(found) | {"messages": ((), *reversed(messages))}))

    def _members(self, places: list[Place]) -> list[Member]:
        found: dict[tuple, list[Place]] = {}
        for place in places:
            found.setdefault(self._same_tensor[place], []).append(place)
        return [tuple(group) for group in found.values()]


class _ChunkRun:
    """One chunk of a tiny model, run with what it would receive; `needed` and `available` are what it lacks and what it has."""

    def __init__(self, whole: _Whole, crossings: Crossings, chunks: list[range], index: int, *, more: bool) -> None:
        self._whole, self._chunk, self._more = whole, chunks[index], more
        self.needed: list[Place] = []
        self.available: set[Place] = set()
        causal, stack = copy.deepcopy(whole.causal), whole.stack
        first, last = index == 0, index == len(chunks) - 1
        take_out(causal, stack, crossings, (self._chunk,), first=first, last=last)
        for layer, module in enumerate(causal.get_submodule(stack.layers)):
            module.register_forward_pre_hook(partial(self._arrive, layer), with_kwargs=True)
        base, ids = causal.get_submodule(stack.base), whole.ids
        if first or more:
            out = base(input_ids=ids, use_cache=False).last_hidden_state
        else:
            width = causal.config.get_text_config().hidden_size
            out = base(inputs_embeds=torch.zeros(*ids.shape, width), use_cache=False).last_hidden_state
        following = Place(self._chunk[-1] + 1, whole.hidden)
        if last and not _same(out, whole.out):
            raise PlanError("what runs after its layers is given more than hidden states")
        if not last and following not in self.available:
            raise PlanError(f"layer {following.layer} is not given what layer {following.layer - 1} returns")
        if not last and not more and whole.given[following.layer][whole.hidden].shape[:2] != ids.shape:
            raise PlanError("its hidden states do not begin with sequences and tokens")

    def _arrive(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = self._whole.hidden
        if layer == self._chunk[0] and layer:
            args, kwargs = put(args, kwargs, hidden, self._whole.given[layer][hidden], overwrite=self._more)
        for path, value in self._whole.given[layer].items() if layer >= self._chunk[0] else ():
            place = Place(layer, path)
            if _same(leaf(args, kwargs, path), value):
                self.available.add(place)
            elif layer in self._chunk:
                if not self._more or not isinstance(value, torch.Tensor):
                    raise PlanError(f"layer {layer} is given {_words(place)}, which its stage does not have")
                self.needed.append(place)
                args, kwargs = put(args, kwargs, path, value)
        return args, kwargs


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor):
        same_form = found.shape == wanted.shape and found.dtype == wanted.dtype
        if same_form and found.is_floating_point():
            return torch.equal(found.nan_to_num(), wanted.nan_to_num())
        return same_form and torch.equal(found, wanted)
    if isinstance(found, torch.Tensor) or isinstance(wanted, torch.Tensor):
        return False
    return type(found) is type(wanted)


def _words(place: Place) -> str:
    return ".".join(str(key) for key in place.path)
