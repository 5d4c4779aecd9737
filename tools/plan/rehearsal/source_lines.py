"""Finds the line of source that an operator comes from: the innermost one of Trifold, transformers or DeepSpeed.

Backward operators have no line of their own: they get that of the forward operator whose node they belong to, by the number that
autograd gives both.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import CodeType

import torch

from recipes.common.recipe import ROOT

_PACKAGES = ("/site-packages/transformers/", "/site-packages/deepspeed/")
_AUTOGRAD = "/torch/autograd/graph.py"  # where the engine is entered: callers beyond it know nothing of a node
_OWN = str(ROOT) + "/"
_STAND_INS = str(ROOT / "tools" / "plan" / "rehearsal") + "/"
_LOSS = "/recipes/common/parallel/cross_entropy.py"
_UNKNOWN = "elsewhere"
LAYER, LOSS, ELSEWHERE = "layer", "loss", ""  # where in the model
# what lies between a module's line and the operator, the same for every module
_PASSED_OVER = frozenset(
    f"recipes/common/{name}.py"
    for name in (
        "model/linears", "model/recompute", "model/host_activations", "parallel/tensor_styles", "parallel/tensor_parallel",
        "runtime/step_clock", "engine/deepspeed_timers",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where an operator comes from."""

    line: str  # "transformers/models/llama/modeling_llama.py:62"
    place: str = ELSEWHERE  # LAYER: of a decoder layer's forward or backward pass; LOSS
    backward: bool = False


class SourceLines:
    """Finds lines in one process, whose decoder layers it is told."""

    def __init__(self) -> None:
        self._names: dict[str, str | None] = {}
        self._layer_code: set[CodeType] = set()
        self._forward: dict[int, Origin] = {}  # by the node's number

    def watch_layers(self, layers: list[torch.nn.Module]) -> None:
        self._layer_code = {inspect.unwrap(type(layer).forward).__code__ for layer in layers}

    def origin(self) -> Origin:
        """Return the origin of the operator that is being called."""
        node = torch._C._current_autograd_node()
        line, place, engine = _UNKNOWN, ELSEWHERE, False
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if line is _UNKNOWN and not engine:
                if node is not None and code.co_filename.endswith(_AUTOGRAD):
                    engine = True
                elif (name := self._name(code.co_filename)) is not None:
                    line = f"{name}:{frame.f_lineno}"
            if code in self._layer_code or code.co_filename.endswith(_LOSS):
                place = LAYER if code in self._layer_code else LOSS
                break
            frame = frame.f_back
        if node is None:
            found = Origin(line, place)
            self._forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, found)
            return found
        started = self._forward.get(node._sequence_nr())
        if started is not None:
            line = started.line if line is _UNKNOWN else line
            place = place or started.place
        if place == LAYER:  # recomputed, perhaps: its nodes are new ones
            self._forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, Origin(line, LAYER))
        return Origin(line, place, backward=True)

    def here(self, lines: int = 1) -> str:
        """Return the innermost lines of source that are running, innermost first."""
        found: list[str] = []
        frame = sys._getframe(1)
        while frame is not None and len(found) < lines:
            if (name := self._name(frame.f_code.co_filename)) is not None:
                found.append(f"{name}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(found) or _UNKNOWN

    def forget_nodes(self) -> None:
        """Drop what is known of a step's nodes: its backward pass is over."""
        self._forward.clear()

    def _name(self, file: str) -> str | None:
        if file not in self._names:
            self._names[file] = _short(file)
        return self._names[file]


def _short(file: str) -> str | None:
    """Return a source file's name as reports show it; None for those that no report names."""
    for package in _PACKAGES:
        if package in file:
            return file[file.index(package) + len("/site-packages/") :]
    own = file.startswith(_OWN) and not file.startswith(_STAND_INS) and "/site-packages/" not in file
    name = file.removeprefix(_OWN)
    return name if own and name not in _PASSED_OVER else None
