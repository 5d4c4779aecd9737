"""Builds the sides of the bench: our step, and the steps that others would write for the same model, batch and precision.

A side is built on every rank of its layout and is a function that takes one optimizer step and returns its loss. All sides
start from the same weights, see the same batch at every step, and use torch's fused AdamW and the same clipping: what differs
is everything around the model.
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
import torch.nn.functional as F

from recipes.common.config.ds_config import precision
from recipes.common.engine.startup import quiet_deepspeed, start_distributed
from tools.common.parity import Trial, batches, build_trial_trainer, engine_config, initial_model, rank_batches, torch_optimizer

Step = Callable[[], float]  # one optimizer step; returns the mean loss over the global batch


def ours(trial: Trial) -> Step:
    """Build Trifold's own step, as the training loop calls it."""
    trainer = build_trial_trainer(trial)
    micro_batches, tokens = rank_batches(trial, trainer)[0], trial.global_seqs * trial.seq_len
    return lambda: trainer.train_step(micro_batches, trial.optimizer.lr, tokens).loss


def plain(trial: Trial) -> Step:
    """Build the loop of a PyTorch tutorial over the transformers model, in one process. Low precision is autocast's."""
    device = start_distributed(trial.device)
    model = initial_model(trial).to(device).train()
    optimizer = torch_optimizer(trial.optimizer, model, fused=True)
    micro_batches = batches(trial)[0].to(device).split(trial.micro_seqs)
    low = precision(trial.deepspeed)
    autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": low == "bf16"}

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens in micro_batches:
            with torch.autocast(**autocast):
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trial.optimizer.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def transformers_deepspeed(trial: Trial) -> Step:
    """Build the step of transformers' Trainer with DeepSpeed: the model's own loss, the same ds_config, one process."""
    device = start_distributed(trial.device)
    model = initial_model(trial).to(device).train()
    optimizer = torch_optimizer(trial.optimizer, model, fused=True)
    with quiet_deepspeed():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(trial))[0]
    micro_batches = batches(trial)[0].to(device).split(trial.micro_seqs)

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens in micro_batches:
            ids, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
            loss = engine(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return total.item() / len(micro_batches)

    return step
