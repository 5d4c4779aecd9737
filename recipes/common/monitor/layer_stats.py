"""Measures the layers in one training step: RMS of their outputs, largest attention logit, load of the experts.

Done on some steps only. Hooks exist while such a step runs; the model is not changed, and no random number is drawn.

    activation_rms        of each decoder layer's output, over all tokens of the step
    max_attention_logit   over all heads, and over QUERIES evenly spaced query positions of every sequence: scaled q.k of the keys
                          that the query may attend to, before any soft-cap. Fused attention keeps no logits, so these few are
                          recomputed from its q and k. NaN for families that call attention in a way of their own.
    router_load_max       tokens of the busiest expert over the mean of all (1: balanced). NaN for layers without a router
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.common.model.routers import find_routers
from recipes.common.model.varlen_attention import Segments
from recipes.common.pipeline.stage import Stage

QUERIES = 32  # positions of each sequence whose attention logits are recomputed
_EAGER = "eager_attention_forward"  # transformers' name, in each family's module


class LayerStats:
    """Sums over the micro batches of one step, of this rank's layers. `begin`, run the step, `end`, then take the sums."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._device = stage, stage.loss_sums.device
        self.depth = len(stage.causal.get_submodule(stage.stack.layers))
        config = stage.causal.config.get_text_config()
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        self._experts = next((count for name in names if isinstance(count := getattr(config, name, None), int)), 0)
        self._chosen = getattr(config, "num_experts_per_tok", None) or 1
        self._handles: list[RemovableHandle] = []
        self._attention: str | None = None  # the name of our entry in transformers' table while a step runs
        self.error: Exception | None = None  # the first that measuring raised: the step goes on without it
        self._clear()

    def _clear(self) -> None:
        device = self._device
        self._squares = torch.zeros(self.depth, 2, dtype=torch.float64, device=device)  # of outputs: sum of squares, how many
        self._loads = torch.zeros(self.depth, self._experts, dtype=torch.float64, device=device)
        self._logits = torch.full((self.depth,), -torch.inf, device=device)

    def begin(self) -> None:
        self._device = self._stage.loss_sums.device
        self._clear()
        layers = self._stage.causal.get_submodule(self._stage.stack.layers)
        # tensor ranks have the same values, which one of them counts, or a part of the sequence each
        if self._stage.grid.tensor_rank == 0 or self._stage.tensor_plan.blocks:
            for index in self._stage.own_layers:
                # before the stage's own hook, which takes the output of its last layer away
                self._handles.append(layers[index].register_forward_hook(self._output_hook(index), prepend=True))
            for name, (index, place) in find_routers(self._stage.causal, self._stage.stack).items():
                router = self._stage.causal.get_submodule(name)
                self._handles.append(router.register_forward_hook(self._routing_hook(index, place)))
        self._wrap_attention()

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._attention is not None:
            del ALL_ATTENTION_FUNCTIONS[self._attention]
            self._attention = None

    def sums(self) -> torch.Tensor:
        """Return fp64 [depth * (2 + experts)], to be summed over all ranks."""
        return torch.cat([self._squares.flatten(), self._loads.flatten()])

    def maxima(self) -> torch.Tensor:
        """Return [depth], of which the largest over all ranks counts; -inf for layers of other ranks or without such logits."""
        return self._logits

    def decode(self, sums: np.ndarray, maxima: np.ndarray) -> dict[str, np.ndarray]:
        """Return statistic -> [depth] from the sums and maxima over all ranks."""
        squares, loads = np.split(sums, [2 * self.depth])
        squares, loads = squares.reshape(self.depth, 2), loads.reshape(self.depth, self._experts)
        with np.errstate(invalid="ignore", divide="ignore"):
            busiest = loads.max(axis=1) / loads.mean(axis=1) if self._experts else np.full(self.depth, np.nan)
            rms = np.sqrt(squares[:, 0] / squares[:, 1])
        logits = np.where(maxima == -np.inf, np.nan, maxima)
        return {"activation_rms": rms, "max_attention_logit": logits, "router_load_max": busiest}

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # in the middle of a forward pass, which must go on
            self.error = self.error or error

    def _output_hook(self, index: int) -> Callable[..., None]:
        squares, count = self._squares[index].unbind()

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            with self._guarded():
                hidden = (output[0] if isinstance(output, tuple) else output).detach()
                squares.add_(hidden.float().square().sum())
                count.add_(hidden.numel())

        return hook

    def _routing_hook(self, index: int, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            with self._guarded():
                outputs = output if isinstance(output, tuple) else (output,)
                chosen = next((o for o in outputs if o.dtype in (torch.int64, torch.int32)), None)
                if chosen is None:
                    chosen = outputs[place].detach().topk(self._chosen, dim=-1).indices
                ones = torch.ones(chosen.numel(), dtype=torch.float64, device=self._device)
                self._loads[index].index_add_(0, chosen.flatten(), ones)

        return hook

    def _wrap_attention(self) -> None:
        """Register, under the name that the model asks for, an attention function that measures and calls the real one."""
        name = self._stage.attention  # where context ranks share it, inside: whole sequences, a part of the heads
        fused = ALL_ATTENTION_FUNCTIONS.get(name)
        family = sys.modules[type(self._stage.causal).__module__]
        if name is None or (fused is None and not hasattr(family, _EAGER)):
            return

        def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> Any:
            with self._guarded():
                index = getattr(module, "layer_idx", None)
                mask = options["attention_mask"] if "attention_mask" in options else next(iter(args[1:2]), None)
                if index is not None and key.shape[2] >= query.shape[2]:
                    largest = largest_logit(query.detach(), key.detach(), mask, options.get("scaling"))
                    self._logits[index] = torch.maximum(self._logits[index], largest)
            run = fused or getattr(sys.modules[type(module).__module__], _EAGER, None) or getattr(family, _EAGER)
            return run(module, query, key, *args, **options)

        ALL_ATTENTION_FUNCTIONS[name] = attend
        self._attention = name


def largest_logit(query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float | None) -> torch.Tensor:
    """Return the largest over evenly spaced queries, fp32 [].

    query: [seqs, heads, queries, width]. key: [seqs, heads or fewer, keys, width].
    mask: bool (True: attended) or added, [seqs, 1 or heads, queries, keys], or Segments; anything else: a query attends to keys
    up to its own.
    """
    seqs, heads, length, width = query.shape
    places = torch.linspace(0, length - 1, min(QUERIES, length), device=query.device).round().long()
    # the heads that share a key are rows of one product
    grouped = query.index_select(2, places).float().reshape(seqs, key.shape[1], -1, width)
    logits = (grouped @ key.float().transpose(-1, -2)).view(seqs, heads, len(places), -1)
    logits.mul_(width**-0.5 if scaling is None else scaling)
    if isinstance(mask, Segments):
        rows = mask.rows(seqs, places, key.shape[2])
    elif torch.is_tensor(mask) and mask.ndim == 4:
        rows = mask[:, :, places, : key.shape[2]]
    else:
        here = torch.arange(key.shape[2], device=query.device)
        rows = (here <= places.unsqueeze(1) + (key.shape[2] - length)).view(1, 1, len(places), -1)
    # of what it treats alike only the largest has to be masked
    if alike := [dim for dim in (0, 1) if rows.shape[dim] == 1]:
        logits = logits.amax(alike, keepdim=True)
    logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows
    return logits.amax()
