"""Holds the questions that a DeepSpeed release is asked, and what plain torch answers: `release_trial` compares.

A question is a few cases; a case is a training of a small causal model that both sides do. Most take steps of SGD without
clipping: Adam and clipping hide a wrong scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from recipes.common.parallel.cross_entropy import IGNORED

SEQ_LEN, MICRO_SEQS, STEPS, SEED = 8, 2, 2, 11
VOCAB_SIZE, WIDTH = 61, 16
RATE = 0.25  # of SGD: the weights move by their gradients, and a wrong one shows in the second step's too
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}  # an eps that near-zero gradients do not pass
CLIP = 0.5  # of the gradient norm, with AdamW

Weights = dict[str, torch.Tensor]  # in fp32, by name
Micro = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids, targets, the loss's weight
ONCE, IN_ONE_FORWARD, TWO_FORWARDS, BESIDE = "once", "twice in a forward", "two forwards", "beside the engine"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training that both sides do."""

    name: str
    zero: int
    accumulation: int
    precision: str = "fp32"
    optimizer: str = "sgd"
    ranks: int = 2
    stages: int = 1
    use: str = ONCE  # of the submodule that a step may use twice
    options: tuple[tuple[str, Any], ...] = ()  # of the block zero_optimization
    bf16_options: tuple[tuple[str, Any], ...] = ()

    @property
    def data(self) -> int:
        return self.ranks // self.stages


def initial_model(case: Case) -> nn.Module:
    """Build the model of a case with its initial weights, a layer for each stage."""
    torch.manual_seed(SEED)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    depth = {"num_hidden_layers": case.stages, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 32}
    config = LlamaConfig(tie_word_embeddings=False, **sizes, **depth)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, and large enough that every weight has a gradient worth comparing
            parameter += 0.2 * torch.randn(parameter.shape)
    return PlainModel(model) if case.use == ONCE else ReusedModel(model, case.use)


class PlainModel(nn.Module):
    """A causal model that returns its loss."""

    def __init__(self, causal: nn.Module) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return token_loss(self.causal(input_ids=ids, use_cache=False).logits, targets) * weight


class ReusedModel(nn.Module):
    """A causal model with an encoder that a step uses twice."""

    def __init__(self, causal: nn.Module, use: str) -> None:
        super().__init__()
        self.causal, self.use = causal, use
        self.encoder = nn.Sequential(causal.get_input_embeddings(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        encoded = self.encoder(ids)
        loss = token_loss(self.causal(inputs_embeds=encoded, use_cache=False).logits, targets)
        if self.use == IN_ONE_FORWARD:
            loss = loss + self.auxiliary(targets, encoded)
        return loss * weight

    def auxiliary(self, targets: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """Encode a second input, and ask that it be near the first."""
        second = self.encoder(targets.clamp(min=0))
        return 4.0 * (second - encoded).float().square().sum()


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses over the scored tokens."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def micro_batches(case: Case) -> list[list[list[Micro]]]:
    """Return [step][data rank][micro batch] of (ids, targets, weight). Each scores another number of tokens.

    The weight makes DeepSpeed's mean over micro batches and ranks the mean over the scored tokens. It is rounded, so that a
    release which casts its inputs to bf16 does not change it.
    """
    generator = torch.Generator().manual_seed(SEED)
    steps = []
    for _ in range(STEPS):
        shape = (case.data * case.accumulation, MICRO_SEQS, SEQ_LEN + 1)
        tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
        targets = tokens[..., 1:].clone()
        for index, part in enumerate(targets):
            part[:, : index % (SEQ_LEN - 1)] = IGNORED
        weight = torch.tensor(case.data * case.accumulation / float((targets != IGNORED).sum())).bfloat16().float()
        rows = [(t[:, :-1], y, weight) for t, y in zip(tokens, targets, strict=True)]
        steps.append([rows[rank :: case.data] for rank in range(case.data)])
    return steps


def train_plain(case: Case) -> list[Weights]:
    """Train in this process with plain torch. Returns the weights before the first step and after each.

    In bf16 the model computes with rounded weights, and gradients are added and applied in fp32.
    """
    model, masters = initial_model(case), {}
    for name, parameter in model.named_parameters():
        start = parameter.detach().bfloat16().float() if case.precision == "bf16" else parameter.detach()
        masters[name] = nn.Parameter(start.clone())
    path = [{name: master.detach().clone() for name, master in masters.items()}]
    if case.precision == "bf16":
        for parameter in model.parameters():  # buffers stay as they are, as with DeepSpeed
            parameter.data = parameter.bfloat16()
    optimizer = build_optimizer(case, list(masters.values()))
    for step in micro_batches(case):
        micros = [micro for rank in step for micro in rank]
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in micros:
            model.zero_grad()
            (micro_loss(case, model, model, micro) / len(micros)).backward()
            for name, parameter in model.named_parameters():
                masters[name].grad += parameter.grad.float()
        if case.optimizer == "adamw":
            nn.utils.clip_grad_norm_(masters.values(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        path.append({name: master.detach().clone() for name, master in masters.items()})
    return path


def micro_loss(case: Case, engine: Any, module: nn.Module, micro: Micro) -> torch.Tensor:
    """Return the loss of a micro batch, with the calls that a user of the engine writes. engine: plain torch has the module."""
    ids, targets, weight = micro
    if case.use == TWO_FORWARDS:
        return engine(ids, targets, weight) + 0.5 * engine(targets.clamp(min=0), targets, weight)
    if case.use == BESIDE:
        return engine(ids, targets, weight) + module.auxiliary(targets, module.encoder(ids)) * weight
    return engine(ids, targets, weight)


def build_optimizer(case: Case, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer of a case, torch's on both sides."""
    return torch.optim.AdamW(parameters, **ADAM) if case.optimizer == "adamw" else torch.optim.SGD(parameters, lr=RATE)


def _case(name: str, zero: int, **fields: Any) -> Case:
    return Case(name=name, zero=zero, **({"accumulation": 2} | fields))


_BF16 = {"precision": "bf16"}
_AT_ONCE = (("immediate_grad_update", True),)  # each micro batch's gradients are added to the fp32 ones as they are computed
_OVERLAPPED = (("overlap_comm", True),)
_THREE = {"ranks": 3, "stages": 3}
QUESTIONS: dict[str, tuple[Case, ...]] = {
    # ZeRO 2 without a pipeline
    "zero2": (
        _case("SGD, accumulation 2", 2),
        _case("AdamW, clipped, accumulation 4", 2, optimizer="adamw", accumulation=4, options=_OVERLAPPED),
        _case("bf16, SGD, accumulation 2", 2, **_BF16),
    ),
    # three stages
    "pipeline": (
        _case("SGD, accumulation 1", 1, accumulation=1, **_THREE),
        _case("SGD, accumulation 2", 1, **_THREE),
        _case("AdamW, clipped, accumulation 4", 1, optimizer="adamw", accumulation=4, **_THREE),
        _case("bf16, SGD, accumulation 2", 1, bf16_options=_AT_ONCE, **_THREE, **_BF16),
    ),
    # gradients of bf16 micro batches, accumulated in fp32 under ZeRO 1: is the last one's there, and on every rank?
    "last_micro_batch": (
        _case("bf16, SGD, accumulation 1", 1, accumulation=1, **_BF16),
        _case("bf16, SGD, accumulation 4", 1, accumulation=4, **_BF16),
        _case("bf16, SGD, accumulation 2, at once", 1, bf16_options=_AT_ONCE, **_BF16),
    ),
    # a submodule that a step uses twice. ZeRO 1: releases before 0.18.3 are wrong with ZeRO 2 and accumulation, see above
    "reused_submodule": tuple(_case(f"{use}, SGD, accumulation 2", 1, use=use) for use in (IN_ONE_FORWARD, TWO_FORWARDS, BESIDE)),
}
