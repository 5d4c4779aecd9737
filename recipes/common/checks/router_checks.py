"""Checks what a recipe asks of a mixture's routers: values, what the family has, and that a router loss is the family's own."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from recipes.common.model.decoder import PlanError
from recipes.common.model.routers import GLOBAL_BATCH, MICRO_BATCH, ROUTER_LOSSES, RouterPlan
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout, Router

_SEQS, _SEQ_LEN = 2, 16
_ROUNDING = 1e-4
_WITHOUT = "router=Router(loss=None) trains without"


def router_value_problems(router: Router) -> list[str]:
    """Check the values of the fields."""
    problems = []
    if router.loss not in (None, *ROUTER_LOSSES):
        problems.append(f"router.loss={router.loss!r} must be {', '.join(map(repr, ROUTER_LOSSES))} or None")
    for name in ("coefficient", "z_loss", "bias_rate"):
        if (value := getattr(router, name)) is not None and value < 0:
            problems.append(f"router.{name}={value} must be 0 or more")
    if router.loss is None and router.coefficient:
        problems.append(
            f"router.coefficient={router.coefficient} weighs no loss with router.loss=None; choose one, or leave it out"
        )
    return problems


def router_problems(config: PreTrainedConfig, router: Router, plan: RouterPlan | PlanError, attention: str) -> list[str]:
    """Check a sound `router` against the model. plan: of its routers, or why there is none."""
    family = config.model_type
    if isinstance(plan, PlanError):
        return [f"router: {plan}"]
    asked = {name: value for name in ("coefficient", "z_loss", "bias_rate") if (value := getattr(router, name))}
    if not plan.routers:
        return [f"router.{name}={value}: model_type={family} has no routers; leave it out" for name, value in asked.items()]
    if not (plan.balances or plan.z_loss):
        return []
    try:
        return _trial_problems(config, plan, attention)
    except Exception as error:  # a family's own code may raise anything on the tiny model
        return [f"router: a tiny {family} does not train with the loss ({type(error).__name__}: {error}); {_WITHOUT}"]


def _trial_problems(config: PreTrainedConfig, plan: RouterPlan, attention: str) -> list[str]:
    """Train a tiny model on one micro batch, and compare the loss of its routers with what transformers computes of them."""
    tiny = shrink(config, Layout())
    asked = Router(loss=MICRO_BATCH if plan.loss == GLOBAL_BATCH else plan.loss, coefficient=1.0, z_loss=plan.z_loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage = build_stage(plan_model(tiny, attention=attention, router=asked), one_process(), seq_len=_SEQ_LEN)
    losses = stage.router_losses
    if losses is None:  # what makes it a mixture was shrunk away
        return []
    ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (stage.vocab_size - 3) + 3
    stage.eval()  # random numbers would make two runs differ
    stage(ids, labels=(ids, torch.tensor(1.0 / ids.numel()))).backward()
    if asked.loss != MICRO_BATCH:
        return []
    with torch.no_grad():
        own = getattr(stage.causal(input_ids=ids, use_cache=False, output_router_logits=True), "aux_loss", None)
    if own is None:
        return []
    ours, theirs = float(losses.sums[0]), float(own)
    if abs(ours - theirs) <= _ROUNDING * max(abs(theirs), 1e-6):
        return []
    return [
        f"router.loss={plan.loss!r}: model_type={config.model_type} defines its router loss in another way (in a tiny model "
        f"{theirs:.6g}, not {ours:.6g}); use 'sequence', or None to train without"
    ]
