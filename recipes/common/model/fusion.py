"""Fuses the elementwise work of decoder layers, whatever their family: norms, what MLPs do between their products, rotation.

Told from the model's own code, without naming a family:
- a norm is a module of vectors alone whose forward takes one tensor;
- an MLP's forward is traced with its linears as leaves, and what lies between them becomes one function each;
- so does what a mixture's experts do between their products, which transformers gives a name;
- the rotation is what an attention's forward calls by the name `apply_rotary_pos_emb`.
What does not fit stays as it is. Products, attention, dropout, collectives and hooks are outside.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from recipes.common.model.fused_ops import Fusable, fused, fused_beside
from recipes.common.model.linears import plain_linears, sum_input_gradients
from recipes.common.model.token_chunks import MLP_NAMES

NORMS, ACTIVATIONS, ROTATION = "norms", "activations", "rotation"
_ROTATION_NAME, _GATE_NAME = "apply_rotary_pos_emb", "_apply_gate"  # in transformers 5, exact

_FUNCTIONS = frozenset({
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.getitem, operator.gt,
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.square, torch.tanh, torch.sigmoid, torch.relu, torch.clamp,
    torch.chunk, torch.exp, torch.erf, F.silu, F.gelu, F.relu, F.relu6, F.sigmoid, F.tanh, F.softplus, F.mish, F.leaky_relu,
    torch._C._nn.gelu, torch._C._nn.silu,
})  # fmt: skip
_METHODS = frozenset({"chunk", "clamp", "square", "pow", "tanh", "sigmoid", "relu", "mul", "add"})
_VIEWS = frozenset({operator.getitem, torch.chunk})


def fuse_layer(layer: nn.Module) -> frozenset[str]:
    """Fuse what can be fused of a decoder layer, before its modules' forwards are wrapped. Returns which kinds of work."""
    done = set()
    for module in layer.modules():
        if _is_norm(module):
            _fuse_norm(module)
            done.add(NORMS)
        elif hasattr(type(module), _GATE_NAME) and _fuse_gate(module):
            done.add(ACTIVATIONS)
        elif _calls_rotation(module):
            _fuse_rotation(module)
            done.add(ROTATION)
    for name in MLP_NAMES:
        if (mlp := getattr(layer, name, None)) is not None and _fuse_mlp(mlp):
            done.add(ACTIVATIONS)
    sum_input_gradients(layer)
    return frozenset(done)


def _is_norm(module: nn.Module) -> bool:
    vectors = list(module.parameters(recurse=False))
    takes = inspect.signature(type(module).forward).parameters
    alone = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    return alone and bool(vectors) and all(p.ndim == 1 for p in vectors) and len(takes) == 2


def _fuse_norm(module: nn.Module) -> None:
    kind, names = type(module), [name for name, _ in module.named_parameters()]
    numbers = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    skeleton = copy.copy(module)  # its attributes without its weights
    skeleton._parameters = dict.fromkeys(names)

    def norm(hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(skeleton, dict(zip(names, weights, strict=True)), (hidden,))

    run = fused_beside(Fusable("norm", f"{kind.__module__}.{kind.__qualname__} {names} {numbers}", 1 + len(names), norm))
    module.forward = lambda hidden: run(hidden, *(getattr(module, name) for name in names))


def _calls_rotation(module: nn.Module) -> bool:
    forward = type(module).forward
    return isinstance(forward, FunctionType) and _ROTATION_NAME in forward.__code__.co_names


def _fuse_rotation(module: nn.Module) -> None:
    """Give the attention its own forward again, in which the name of the rotation means the fused one."""
    forward = type(module).forward
    rotation = forward.__globals__[_ROTATION_NAME]
    known = {**forward.__globals__, _ROTATION_NAME: partial(_rotate, rotation)}
    own = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(own, module)


def _rotate(rotation: Callable, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(rotation).bind(*args, **kwargs)
    tensors = [name for name, value in bound.arguments.items() if isinstance(value, torch.Tensor)]
    others = {name: value for name, value in bound.arguments.items() if name not in tensors}

    def rotate(*values: torch.Tensor) -> Any:
        return rotation(**dict(zip(tensors, values, strict=True)), **others)

    key = f"{rotation.__module__}.{rotation.__qualname__} {tensors} {others}"
    linear = 2 if tensors[:2] == ["q", "k"] else 0
    return fused(Fusable("rotation", key, len(tensors), rotate, linear=linear))(*(bound.arguments[name] for name in tensors))


class _LeafTracer(torch.fx.Tracer):
    """Traces into modules without parameters, the activations; not into dropout, which draws numbers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Dropout) or any(True for _ in m.parameters())


class _Elementwise(OperatorSupportBase):
    def is_node_supported(self, submodules: Any, node: torch.fx.Node) -> bool:
        if node.kwargs.get("inplace", False):
            return False
        return (node.op == "call_function" and node.target in _FUNCTIONS) or (
            node.op == "call_method" and node.target in _METHODS
        )


def _fuse_gate(experts: nn.Module) -> bool:
    """Fuse what experts do to [rows, width] between their products. Returns whether it can be traced."""
    skeleton, tracer = copy.copy(experts), _LeafTracer()
    skeleton._parameters, tracer.traced_func_name = {}, _GATE_NAME
    try:
        graph = tracer.trace(skeleton)
    except Exception:  # a family's code may raise anything over what stands for its tensors
        return False
    takes = sum(node.op == "placeholder" for node in graph.nodes)
    if takes != 1 or not _is_elementwise(graph, ("placeholder", "output")):
        return False
    gate = torch.fx.GraphModule(skeleton, graph)
    # where ranks share experts, a router decides how many rows there are
    setattr(experts, _GATE_NAME, fused(Fusable("gate", str(graph), takes, gate.forward, rows_vary=True)))
    return True


def _is_elementwise(graph: torch.fx.Graph, others: tuple[str, ...]) -> bool:
    """Return whether nodes compute element by element, but for those of the kinds in `others`."""
    elementwise = _Elementwise()
    return all(node.op in others or elementwise.is_node_supported({}, node) for node in graph.nodes)


def _fuse_mlp(mlp: nn.Module) -> bool:
    """Fuse what an MLP does between its linears. Returns whether there is any of it that can be traced."""
    if not plain_linears(mlp):
        return False
    try:
        graph = _LeafTracer().trace(mlp)
    except Exception:  # a family's code may raise anything over what stands for its tensors: experts, for example
        return False
    if not _is_elementwise(graph, ("placeholder", "call_module", "output")):
        return False  # a number may have been read that changes, such as whether the model trains
    traced = torch.fx.GraphModule(mlp, graph)
    parts = CapabilityBasedPartitioner(traced, _Elementwise(), allows_single_node_partition=True)
    found = [part for part in parts.propose_partitions() if any(node.target not in _VIEWS for node in part.nodes)]
    if not found:
        return False
    whole = parts.fuse_partitions(found, prefix="fused_")
    for name, part in list(whole.named_children()):
        if name.startswith("fused_"):
            delattr(whole, name)
            takes = sum(node.op == "placeholder" for node in part.graph.nodes)
            setattr(whole, name, fused(Fusable("activation", str(part.graph), takes, part.forward)))
    mlp.forward = whole.forward
    return True
