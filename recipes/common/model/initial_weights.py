"""Draws initial weights, equal in every layout, module by module from generators keyed by names.

The family's own `_init_weights` draws them, on the whole tensors of one module at a time, on the CPU; then the shard is taken. Of
a module with large parameters it is asked what it would draw, and only the shard is drawn (shard_draws), unless it does more than
that can repeat. So the first step of a run does not depend on its layout, and no rank ever holds more than one whole module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from recipes.common.model.shard_draws import draw_shard, recorded_calls
from recipes.common.model.sharding import Holdings
from recipes.common.model.varlen_attention import built_as

INITIAL_WEIGHTS_VERSION = 2  # of what `draw_weights` draws: a run's record holds it; a test holds what it stands for
SEED_VERSION = 1  # of `name_seed`, and of the names that dropout gives it (recipes.common.parallel.dropout), likewise
# of router biases, exact, in transformers 5: what a router adds to its scores to choose by, and no gradient reaches
ROUTER_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_SMALL = 4096  # elements: constants that a constructor computes (an activation's slope) are this small
_DRAWN_BY_SHARDS = 1 << 22  # elements: of a parameter, from which on its module is drawn by shards; smaller ones take no time
_LARGE = 1 << 20  # elements: weights, which must not be allocated for even a moment (one layer's experts may fill a machine)


class _LargeOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            sizes = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            if math.prod(sizes) >= _LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters on the meta device as they are registered; constructors run for real, so buffers hold their values.

    torch.device("meta") would lose the buffers. A small parameter keeps its first value as `constructed`: some families set
    constants in the constructor that `_init_weights` does not know.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            first = parameter.data if parameter.numel() <= _SMALL else None
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
            parameter.constructed = first
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build_empty(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """Build the family's ForCausalLM in fp32 with its parameters on the meta device (no memory, no weights).

    The bias of a router's choices is a buffer, also where the family makes it a frozen parameter: no optimizer gets it,
    checkpoints and exports hold it under its name. Other frozen parameters stay what they are. What a constructor draws by
    itself (phi4_multimodal's probe) is the same on every rank.
    """
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(), _LargeOnMeta(), no_init_weights():
        torch.default_generator.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=built_as(attention), trust_remote_code=False
        )
        causal.tie_weights()
    _make_buffers(causal)
    lost = [name for name, buffer in causal.named_buffers() if buffer.is_meta]
    if lost:
        raise ValueError(f"{type(causal).__name__} leaves the buffers {lost} empty, and they are too large to be a constant")
    return causal


def _make_buffers(causal: PreTrainedModel) -> None:
    for module in causal.modules():
        for leaf, parameter in list(module._parameters.items()):
            if leaf in ROUTER_BIASES and parameter is not None and not parameter.requires_grad:
                del module._parameters[leaf]
                module.register_buffer(leaf, torch.zeros(parameter.shape))  # as families start it


def draw_weights(causal: PreTrainedModel, root: nn.Module, prefix: str, *, seed: int | None, held: Holdings) -> None:
    """Give every module at or under `root` (whose name in the whole model is `prefix`) its initial weights.

    `causal` and the models in it lend their `_init_weights`; held: what this rank keeps of them. seed: None to draw nothing and
    leave NaN, which takes no time: a checkpoint is loaded.
    """
    if seed is None:
        _leave_empty(root, prefix, held)
        return
    for name, module, submodules in list(_units(causal, root, prefix)):
        owner = _owner(causal, name)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(name_seed(seed, name))  # `torch.manual_seed` takes 5 ms: it asks every device
            large = any(parameter.numel() >= _DRAWN_BY_SHARDS for parameter in module.parameters())
            calls = recorded_calls(owner, submodules) if large else None
            if calls is None:
                _draw_whole(owner, name, submodules)
        for child_name, child in submodules:
            for leaf, parameter in list(child.named_parameters(recurse=False)):
                whole_name = f"{child_name}.{leaf}"
                own = held.of(whole_name)
                if calls is None:
                    data = own.take(parameter.data)
                else:
                    data = draw_shard(seed, whole_name, calls[whole_name], tuple(parameter.shape), own)
                child._parameters[leaf] = nn.Parameter(data, requires_grad=parameter.requires_grad)


def _leave_empty(root: nn.Module, prefix: str, held: Holdings) -> None:
    """Give every parameter at or under `root` the shape that this rank holds, and NaN, zero where it is padded."""
    for name, module in root.named_modules(prefix=prefix):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            own, whole = held.of(f"{name}.{leaf}" if name else leaf), tuple(parameter.shape)
            data = torch.zeros(own.shape(whole))
            own.fill(data, whole, torch.nan)
            module._parameters[leaf] = nn.Parameter(data, requires_grad=parameter.requires_grad)


def _units(causal: PreTrainedModel, root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, list]]:
    """Yield the smallest subtrees that `_init_weights` treats as one: (name, root, modules), children first as in transformers.

    A module with parameters is one; so is a container that re-draws its children's (GPT-2 scales its output projections
    from the attention block). A trial on the meta device costs nothing and shows in the parameters' version counters.
    """
    if any(True for _ in root.children()) and not _own(root):
        before = [p._version for p in root.parameters()]
        _owner(causal, prefix)._init_weights(root)
        if before == [p._version for p in root.parameters()]:
            for leaf, child in root.named_children():
                yield from _units(causal, child, f"{prefix}.{leaf}" if prefix else leaf)
            return
    if isinstance(root, PreTrainedModel) and _own(root):  # apart from the parameters of its layers, which other stages have
        for leaf, child in root.named_children():
            yield from _units(causal, child, f"{prefix}.{leaf}" if prefix else leaf)
        yield prefix, root, [(prefix, root)]
        return
    modules = [(".".join(filter(None, (prefix, name))), module) for name, module in root.named_modules()]
    if any(True for _ in root.parameters()):
        yield prefix, root, modules[::-1]


def _owner(causal: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the innermost model that the module `name` is in or is: its `_init_weights` may read its own attributes."""
    owner: PreTrainedModel = causal
    module: nn.Module = causal
    for leaf in filter(None, name.split(".")):
        found = getattr(module, leaf, None)
        if found is None:  # taken out of the model
            break
        module = found
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner


def _own(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _draw_whole(causal: PreTrainedModel, unit: str, submodules: list) -> None:
    constants = _materialise(submodules)
    for _, child in submodules:
        causal._init_weights(child)
    _finish(unit, submodules, constants)


def _materialise(submodules: list) -> dict[tuple[str, str], torch.Tensor | None]:
    constants = {}
    for name, child in submodules:
        for leaf, parameter in list(child.named_parameters(recurse=False)):
            constants[name, leaf] = getattr(parameter, "constructed", None)
            data = torch.full(parameter.shape, float("nan"), dtype=torch.float32)
            child._parameters[leaf] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    return constants


def _finish(unit: str, submodules: list, constants: dict[tuple[str, str], torch.Tensor | None]) -> None:
    """Give what `_init_weights` left alone its constructor's value. Raises ValueError for a parameter with neither."""
    for name, child in submodules:
        for leaf, parameter in child.named_parameters(recurse=False):
            if not (parameter.sum().isnan() and parameter.isnan().any()):  # the sum is several times faster
                continue
            constant = constants[name, leaf]
            if constant is None or not constant.isfinite().all():
                raise ValueError(f"transformers does not initialise {name}.{leaf} of {type(child).__name__}")
            parameter.data.copy_(constant)


def name_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed from the recipe's seed and a name; the same on every machine and Python."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1
