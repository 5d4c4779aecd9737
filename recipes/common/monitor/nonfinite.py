"""Finds where a NaN or an infinity came from: the first tensor that was not finite, by name.

Every step is judged by its gradient norm before the optimizer changes anything, and skipped on all ranks alike where that is
not finite; a loss that is not finite makes the norm so (`Stage.loss`). That costs nothing. The skipped step is
then repeated with hooks on every module and parameter. The weights have not changed, and the repetition is not applied either:
its gradients are made NaN once they have been inspected. So this works with a pipeline and without, for every ZeRO stage and
precision, and does not depend on how they store gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.model.main_grads import autograds_gradients
from recipes.common.model.sharding import Holdings
from recipes.common.monitor.parameter_groups import group_of
from recipes.common.parallel.json_messages import gather_json

# in the order in which one causes the next
WEIGHT, ACTIVATION, LOSS, GRADIENT, UNREPEATED = "weight", "activation", "loss", "gradient", "unrepeated"
_KINDS = (WEIGHT, ACTIVATION, LOSS, GRADIENT)


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """The first non-finite tensor of a step. Equal on every rank."""

    kind: str  # WEIGHT, ACTIVATION, LOSS or GRADIENT; UNREPEATED: all was finite in the repetition
    name: str = ""  # parameter or module by its Hugging Face name; for an activation "output of ..." or "input of ..."
    value: str = ""  # "NaN" or "Infinity"
    count: int = 0  # elements of that tensor
    layer: int | None = None
    stage: int = 0
    data_rank: int = 0
    tensor_rank: int = 0
    micro_batch: int | None = None  # None for a weight
    hit: tuple[tuple[int, int], ...] = ()  # every (data rank, micro batch) in which this kind was not finite
    micro_batches: int = 0  # of all data ranks together
    sequences: tuple[int, int] | None = None  # [start, stop) of that micro batch, counted from the step's first sequence
    gradients: tuple[tuple[str, int], ...] = ()  # parameter -> non-finite elements of its gradient, of the worst micro batch

    def __str__(self) -> str:
        if self.kind == UNREPEATED:
            return "not finite, but finite when the step was repeated: suspect the hardware"
        where = f"stage {self.stage}, data rank {self.data_rank}, tensor rank {self.tensor_rank}"
        text = f"{self.value} ({self.count} elements) first in the {self.kind} {self.name}, {where}"
        if self.micro_batch is None or self.sequences is None:
            return text
        first, last = self.sequences[0], self.sequences[1] - 1
        text += f", micro batch {self.micro_batch} (sequences {first} to {last} of the step)"
        return f"{text}; in {len(self.hit)} of {self.micro_batches} micro batches"


@dataclass(frozen=True)
class _Finding:
    kind: str
    name: str
    value: str
    count: int
    micro_batch: int
    order: int  # of what this rank found


@dataclass(frozen=True)
class _RankReport:
    """What one rank found."""

    stage: int
    data_rank: int
    tensor_rank: int
    findings: list[_Finding]
    gradients: dict[str, int]  # parameter -> non-finite elements of its gradient, of this rank's worst micro batch


def find_nonfinite(trainer: Trainer, micro_batches: list[torch.Tensor], scored_tokens: int) -> NonFinite:
    """Return what was not finite first in the step that was just skipped. Collective; the arguments are those of `train_step`."""
    search = _Search(trainer)
    scaler = zero_state.scaler_state(trainer)
    torch.manual_seed(torch.initial_seed())  # the loop seeds each step: dropout falls as it did
    with autograds_gradients(trainer.stage.parameters()), search.hooks():
        trainer.run_micro_batches(micro_batches, scored_tokens)
    zero_state.restore_scaler(trainer, scaler)  # the repetition is no second overflow
    search.judge_loss()
    grid = trainer.grid
    own = _RankReport(grid.pipeline_rank, grid.data_rank, grid.tensor_rank, search.findings, dict(search.gradients))
    reports = [_received(fields) for fields in gather_json(asdict(own), grid.device)]
    sizes = {"data": grid.data, "context": grid.context, "micro_seqs": trainer.micro_seqs}
    held = trainer.stage.held
    return _first(reports, len(micro_batches), held=held, **sizes)


def _received(fields: dict[str, Any]) -> _RankReport:
    return _RankReport(**{**fields, "findings": [_Finding(**finding) for finding in fields["findings"]]})


class _Search:
    """Collects what one rank finds while a step is repeated."""

    def __init__(self, trainer: Trainer) -> None:
        self.findings: list[_Finding] = []
        self.gradients: Counter[str] = Counter()
        self._trainer, self._stage = trainer, trainer.stage
        self._micro_batch = -1
        self._forwards: Counter[int] = Counter()  # by chunk
        self._backwards: Counter[str] = Counter()
        self._marked: set[tuple[str, int]] = set()  # (kind, micro batch): only the first counts
        for name, parameter in self._stage.hf_named_parameters():
            self._inspect(WEIGHT, name, getattr(parameter, "ds_tensor", parameter), -1)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[RemovableHandle] = [self._stage.register_forward_pre_hook(self._next_micro_batch)]
        nodes = []
        for name, module in self._stage.causal.named_modules():
            if name and not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(self._activation_hook(f"input of {name}")))
            if name:
                handles.append(module.register_forward_hook(self._activation_hook(f"output of {name}")))
        for name, parameter in self._stage.hf_named_parameters():
            if parameter.requires_grad:
                # on the node, not on the tensor: a tensor's hook also fires where the loss asks for the head's gradient itself
                # and kept: autograd would drop it, and the hook with it. ZeRO 3: a node remembers the shape that it was made with
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
                    nodes.append(get_gradient_edge(parameter).node)
                handles.append(nodes[-1].register_prehook(self._gradient_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def judge_loss(self) -> None:
        """Find a loss that was not finite though everything before it was: in the micro batch whose gradients were so first."""
        sums, kinds = self._stage.loss_sums, {kind for kind, _ in self._marked}
        if self._stage.is_last and not bool(sums.isfinite().all()) and not {WEIGHT, ACTIVATION} & kinds:
            micro_batch = min((micro_batch for kind, micro_batch in self._marked if kind == GRADIENT), default=0)
            self._inspect(LOSS, "cross-entropy", sums[:1], micro_batch)

    def _next_micro_batch(self, module: nn.Module, args: tuple) -> None:
        chunk = args[2] if len(args) > 2 else 0
        self._micro_batch = self._forwards[chunk]
        self._forwards[chunk] += 1

    def _activation_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any = None) -> None:
            # recomputation runs a layer inside a backward pass, when the count is at another micro batch
            if torch._C._current_graph_task_id() == -1:
                for tensor in _tensors(args if output is None else output):
                    self._inspect(ACTIVATION, name, tensor, self._micro_batch)

        return hook

    def _gradient_hook(self, name: str) -> Callable[[tuple[torch.Tensor | None, ...]], tuple[torch.Tensor, ...] | None]:
        def hook(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...] | None:
            (gradient,) = gradients
            if gradient is None:  # a schedule defers it: the hook is called again
                return None
            micro_batch = self._backwards[name]
            self._backwards[name] += 1
            count = int((~gradient.isfinite()).sum())
            self.gradients[name] = max(self.gradients[name], count)
            self._inspect(GRADIENT, name, gradient, micro_batch)
            return (torch.full_like(gradient, torch.nan),)  # the norm will not be finite: the repetition changes no weight

        return hook

    @torch.no_grad()  # a layer that is recomputed must save what it saved before
    def _inspect(self, kind: str, name: str, tensor: torch.Tensor, micro_batch: int) -> None:
        try:
            if (kind, micro_batch) in self._marked or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                return
            value = "NaN" if bool(tensor.isnan().any()) else "Infinity"
            count = int((~tensor.isfinite()).sum())
        except Exception:  # a tensor of a kind that cannot be asked: the others are, and no rank waits for this one
            return
        self._marked.add((kind, micro_batch))
        self.findings.append(_Finding(kind, name, value, count, micro_batch, len(self.findings)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _first(
    reports: list[_RankReport], micro_batches: int, *, micro_seqs: int, data: int, context: int, held: Holdings
) -> NonFinite:
    """Return the cause of all that the ranks found. micro_batches: per data rank. held: how this rank's parameters are shared."""
    found = [(report, finding) for report in reports for finding in report.findings]
    if not found:
        return NonFinite(kind=UNREPEATED, micro_batches=micro_batches * data)
    first, finding = min(found, key=lambda item: _order(*item))
    start = (finding.micro_batch * (data // context) + first.data_rank // context) * micro_seqs
    by_batch = finding.kind != WEIGHT
    return NonFinite(
        kind=finding.kind,
        name=finding.name,
        value=finding.value,
        count=finding.count,
        layer=group_of(finding.name.rpartition(" ")[2])[0],
        stage=first.stage,
        data_rank=first.data_rank,
        tensor_rank=first.tensor_rank,
        micro_batch=finding.micro_batch if by_batch else None,
        hit=tuple(sorted({(r.data_rank, f.micro_batch) for r, f in found if f.kind == finding.kind and by_batch})),
        micro_batches=micro_batches * data,
        sequences=(start, start + micro_seqs) if by_batch else None,
        gradients=_gradient_counts(reports, held),
    )


def _order(report: _RankReport, finding: _Finding) -> tuple[int, ...]:
    """Return a key by which causes come before what they cause."""
    passed = -report.stage if finding.kind == GRADIENT else report.stage  # backward goes from the last stage to the first
    kind = _KINDS.index(finding.kind)
    return kind, finding.micro_batch, passed, finding.order, report.data_rank, report.tensor_rank


def _gradient_counts(reports: list[_RankReport], held: Holdings) -> tuple[tuple[str, int], ...]:
    """Return (parameter, non-finite elements): the most of any data rank, summed over the parts of a sharded parameter."""
    worst: dict[str, Counter[tuple[int, int]]] = {}  # parameter -> part -> elements
    for report in reports:
        for name, count in report.gradients.items():
            by_part = worst.setdefault(name, Counter())
            part = (
                report.tensor_rank if name in held.shards else 0,
                report.data_rank % held.expert if name in held.banks else 0,
            )
            by_part[part] = max(by_part[part], count)
    counts = {name: by_part.total() for name, by_part in worst.items()}
    return tuple((name, count) for name, count in sorted(counts.items()) if count)
