"""Finds the routers of a mixture of experts in a Hugging Face model, and plans which losses they get.

A family says itself which modules are its routers and which of their outputs are the logits: `_can_record_outputs`, by which
`transformers` collects `router_logits`. The loss that balances the experts is the family's own where it has one
(`load_balancing_loss_func`, beside its ForCausalLM), with the coefficient of its config.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.initial_weights import ROUTER_BIASES
from recipes.common.model.linears import plain_linears
from recipes.common.recipe import Router

MICRO_BATCH, SEQUENCE, GLOBAL_BATCH = "micro_batch", "sequence", "global_batch"
ROUTER_LOSSES = (MICRO_BATCH, SEQUENCE, GLOBAL_BATCH)
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of the ForCausalLM classes that compute the loss
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
_ROWS, _ROUNDED = 64, 0.005  # tokens by which a router's scores are told, and how far 16 bits may move their shares
_LOSS = "load_balancing_loss_func"
_LOSS_ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class PlannedRouter:
    """One router of the whole model."""

    name: str  # the module's, from the ForCausalLM's root
    layer: int
    logits: int  # which of the module's outputs
    bias: str | None  # the correction that its choices read and that no gradient reaches


@dataclass(frozen=True, kw_only=True)
class RouterPlan:
    """A model's routers, in the order of its layers, and what trains them beside the model's loss."""

    routers: tuple[PlannedRouter, ...]
    experts: int  # that a token may choose from
    chosen: int  # experts of a token
    loss: str | None  # one of ROUTER_LOSSES
    coefficient: float  # 0: there is no such loss
    z_loss: float
    bias_rate: float
    count_ahead: bool
    fp32: bool

    @property
    def balances(self) -> bool:
        """Return whether a loss balances the experts."""
        return bool(self.routers) and self.loss is not None and self.coefficient != 0


def find_routers(causal: PreTrainedModel, stack: Stack) -> dict[str, tuple[int, int]]:
    """Return name -> (layer, which output holds the logits) of the routers that the family declares and that are present."""
    owners = (type(causal), type(causal.get_submodule(stack.base)))
    tables = (getattr(owner, "_can_record_outputs", None) or {} for owner in owners)
    declared = next((table["router_logits"] for table in tables if "router_logits" in table), None)
    recorders = declared if isinstance(declared, list | tuple) else [declared]
    places = {getattr(each, "target_class", each): getattr(each, "index", 0) for each in recorders}
    found = {}
    for name, module in causal.named_modules():
        if type(module) in places and name.startswith(f"{stack.layers}."):
            layer = int(name.removeprefix(f"{stack.layers}.").partition(".")[0])
            found[name] = layer, places[type(module)]
    return found


def plan_routers(causal: PreTrainedModel, stack: Stack, router: Router) -> RouterPlan:
    """Plan what `router` asks for. causal: the whole model. Raises PlanError for what the family cannot have."""
    found = find_routers(causal, stack)
    coefficient = router.coefficient
    if coefficient is None:
        coefficient = family_coefficient(causal) or 0.0
    experts, chosen = _number(causal, _EXPERTS), _number(causal, _CHOSEN)
    trains = bool(router.loss is not None and coefficient) or bool(router.z_loss or router.bias_rate)
    if found and not (experts and chosen):
        if trains:
            names = ", ".join((*_EXPERTS, *_CHOSEN))
            raise PlanError(
                f"model_type={causal.config.model_type}: none of {names} says how many experts there are and are chosen"
            )
        found = {}
    biases = {name: bias for name in found if (bias := _bias_of(causal, name)) is not None}
    if found and router.loss in (MICRO_BATCH, GLOBAL_BATCH) and coefficient:
        _check_loss(causal)
    tensors = dict(causal.named_parameters()) | dict(causal.named_buffers())
    if router.bias_rate and not (biases and all(tensors[bias].numel() == experts for bias in biases.values())):
        asked, family = f"router.bias_rate={router.bias_rate}", causal.config.model_type
        raise PlanError(f"{asked}: model_type={family} has no bias of its {experts} experts that its routers add")
    return RouterPlan(
        routers=tuple(
            PlannedRouter(name=name, layer=layer, logits=place, bias=biases.get(name)) for name, (layer, place) in found.items()
        ),
        # a bias also counts experts that compute nothing, which the config counts apart (Zaya's, LongCat's)
        experts=max([tensors[bias].numel() for bias in biases.values()], default=experts),
        chosen=chosen,
        loss=router.loss,
        coefficient=coefficient,
        z_loss=router.z_loss,
        bias_rate=router.bias_rate,
        count_ahead=router.count_ahead,
        fp32=router.fp32,
    )


def family_coefficient(causal: PreTrainedModel) -> float | None:
    """Return the weight of the router loss that the family's ForCausalLM itself computes; None where it computes none."""
    if not hasattr(sys.modules[type(causal).__module__], _LOSS):
        return None
    holders = (causal, causal.config.get_text_config())
    return next((value for h in holders for name in _COEFFICIENTS if (value := getattr(h, name, None)) is not None), None)


def compute_in_fp32(router: nn.Module, logits: int) -> None:
    """Let a router compute in fp32 with the weights it has. The logits stay fp32; other results get the family's own types.

    logits: which of its outputs. Call it after linears are routed: no weight gradient of a router is deferred then.
    """
    inner, types = router.forward, []
    for linear in plain_linears(router):
        linear.weight_grad_store = None

    def run(*args: Any, **kwargs: Any) -> Any:
        if not types:
            with torch.no_grad(), _disable_current_modes():  # selective recomputation would count its products
                types.extend(getattr(output, "dtype", None) for output in _as_tuple(inner(*args, **kwargs)))
        with _parameters_as(router, _wide):
            result = inner(*(_wide(each) for each in args), **{name: _wide(each) for name, each in kwargs.items()})
        outputs = _as_tuple(result)
        outputs = tuple(
            output.to(kind) if place != logits and torch.is_tensor(output) else output
            for place, (output, kind) in enumerate(zip(outputs, types, strict=True))
        )
        return outputs if isinstance(result, tuple) else outputs[0]

    router.forward = run


def weighs_by_sigmoid(router: nn.Module, logits: int, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether a router's weights are in proportion to sigmoids of its logits; to a softmax, or to something else, if not.

    Tried with weights and hidden states of its own: a router that starts at zero weighs alike either way. args, kwargs: of a
    call, the hidden states first. logits: which of its outputs.
    """
    dice = torch.Generator().manual_seed(0)

    def drawn(parameter: torch.Tensor) -> torch.Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 has none of it here
        width = shape[-1] if shape else 1
        return (torch.randn(shape, generator=dice) / width**0.5).to(parameter.device, parameter.dtype)

    leading = args[0].shape[:-1]

    def tokens(value: Any) -> Any:
        if not _is_by_token(value, leading):
            return value
        return torch.randn(*(1,) * (value.ndim - 2), _ROWS, value.shape[-1], generator=dice).to(value.device, value.dtype)

    devices = [args[0].device] if args[0].device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _parameters_as(router, drawn):
        outputs = _as_tuple(router.forward(*map(tokens, args), **{name: tokens(value) for name, value in kwargs.items()}))
    scores = outputs[logits].float().sigmoid()
    weights, chosen = _choices(outputs, logits)
    of_chosen = scores.gather(1, chosen.long())
    number = chosen.shape[1]
    if number > 1:  # shares of the chosen, to less than a softmax of such logits differs from sigmoids
        of_chosen, weights = of_chosen / of_chosen.sum(-1, keepdim=True), weights / weights.sum(-1, keepdim=True)
    else:  # of one expert they are 1: how the weight differs between tokens
        of_chosen, weights = of_chosen / of_chosen.mean(), weights / weights.mean()
    return (of_chosen - weights).abs().mean().item() * number < _ROUNDED


def of_one_token(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return a router's call, the hidden states first, with one token of all that it has for each."""
    leading = args[0].shape[:-1]

    def cut(value: Any) -> Any:
        return value.detach()[..., :1, :].clone() if _is_by_token(value, leading) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def _is_by_token(value: Any, leading: torch.Size) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1 and value.shape[:-1] == leading


def weighs_choices(outputs: tuple, logits: int) -> bool:
    """Return whether a router's outputs hold what it chose for each token, and the weights of that."""
    return _ids_of(outputs) is not None or _dense(outputs, logits) is not None


def _choices(outputs: tuple, logits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights [rows, chosen] of the experts that each token chose, and their ids."""
    found = _ids_of(outputs)
    if found is None:  # of every expert, 0 where it is not chosen: Llama 4's
        dense = _dense(outputs, logits).float()
        found = dense.topk(int((dense != 0).sum(-1).max()), dim=-1)
    return found[0].float(), found[1]


def _ids_of(outputs: tuple) -> tuple[torch.Tensor, torch.Tensor] | None:
    chosen = next((output for output in outputs if _are_ids(output)), None)
    weights = next((output for output in outputs if chosen is not None and _weigh(output, chosen)), None)
    return None if weights is None else (weights, chosen)


def _dense(outputs: tuple, logits: int) -> torch.Tensor | None:
    return next((out for place, out in enumerate(outputs) if place != logits and _weigh(out, outputs[logits])), None)


def _are_ids(output: Any) -> bool:
    return torch.is_tensor(output) and output.dtype in (torch.int64, torch.int32) and output.ndim == 2


def _weigh(output: Any, like: torch.Tensor) -> bool:
    return torch.is_tensor(output) and output.is_floating_point() and output.shape == like.shape


@contextmanager
def _parameters_as(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put others in the place of parameters; where they are computed from them, autograd leads back."""
    held = [(each, dict(each._parameters)) for each in module.modules()]
    try:
        for each, parameters in held:
            each._parameters.update({name: p if p is None else change(p) for name, p in parameters.items()})
        yield
    finally:
        for each, parameters in held:
            each._parameters.update(parameters)


def _wide(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def _as_tuple(result: Any) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _number(causal: PreTrainedModel, names: tuple[str, ...]) -> int:
    """Return a number of the model by one of its names; 0 if it has none."""
    config = causal.config.get_text_config()
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    # the ForCausalLM's attributes are what it gives its own loss
    values = (getattr(holder, name, None) for holder in (causal, config, *nested) for name in names)
    return next((value for value in values if isinstance(value, int) and value), 0)


def _check_loss(causal: PreTrainedModel) -> None:
    own = getattr(sys.modules[type(causal).__module__], _LOSS, None)
    if own is not None and own.__code__.co_varnames[: own.__code__.co_argcount] != _LOSS_ARGUMENTS:
        family = causal.config.model_type
        raise PlanError(
            f"model_type={family} defines a router loss of its own, which is not known here: router=Router(loss=None) trains "
            "without, 'sequence' with DeepSeek's"
        )


def _bias_of(causal: nn.Module, router: str) -> str | None:
    """Return the name of the bias that a router's choices read: in the router, below it, or in the module that holds it."""
    parent = router.rpartition(".")[0]
    inside = [router, *(f"{router}.{name}" for name, _ in causal.get_submodule(router).named_modules() if name)]
    for owner in (*inside, parent):
        module = causal.get_submodule(owner)
        for leaf in ROUTER_BIASES:
            if leaf in module._parameters or leaf in module._buffers:
                return f"{owner}.{leaf}"
    return None
