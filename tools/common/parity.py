"""Trains a few steps in a layout and in one process with plain transformers, and compares. For tools.verify and the tests.

The oracle shares only the initial weights and the batches with the trained side: AutoModelForCausalLM unchanged, torch's
cross-entropy over full logits, torch's optimizer and torch's clipping.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig

from recipes.common.data.document_masking import document_positions
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.trainer import StepResult, Trainer
from recipes.common.model.sharding import HeldTensor
from recipes.common.model.varlen_attention import built_as
from recipes.common.parallel.grid import one_process
from recipes.common.pipeline.stage import NO_ROUTER_LOSS, Stage, build_stage, plan_model
from recipes.common.recipe import FP8, SGD, AdamW, Layout, Optimizer, Router
from tools.common.fp8_oracle import multiply_as_defined
from tools.common.router_oracle import RouterOracle, constants

BF16_STEP = 2.0**-9  # the largest share of a number by which bf16 rounds it


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training that both sides do: `steps` steps of `global_seqs` random sequences."""

    model: PreTrainedConfig
    layout: Layout
    world_size: int
    optimizer: Optimizer
    deepspeed: dict[str, Any]  # the keys of a ds_config
    steps: int = 3
    seq_len: int = 16
    micro_seqs: int = 1
    global_seqs: int = 8
    seed: int = 7
    z_loss: float = 0.0
    chunk_tokens: int = 7  # small and odd: every loss is summed over several chunks
    kernels: str = "none"
    precision: str | None = None
    attention: str = "eager"
    document_end: int | None = None  # attention stays inside the documents that this id ends
    device: str = "cpu"
    torch_linears: bool = False  # see build_stage
    router: Router = NO_ROUTER_LOSS
    stir: float = 0.0  # how far train_stirred moves each weight, as a share of it; 0: to the neighbouring number

    @property
    def data(self) -> int:
        return self.world_size // (self.layout.tensor * self.layout.pipeline)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]  # router losses included
    grad_norms: list[float]
    parameters: dict[str, torch.Tensor]  # whole tensors by Hugging Face name, after the last step
    skipped: list[bool] = field(default_factory=list)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # those of a state dict, such as biases of routers


def batches(trial: Trial) -> list[torch.Tensor]:
    """Return one [global_seqs, seq_len + 1] tensor of ids a step."""
    generator = torch.Generator().manual_seed(trial.seed)
    shape = (trial.global_seqs, trial.seq_len + 1)
    return [torch.randint(3, trial.model.vocab_size, shape, generator=generator) for _ in range(trial.steps)]


def build_trial_trainer(trial: Trial) -> Trainer:
    """Build this rank's trainer of the layout; starts the process group."""
    return build_trainer(
        trial.model,
        trial.layout,
        trial.optimizer,
        engine_config(trial),
        device_type=trial.device,
        seq_len=trial.seq_len,
        attention=trial.attention,
        seed=trial.seed,
        z_loss=trial.z_loss,
        chunk_tokens=trial.chunk_tokens,
        kernels=trial.kernels,
        precision=trial.precision,
        document_end=trial.document_end,
        torch_linears=trial.torch_linears,
        router=trial.router,
    )


def rank_batches(trial: Trial, trainer: Trainer) -> list[list[torch.Tensor]]:
    """Return the micro batches of this rank, step by step."""
    grid = trainer.grid
    return [list(batch.split(trial.micro_seqs))[grid.reader :: grid.readers] for batch in batches(trial)]


def train_in_layout(trial: Trial) -> dict[str, Any]:
    """Train on this rank of the layout; return losses, norms, and its shards with their place in the whole."""
    trainer = build_trial_trainer(trial)
    grid, stage = trainer.grid, trainer.stage
    losses, norms, skipped = [], [], []
    for micro in rank_batches(trial, trainer):
        result = trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        losses.append(result.loss + _router_loss(stage, result))
        norms.append(result.grad_norm)
        skipped.append(result.skipped)
    with deepspeed.zero.GatheredParameters(list(stage.parameters()), enabled=_stage(trial) == 3):
        shards = {name: shard.float().cpu().clone() for name, shard in trainer.hf_shards().items()}
    buffers = {name: buffer.cpu().clone() for name, buffer in stage.persistent_buffers()}
    kept = {name: shard for name, shard in shards.items() if grid.data_rank == 0 or name in stage.held.banks}
    held = {"shards": kept, "held": stage.held, "buffers": buffers}
    return {"losses": losses, "norms": norms, "skipped": skipped, **held}


def _router_loss(stage: Stage, result: StepResult) -> float:
    if stage.router_losses is None:
        return 0.0
    plan = stage.router_losses.plan
    return plan.coefficient * result.router_loss + plan.z_loss * result.router_log_z_squared


def train_plain(trial: Trial, stir: int | None = None) -> Outcome:
    """Train the oracle: one process, plain transformers, plain torch, on the CPU (or the trial's device) in fp32.

    stir: first move every initial weight to a neighbouring number, or by Trial.stir, up or down as this seed draws, which changes
    every rounding of the trial and nothing else.
    """
    model = initial_model(trial).to(trial.device).train()
    if stir is not None:
        _stir(model, stir, trial.stir)
    if trial.precision == FP8:
        multiply_as_defined(model)
    optimizer, routers = (
        torch_optimizer(trial.optimizer, model),
        RouterOracle(model, trial.router, trial.data // trial.layout.context),
    )
    losses, norms = [], []
    for batch in batches(trial):
        total, micro_batches = 0.0, batch.to(trial.device).split(trial.micro_seqs)
        inputs = [(tokens[:, :-1], _places(tokens[:, :-1], trial)) for tokens in micro_batches]
        routers.begin_step(inputs)
        for tokens, (ids, places) in zip(micro_batches, inputs, strict=True):
            outputs = model(input_ids=ids, use_cache=False, **places, **routers.options)
            logits, router_loss = outputs.logits.float(), routers.loss(outputs, len(ids)) / len(micro_batches)
            flat = logits.reshape(-1, logits.shape[-1])
            cross_entropy = F.cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="sum")
            z_term = trial.z_loss * flat.logsumexp(-1).square().sum()
            ((cross_entropy + z_term) / batch[:, 1:].numel() + router_loss).backward()
            total += cross_entropy.item() / batch[:, 1:].numel() + router_loss.item()
        # in fp64: torch's fp32 norm of a large tensor is off by 5e-6, more than what is to be shown
        norms.append(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trial.optimizer.clip or float("inf"))
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
        routers.end_step()
    parameters = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return Outcome(losses, norms, parameters, buffers={name: b.detach().cpu() for name, b in constants(model)})


def _places(ids: torch.Tensor, trial: Trial) -> dict[str, torch.Tensor]:
    return {} if trial.document_end is None else {"position_ids": document_positions(ids, trial.document_end)}


def train_stirred(trial: Trial) -> Outcome:
    """Train the oracle with roundings that this rank's number draws: what differs from the oracle itself is rounding alone."""
    return train_plain(trial, stir=int(os.environ["RANK"]))


def _stir(model: torch.nn.Module, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.5
            infinity = torch.full_like(parameter, float("inf"))
            if share:
                parameter.mul_(torch.where(up, 1.0 + share, 1.0 - share))
            else:
                parameter.copy_(torch.nextafter(parameter, torch.where(up, infinity, -infinity)))


def initial_model(trial: Trial) -> torch.nn.Module:
    """Build plain transformers with the initial weights that every layout starts from."""
    planned = plan_model(trial.model, attention=trial.attention)
    stage = build_stage(planned, one_process(), seq_len=trial.seq_len, seed=trial.seed)
    model = AutoModelForCausalLM.from_config(
        trial.model, dtype=torch.float32, attn_implementation=built_as(trial.attention), trust_remote_code=False
    )
    weights = dict(stage.hf_named_parameters()) | dict(stage.persistent_buffers())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
        for name, buffer in constants(model):
            if name in weights:
                buffer.copy_(weights.pop(name))
    assert not weights, f"parameters that plain transformers lacks: {sorted(weights)}"
    return model


def outcome(ranks: list[dict[str, Any]], shapes: dict[str, torch.Size]) -> Outcome:
    """Assemble the ranks' shards. Raises AssertionError where copies of one element differ between ranks."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, shard in rank["shards"].items():
            full = whole.setdefault(name, torch.full(shapes[name], float("nan")))
            _place(full, shard, rank["held"].of(name), name)
    buffers: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, buffer in rank["buffers"].items():
            assert buffers.setdefault(name, buffer).equal(buffer), f"copies of {name} on different ranks differ"
    first = ranks[0]
    return Outcome(first["losses"], first["norms"], whole, first["skipped"], buffers)


def _place(full: torch.Tensor, own: torch.Tensor, held: HeldTensor, name: str) -> None:
    shard, dim = held.shard, held.shard.dim
    local, has = torch.zeros(2, *shard.shape(tuple(full.shape)))  # the tensor rank's, of which this rank may have a part
    part = slice(held.start(tuple(full.shape)), held.start(tuple(full.shape)) + own.numel())
    local.view(-1)[part], has.view(-1)[part] = own.reshape(-1), 1.0
    for here, there, count in shard.ranges(tuple(full.shape)):
        target, source, known = full.narrow(dim, there, count), local.narrow(dim, here, count), has.narrow(dim, here, count) > 0
        drift = (target - source).abs().masked_fill(~known, 0.0).nan_to_num(0.0).max().item()
        assert drift < 1e-6, f"copies of {name} on different ranks differ by {drift:.1e}"
        target.copy_(torch.where(known, source, target))


def gradient_trial(trial: Trial) -> Trial:
    """Return a trial of one SGD step at rate 1, unclipped: the weights change by the gradient (Adam would hide its scale)."""
    return replace(trial, optimizer=SGD(lr=1.0), steps=1)


def _stage(trial: Trial) -> int:
    return trial.deepspeed["zero_optimization"]["stage"]


def engine_config(trial: Trial) -> dict[str, Any]:
    return {
        **trial.deepspeed,
        "train_micro_batch_size_per_gpu": trial.micro_seqs,
        "gradient_accumulation_steps": trial.global_seqs // (trial.micro_seqs * (trial.data // trial.layout.context)),
        "gradient_clipping": trial.optimizer.clip,
        "steps_per_print": 10**9,
    }


def torch_optimizer(optimizer: Optimizer, model: torch.nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    kept_off = {id(p) for p in model.parameters() if p.ndim < 2}
    if not optimizer.decay_embeddings:
        kept_off |= {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in kept_off], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in model.parameters() if id(p) in kept_off], "weight_decay": 0.0},
    ]
    if isinstance(optimizer, AdamW):
        return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=fused)
    return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)
