"""Takes fingerprints of every tensor of one step on one rank: state before, activations, gradients, state after.

Each module is watched from outside, by what it reads and returns, in both directions. Where a part lies in the whole tensor
follows from the module's whole shape (`whole_shapes`) and this rank's place in the layout: sequences by reader and micro batch,
places by context rank or sequence parallelism, features by tensor rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import StepResult, Trainer
from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.tensor_styles import STYLES
from recipes.common.pipeline.placeholders import Placeholder, PlaceholderBase, PlaceholderEmbedding, PlaceholderLinear
from tools.replay.enter import ReplayPlan
from tools.replay.fingerprint import Fingerprint, fingerprint
from tools.replay.places import OF_READER, Places, RankPlace
from tools.replay.state_parts import COMPUTED, StatePart, gradient_parts, state_parts
from tools.replay.whole_shapes import Dims, input_of, output_of

IDS, INPUT, OUTPUT, LOSS, DIVIDED = "ids", "input", "output", "loss", "divisor of the gradients"
OUTPUT_GRADIENT, INPUT_GRADIENT, GRADIENT = "gradient of its output", "gradient of its input", "gradient"
BEFORE, AFTER = "before the step", "after the step"
PHASES = {IDS: 1, INPUT: 2, OUTPUT: 2, LOSS: 3, OUTPUT_GRADIENT: 4, INPUT_GRADIENT: 4, DIVIDED: 5, GRADIENT: 5}  # state: 0 and 6

_PLACEHOLDERS = (Placeholder, PlaceholderBase, PlaceholderEmbedding, PlaceholderLinear)


@dataclass(frozen=True)
class PartSeen:
    """The fingerprint of one rank's part of a tensor."""

    kind: str
    name: str  # of a module or a parameter
    order: tuple[int, int, int]  # phase, chunk of the model, count: causes come before what they cause
    place: str  # which part of the whole it is; equal for copies
    print: Fingerprint
    rank: int
    is_placed: bool  # False: where it lies in the whole is not known, so only an equal cut compares


@dataclass(frozen=True)
class TensorPart:
    """One rank's part of a tensor, whole."""

    kind: str
    name: str
    place: str
    index: np.ndarray  # int64 [n]
    values: np.ndarray  # fp64 [n]


@contextmanager
def trace_step(trainer: Trainer, plan: ReplayPlan, shapes: Mapping[tuple[str, str], Dims]) -> Iterator[RankTrace]:
    """Watch the step that is taken inside; `finish` then gives what was seen. shapes: see `whole_shapes`."""
    trace = RankTrace(trainer, plan, shapes)
    try:
        trace.attach()
        yield trace
    finally:
        trace.detach()


class RankTrace:
    """Collects what one rank sees of a step."""

    def __init__(self, trainer: Trainer, plan: ReplayPlan, shapes: Mapping[tuple[str, str], Dims]) -> None:
        self._trainer, self._stage, self._watch = trainer, trainer.stage, {tuple(w.split("|", 1)) for w in plan.watch}
        self._seen: dict[tuple[str, str, str], PartSeen] = {}
        self._watched: list[TensorPart] = []
        self._handles: list[Any] = []
        self._micro_batch, self._chunk, self._count = -1, 0, 0
        self._forwards: Counter[int] = Counter()  # by chunk
        self._calls: Counter[tuple[str, str]] = Counter()  # of a module in this micro batch
        self._tokens: Counter[tuple[str, str]] = Counter()  # of this micro batch that the head has had
        # each data rank's gradients are those of the mean over ranks times their number, and of the scaled loss
        self._gradient_scale = 1.0 / (trainer.grid.data * zero_state.scaler_state(trainer).get("cur_scale", 1.0))
        self._clip = plan.recipe.optimizer.clip
        setting = RankPlace(trainer.grid, plan.recipe.batch.seq_len, plan.recipe.batch.micro_seqs)
        self._places = Places(setting, shapes, self._module_shards())
        self._parameter_order = {name: number for number, name in enumerate(self._stage.whole_shapes)}

    def _module_shards(self) -> dict[str, ShardSpec]:
        """Return module -> how its own output is cut, where that is not evenly along one dimension."""
        plan, stack, found = self._stage.tensor_plan, self._stage.stack, {}
        for name, style in plan.styles.items():
            specs = [spec for key, spec in plan.shards.items() if key.rpartition(".")[0] == name and spec.packs > 1]
            if specs and STYLES[style].is_sharded:
                found[name] = specs[0]
        return found | {stack.head: ShardSpec(0)}

    def attach(self) -> None:
        """Look at the state before the step, and hook every module of this rank that computes."""
        self._see_state(BEFORE)
        handles, stack = self._handles, self._stage.stack
        handles.append(self._stage.register_forward_pre_hook(self._next_micro_batch))
        for name, module in self._stage.causal.named_modules():
            holds_layers = not name or stack.layers == name or stack.layers.startswith(f"{name}.") or name == stack.base
            if not holds_layers and not isinstance(module, _PLACEHOLDERS):
                handles.append(module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._output_hook(name)))
        handles.append(self._trainer.optimizer.register_step_post_hook(self._after_update))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def finish(self, result: StepResult) -> tuple[list[PartSeen], list[TensorPart]]:
        """Return everything seen of the step that was just taken."""
        self._see(LOSS, "loss", torch.tensor(result.loss, dtype=torch.float64), [], "", (PHASES[LOSS], 0, 0))
        self._see_state(AFTER)
        # the optimizer was given clipped gradients
        divided = max(1.0, (result.grad_norm + 1e-6) / self._clip) if self._clip and np.isfinite(result.grad_norm) else 1.0
        self._see(DIVIDED, "clipping", torch.tensor(divided, dtype=torch.float64), [], "", (PHASES[DIVIDED], 0, 0))
        scales = {OUTPUT_GRADIENT: self._gradient_scale, INPUT_GRADIENT: self._gradient_scale, GRADIENT: divided}
        base = f"{self._stage.stack.base}."

        def scale(kind: str, name: str) -> float:
            # the head's gradients are taken inside the loss, before its weight
            return 1.0 if kind != GRADIENT and not name.startswith(base) else scales.get(kind, 1.0)

        seen = [replace(p, print=p.print.scaled(scale(p.kind, p.name))) for p in self._seen.values()]
        watched = [replace(p, values=p.values * scale(p.kind, p.name)) for p in self._watched]
        return seen, watched

    def _next_micro_batch(self, module: nn.Module, args: tuple) -> None:
        self._chunk = args[2] if len(args) > 2 else 0
        self._micro_batch = self._forwards[self._chunk]
        self._forwards[self._chunk] += 1
        self._calls.clear()
        self._tokens.clear()
        if self._stage.is_first and self._chunk == 0 and not args[0].is_floating_point():
            places, place = self._places.of_ids(args[0], self._micro_batch)
            self._see(IDS, "the ids that the step reads", args[0], places, place, (PHASES[IDS], 0, 0))

    def _input_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            x = input_of(args, kwargs)
            if x is None or _is_recomputed():
                return None
            where = self._located(INPUT, name, x)
            if not self._reads_a_stand_in(name):
                self._see_at(INPUT, name, x, where)
            if not (x.requires_grad and torch.is_grad_enabled()):
                return None
            x = x.view_as(x)  # its gradient is this module's own, without those of others that read the same tensor
            x.register_hook(self._gradient_hook(INPUT_GRADIENT, name, where))
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        return hook

    def _reads_a_stand_in(self, name: str) -> bool:
        """Whether a module comes before the layers, on a later stage: it reads the shape and type of hidden states alone."""
        stack, starts = self._stage.stack, self._stage.is_first and self._chunk == 0
        in_base = name.startswith(f"{stack.base}.") and not name.startswith(f"{stack.layers}.")
        return in_base and not starts and not any(name == after or name.startswith(f"{after}.") for after in stack.after)

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            y = output_of(output)
            if y is None or _is_recomputed():
                return
            where = self._located(OUTPUT, name, y)
            self._see_at(OUTPUT, name, y, where)
            if y.requires_grad and torch.is_grad_enabled():
                y.register_hook(self._gradient_hook(OUTPUT_GRADIENT, name, where))

        return hook

    def _gradient_hook(self, kind: str, name: str, where: tuple) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self._see_at(kind, name, gradient, where)

        return hook

    def _located(self, kind: str, name: str, tensor: torch.Tensor) -> tuple[list, str, bool, int, int]:
        """Return (for each dimension: elements of the part, where they are), which part it is, whether that is of the whole,
        the chunk of the model, and the number of this call."""
        grid, call = self._trainer.grid, self._calls[kind, name]
        chunk = grid.pipeline_rank if self._chunk == 0 else 2 * grid.pipeline - 1 - grid.pipeline_rank
        if name == self._stage.stack.head or not name.startswith(f"{self._stage.stack.base}."):
            found = self._places.of_head(kind, name, tensor, self._micro_batch, self._tokens[kind, name])
            self._tokens[kind, name] += tensor.shape[1] if tensor.ndim > 1 else 0
            call = 0
        else:
            found = self._places.of_activation(kind, name, tensor, self._micro_batch)
            self._calls[kind, name] += 1
        return *found, chunk, call

    def _see_at(self, kind: str, name: str, tensor: torch.Tensor, where: tuple[list, str, bool, int, int]) -> None:
        dims, place, is_placed, chunk, call = where
        for dim, (chosen, _) in enumerate(dims):
            if chosen is not None:
                tensor = tensor.index_select(dim, chosen.to(tensor.device))
        order = (PHASES[kind], -chunk if kind in (OUTPUT_GRADIENT, INPUT_GRADIENT) else chunk, self._count)
        name = f"{name} (call {call + 1})" if call else name
        if is_placed and not place.startswith(OF_READER) and (kind, name, place) in self._seen:
            return  # of places alone, as rotary angles are: each micro batch, and each chunk of layers, has the same
        self._see(kind, name, tensor, [there for _, there in dims], place, order, is_placed=is_placed)

    def _see(
        self, kind: str, name: str, tensor: torch.Tensor, places: list[torch.Tensor], place: str, order: tuple[int, int, int],
        *, is_placed: bool = True,
    ) -> None:  # fmt: skip
        self._count += 1
        key, rank = (kind, name, place), self._trainer.grid.rank
        print_, before = fingerprint(tensor, places), self._seen.get(key)
        if before is not None:  # another micro batch
            print_, order = before.print + print_, before.order
        self._seen[key] = PartSeen(kind, name, order, place, print_, rank, is_placed)
        if (kind, name) in self._watch:
            index = torch.zeros((), dtype=torch.int64)
            for dim, there in enumerate(places):
                index = index + there.cpu().view([-1 if d == dim else 1 for d in range(len(places))])
            flat = index.expand(tensor.shape).reshape(-1).numpy()
            self._watched.append(TensorPart(kind, name, place, flat, tensor.detach().double().cpu().reshape(-1).numpy()))

    def _see_state(self, when: str) -> None:
        for part in state_parts(self._trainer):
            if when is BEFORE or part.kind != COMPUTED:
                self._see_parameter(f"{part.kind} {when}", part, 0 if when is BEFORE else 6)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    for part in gradient_parts(self._trainer, flat):
                        self._see_parameter(GRADIENT, part, PHASES[GRADIENT])

    def _see_parameter(self, kind: str, part: StatePart, phase: int) -> None:
        kept = (part.index >= 0).nonzero().reshape(-1)
        values = part.values if kept.numel() == part.values.numel() else part.values[kept.to(part.values.device)]
        number = self._parameter_order[part.name]
        order = (phase, -number if kind == GRADIENT else number, 0 if part.kind == COMPUTED else 1)
        self._see(kind, part.name, values, [part.index[kept]], part.place, order)


def _is_recomputed() -> bool:
    """Whether this forward pass runs inside a backward pass: a repetition of one that was seen."""
    return torch._C._current_graph_task_id() != -1
