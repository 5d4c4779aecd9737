"""Makes operators of functions of tensors, each compiled by torch.compile: one kernel, or few, for a whole function.

Such an operator is a single one to autograd, to recomputation and to whatever counts operators. Nothing inside is kept for the
backward pass, which is an operator of its own that reads the inputs again. It is compiled when it first runs, once for each
shape; equal functions share an operator.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType

import torch

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor | Tensors]

_LIBRARY = torch.library.Library("trifold", "FRAGMENT")  # torch's own table of operators


@dataclass(frozen=True)
class Fusable:
    """A function of tensors without side effects or randomness."""

    name: str  # a word for people
    key: str  # equal only for equal functions
    inputs: int  # how many tensors it takes
    # of these, the first so many are not kept for the backward pass: the function is linear in them, and the result at the same
    # place has the shape of each
    linear: int = field(default=0, kw_only=True)
    rows_vary: bool = field(default=False, kw_only=True)  # from call to call: another number compiles it for any
    function: Function = field(compare=False, repr=False)


@functools.cache
def fused(fusable: Fusable) -> Function:
    """Return a function that computes the same by compiled operators, its gradients too."""
    forward = _forward_operator(fusable)

    def run(*inputs: torch.Tensor) -> torch.Tensor | Tensors:
        learn = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
        found = _Fused.apply(fusable, forward, *inputs) if learn else tuple(forward(list(inputs)))
        return found[0] if len(found) == 1 else found

    return run


@functools.cache
def fused_beside(fusable: Fusable) -> Function:
    """Return `fused(fusable)`, of one result, which in its backward pass adds all else that its first input's gradient is of.

    For an input that others read afterwards, as a residual addition reads the input of the norm before a block: one kernel then
    computes the norm's gradient and adds the other to it.
    """
    forward, alone = _forward_operator(fusable), fused(fusable)
    both = replace(fusable, key=f"{fusable.key} and its input", function=lambda *inputs: (fusable.function(*inputs), inputs[0]))

    def run(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        # Autograd is told that the input is overwritten, with what it is: from here on it is a result of this node for all who
        # hold it, which leaves and views cannot become. Its version stays, since what was saved of it before is still right.
        if not (torch.is_grad_enabled() and hidden.requires_grad) or hidden.is_leaf or hidden._is_view():
            return alone(hidden, *others)
        with torch.autograd._unsafe_preserve_version_counter(hidden):
            return _FusedBeside.apply(fusable, both, forward, hidden, *others)[0]

    return run


@functools.cache
def _forward_operator(fusable: Fusable) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    return compiled_operator(fusable.name, fusable.key, fusable.function, fusable.function, rows_vary=fusable.rows_vary)


def compiled_operator(
    name: str, key: str, function: Function, shapes: Function, *, rows_vary: bool = False
) -> Callable[[list[torch.Tensor]], list]:
    """Define an operator from a list of tensors to a list of tensors, none of them an input. Call it once for a key.

    shapes: computes, of tensors without memory, results of the same shapes.
    """
    full_name = f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    compiled = torch.compile(_of_its_own(function, full_name), fullgraph=True, dynamic=None if rows_vary else False)
    _LIBRARY.define(f"{full_name}(Tensor[] inputs) -> Tensor[]")
    _implement(full_name, lambda inputs: _listed(compiled(*_detached(inputs))))
    torch.library.register_fake(f"trifold::{full_name}", lambda inputs: _listed(shapes(*inputs)), lib=_LIBRARY)
    return getattr(torch.ops.trifold, full_name)


def _of_its_own(function: Function, name: str) -> Function:
    """Return the same function with code of its own: torch counts compilations by that, and gives up after eight."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def compiled_update(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Define an operator that overwrites its first tensor with what `function` computes of all. Call it once for a name.

    Results are rounded once, to the first tensor's precision.
    """

    def update(changed: torch.Tensor, *others: torch.Tensor) -> None:
        changed.copy_(function(changed, *others))

    compiled = torch.compile(_of_its_own(update, name), fullgraph=True, dynamic=False)

    def run(changed: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        compiled(changed.detach(), *_detached(others))
        return changed

    _LIBRARY.define(f"{name}(Tensor(a!) changed, Tensor[] others) -> Tensor(a!)")
    _implement(name, run)
    torch.library.register_fake(f"trifold::{name}", lambda changed, others: changed, lib=_LIBRARY)
    return getattr(torch.ops.trifold, name)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fusable: Fusable, forward: Callable, *inputs: torch.Tensor) -> Tensors:
        ctx.fusable = fusable
        ctx.save_for_backward(*inputs[fusable.linear :])
        return tuple(forward(list(inputs)))

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        inputs = (*grads[: ctx.fusable.linear], *ctx.saved_tensors)
        return None, None, *_gradients(ctx.fusable, grads, inputs, ctx.needs_input_grad[2:])


class _FusedBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fusable: Fusable, both: Fusable, forward: Callable, hidden: torch.Tensor, *others: torch.Tensor) -> Tensors:
        ctx.fusable, ctx.both = fusable, both
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden.data, *others)
        ctx.mark_dirty(hidden)
        (result,) = forward([hidden, *others])
        return result, hidden

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None, beside: torch.Tensor | None):
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if grad is None:  # nobody uses the result
            return None, None, None, beside, *[None] * (len(inputs) - 1)
        found = _gradients(ctx.fusable, (grad,), inputs, (beside is None, *wanted[1:]))
        if beside is not None:
            (found[0],) = _pullback(ctx.both, (0,))([grad, beside, *inputs])
        return None, None, None, *found


def _gradients(
    fusable: Fusable, grads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = [None] * len(inputs)
    for of_vectors in (False, True):  # a vector's gradient is a sum over the tokens: another loop over the same inputs
        chosen = tuple(i for i, each in enumerate(inputs) if wanted[i] and (each.ndim == 1) == of_vectors)
        if chosen:
            for index, grad in zip(chosen, _pullback(fusable, chosen)([*grads, *inputs]), strict=True):
                found[index] = grad
    return found


@functools.cache
def _pullback(fusable: Fusable, chosen: tuple[int, ...]) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Return the operator from [gradients of the results, inputs] to the gradients of the `chosen` inputs."""

    def gradients(*tensors: torch.Tensor) -> Tensors:
        grads, inputs = tensors[: -fusable.inputs], tensors[-fusable.inputs :]

        def of(*values: torch.Tensor) -> torch.Tensor | Tensors:
            given = list(inputs)
            for index, value in zip(chosen, values, strict=True):
                given[index] = value
            return fusable.function(*given)

        _, pull = torch.func.vjp(of, *(inputs[index] for index in chosen))
        return pull(grads if len(grads) > 1 else grads[0])

    def shapes(*tensors: torch.Tensor) -> Tensors:
        inputs = tensors[-fusable.inputs :]
        return tuple(torch.empty_like(inputs[index]) for index in chosen)

    key = f"{fusable.key} {chosen}"
    return compiled_operator(f"{fusable.name}_backward", key, gradients, shapes, rows_vary=fusable.rows_vary)


def _implement(name: str, run: Callable[..., object]) -> None:
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)


def _detached(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors as compiled code should see them: alike in training and evaluation, or it would be compiled twice."""
    return [each.detach() for each in tensors]


def _listed(found: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)
