"""Adds router losses and the bias update to the oracle of `parity`: transformers' own loss, and short references for the others.

Everything is computed in one process from `outputs.router_logits`, all layers' at once, as a pipeline cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import find_stack
from recipes.common.model.routers import GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, RouterPlan, plan_routers
from recipes.common.recipe import Router

# families of transformers 5 whose scores are sigmoids
_SIGMOID = frozenset(
    (
        "afmoe",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm5_next",
        "glm_moe_dsa",
        "hy_v3",
        "hy_v4",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lfm2_moe",
        "llama4_text",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl_text",
        "nemotron_h",
        "solar_open",
        "step3p7",
    )
)


class RouterOracle:
    """Gives plain transformers what a recipe's `router` asks for."""

    def __init__(self, model: PreTrainedModel, router: Router, readers: int = 1) -> None:
        """readers: how many micro batches of a step the compared layout runs at once."""
        self.plan, self._model = plan_routers(model, find_stack(model), router), model
        self.options = {"output_router_logits": True} if self.plan.routers else {}
        self._readers = readers
        # by micro batch: the shares of the rows that chose each expert, over all the micro batches that its loss knows
        self._shares: list[torch.Tensor] = []
        self._loads = torch.zeros(len(self.plan.routers), self.plan.experts, dtype=torch.int64)
        for index, router_ in enumerate(self.plan.routers if router.bias_rate else ()):
            model.get_submodule(router_.name).register_forward_hook(_load_hook(self._loads[index]))

    def begin_step(self, micro_batches: list[tuple[torch.Tensor, dict[str, Any]]]) -> None:
        """See all ids of a step, and what else the model is given with them."""
        if self.plan.loss == GLOBAL_BATCH and self.plan.balances:
            with torch.no_grad():
                runs = [self._model(input_ids=ids, use_cache=False, **self.options, **more) for ids, more in micro_batches]
            each = torch.stack([_shares(torch.cat(run.router_logits), self.plan) for run in runs])
            known = [len(runs) if self.plan.count_ahead else (i // self._readers + 1) * self._readers for i in range(len(runs))]
            self._shares = [each[:count].mean(0) for count in known]
        self._loads.zero_()

    def loss(self, outputs: Any, seqs: int) -> torch.Tensor:
        """Return the router losses of a micro batch, with their weights."""
        plan, total = self.plan, torch.zeros(())
        if not plan.routers:
            return total
        if plan.balances:
            own = getattr(outputs, "aux_loss", None)
            balance = own if plan.loss == MICRO_BATCH and own is not None else self._reference(outputs.router_logits, seqs)
            total = total + plan.coefficient * balance
        if plan.z_loss:
            total = total + plan.z_loss * sum(logits.float().logsumexp(-1).square().mean() for logits in outputs.router_logits)
        return total

    def _reference(self, router_logits: tuple[torch.Tensor, ...], seqs: int) -> torch.Tensor:
        plan = self.plan
        if plan.loss == SEQUENCE:
            return sum(_of_sequences(logits, plan, self._scores(), seqs) for logits in router_logits)
        probabilities = torch.cat([logits.float().softmax(-1) for logits in router_logits]).mean(0)
        shares = self._shares.pop(0) if plan.loss == GLOBAL_BATCH else _shares(torch.cat(router_logits), plan)
        return plan.experts * (shares * probabilities).sum()

    def _scores(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.sigmoid if self._model.config.model_type in _SIGMOID else partial(torch.softmax, dim=-1)

    def end_step(self) -> None:
        """Move the biases."""
        if self.plan.bias_rate:
            tensors = dict(self._model.named_buffers()) | dict(self._model.named_parameters())
            for router, load in zip(self.plan.routers, self._loads, strict=True):
                tensors[router.bias].data += self.plan.bias_rate * torch.sign(load.double().mean() - load).float()


def constants(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state dict holds beside what is trained: buffers, and parameters that the family freezes."""
    kept = model.state_dict()
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _load_hook(load: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple, output: tuple) -> None:
        chosen = next(o for o in output if o.dtype == torch.int64)
        load.add_(torch.bincount(chosen.flatten(), minlength=len(load)))

    return hook


def _shares(logits: torch.Tensor, plan: RouterPlan) -> torch.Tensor:
    chosen = logits.float().softmax(-1).topk(plan.chosen).indices
    return torch.nn.functional.one_hot(chosen, plan.experts).sum(1).float().mean(0)


def _of_sequences(logits: torch.Tensor, plan: RouterPlan, scores: Any, seqs: int) -> torch.Tensor:
    """Return DeepSeek-V3's equations 17 to 20, the mean over sequences. logits: [seqs x length, experts]."""
    probabilities = scores(logits.float())
    probabilities = (probabilities / probabilities.sum(-1, keepdim=True)).view(seqs, -1, plan.experts)
    chosen = torch.nn.functional.one_hot(probabilities.topk(plan.chosen).indices, plan.experts).sum(2).float()
    shares = plan.experts / plan.chosen * chosen.mean(1)
    return (shares * probabilities.mean(1)).sum(-1).mean()
