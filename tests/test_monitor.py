"""Every statistic equals what plain transformers and torch give in one process, in every layout; watching changes no weight."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from recipes.common.monitor import STATS, Probe
from recipes.common.recipe import SGD, AdamW, Layout
from tests.test_fp16 import allow_fp16
from tests.tiny import ds_config, tiny_config
from tools.common.local_ranks import run_ranks
from tools.common.numerics import Trial, batches, build_trainer, initial_model, rank_batches, torch_optimizer

# eps above rounding, so that near-zero gradients do not become whole steps, and between the sqrt(v) of these models
ADAMW = AdamW(lr=1e-3, eps=1e-4, weight_decay=0.3, clip=0.5)
CUBE = [(pp, tp, dp) for pp in (1, 2) for tp in (1, 2) for dp in (1, 2)]
LAYERS = ("activation_rms", "max_attention_logit", "router_load_max")


def trial_of(config, pipeline, tensor, data, **fields) -> Trial:
    recompute_every = fields.pop("recompute_every", 0)
    layout = Layout(pipeline=pipeline, tensor=tensor, recompute_every=recompute_every)
    defaults = {"optimizer": ADAMW, "deepspeed": ds_config("zero1_fp32.json"), "steps": 2, "micro_seqs": 2}
    return Trial(model=config, layout=layout, world_size=pipeline * tensor * data, **(defaults | fields))


def watch_in_layout(trial: Trial) -> list[dict]:
    """Each step: the statistics by parameter, by layer, and those of the whole model."""
    if trial.deepspeed.get("fp16", {}).get("enabled"):
        allow_fp16()
    trainer = build_trainer(trial)
    probe = Probe(trainer, trial.optimizer.clip)
    steps = []
    for micro in rank_batches(trial, trainer):
        probe.begin(parameters=True, layers=True)
        result = trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        seen = probe.read(result)
        fields = ("loss_max", "loss_max_rank", "log_z", "max_logit", "log_z_squared")
        model = seen.totals | {name: getattr(result, name) for name in fields}
        steps.append({"names": probe.names, "values": seen.values, "layers": seen.activations, "model": model})
    return steps


def watch_plain(trial: Trial) -> list[dict]:
    """The same from a model that transformers runs and torch updates, each statistic by its definition, in fp64."""
    model = initial_model(trial).train()
    optimizer, named = torch_optimizer(trial.optimizer, model), dict(model.named_parameters())
    # the update is what the optimizer computes, before fp32 rounds the weight that it is added to: so it is taken in fp64
    exact = copy.deepcopy(model).double()
    exact_optimizer, doubles = torch_optimizer(trial.optimizer, exact), dict(exact.named_parameters())
    steps = []
    for batch in batches(trial):
        layers, model_wide = _forward_backward(model, trial, batch)
        gradients = {name: p.grad.double().clone() for name, p in named.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), trial.optimizer.clip or float("inf"))
        given = {name: p.grad.double().clone() for name, p in named.items()}
        before = {name: p.detach().double() for name, p in named.items()}
        for name, double in doubles.items():
            double.data, double.grad = before[name].clone(), given[name].clone()
        exact_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        values = {stat: np.full(len(named), np.nan) for stat in STATS}
        totals = torch.zeros(2, dtype=torch.float64)
        for row, (name, p) in enumerate(named.items()):
            weight, update = p.detach().double(), doubles[name].detach() - before[name]
            totals += torch.stack([weight.square().sum(), update.square().sum()])
            values["grad_norm"][row] = gradients[name].norm()
            values["weight_norm"][row], values["update_norm"][row] = weight.norm(), update.norm()
            values["update_ratio"][row] = update.norm() / weight.norm()
            values["zero_share"][row] = (gradients[name] == 0).double().mean()
            values["nonfinite"][row] = 0
            if isinstance(trial.optimizer, AdamW):
                state, (_, beta) = exact_optimizer.state[doubles[name]], trial.optimizer.betas
                spread = state["exp_avg_sq"] / (1 - beta ** state["step"].item())
                eps = trial.optimizer.eps
                values["adam_rms"][row] = (given[name].square() / spread.clamp(min=eps**2)).mean().sqrt()
                values["tiny_v_share"][row] = (spread.sqrt() < eps).double().mean()
        weight_norm, update_norm = totals.sqrt().tolist()
        model_wide |= {"weight_norm": weight_norm, "update_norm": update_norm, "update_ratio": update_norm / weight_norm}
        steps.append({"names": tuple(named), "values": values, "layers": layers, "model": model_wide})
    return steps


def _forward_backward(model, trial, batch):
    """(by layer, over the model) of one step: hidden states, q and k as transformers' own modules give them."""
    depth, heads = trial.model.num_hidden_layers, trial.model.num_attention_heads
    squares, largest = torch.zeros(depth, dtype=torch.float64), torch.full((depth,), -torch.inf)
    losses, log_z, top = torch.zeros(trial.data, dtype=torch.float64), [], []
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, key=(i, name): seen.update({key: out}))
        for i, layer in enumerate(model.model.layers)
        for name, module in (("out", layer), ("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj))
    ]
    for index, tokens in enumerate(batch.split(trial.micro_seqs)):
        flat = model(input_ids=tokens[:, :-1], use_cache=False).logits.float().flatten(0, 1)
        cross_entropy = F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum")
        (cross_entropy / batch[:, 1:].numel()).backward()
        losses[index % trial.data] += cross_entropy.item() * trial.data / batch[:, 1:].numel()
        log_z.append(flat.double().logsumexp(-1).detach())
        top.append(flat.max().item())
        length = tokens.shape[1] - 1
        rotary = model.model.rotary_emb(flat, torch.arange(length).unsqueeze(0))
        for i in range(depth):
            squares[i] += seen[i, "out"].detach().double().square().sum()
            q, k = (seen[i, name].detach().unflatten(-1, (-1, trial.model.head_dim)).transpose(1, 2) for name in "qk")
            q, k = apply_rotary_pos_emb(q, k, *rotary)
            logits = q @ k.repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2) * trial.model.head_dim**-0.5
            largest[i] = torch.maximum(
                largest[i], logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).max()
            )
    for hook in hooks:
        hook.remove()
    rms = (squares / (batch[:, :-1].numel() * trial.model.hidden_size)).sqrt()
    log_z = torch.cat(log_z)
    wide = {"loss_max": losses.max().item(), "loss_max_rank": int(losses.argmax()), "max_logit": max(top)}
    wide |= {"log_z": log_z.mean().item(), "log_z_squared": log_z.square().mean().item()}
    return {"activation_rms": rms.numpy(), "max_attention_logit": largest.double().numpy()}, wide


def assert_equal(trial: Trial, bound: float = 1e-5) -> None:
    """Every rank sees what one process does. Trials that differ in layout alone share their oracle."""
    wanted = run_ranks(watch_plain, 1, trial)[0]
    for rank in run_ranks(watch_in_layout, trial.world_size, trial):
        for step, oracle in zip(rank, wanted, strict=True):
            assert step["names"] == oracle["names"]
            for stat in STATS:
                got, want = step["values"][stat], oracle["values"][stat]
                worst = int(np.nanargmax(np.abs(got - want))) if np.isfinite(want).any() else 0
                assert got == pytest.approx(want, rel=bound, abs=1e-12, nan_ok=True), (stat, oracle["names"][worst])
            for stat, want in oracle["layers"].items():
                assert step["layers"][stat] == pytest.approx(want, rel=bound), stat
            assert step["model"] == pytest.approx(oracle["model"], rel=bound)


@pytest.mark.parametrize(("pipeline", "tensor", "data"), CUBE)
def test_every_layout(pipeline, tensor, data):
    assert_equal(trial_of(tiny_config("llama"), pipeline, tensor, data))


def test_three_stages():
    assert_equal(trial_of(tiny_config("llama"), 3, 1, 1))


def test_fewer_key_value_heads_than_tensor_ranks():
    assert_equal(trial_of(tiny_config("llama", num_key_value_heads=2), 1, 4, 1))


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(1, 2, 1), (2, 2, 2)])
def test_tied_embeddings(pipeline, tensor, data):
    assert_equal(trial_of(tiny_config("llama", tie_word_embeddings=True), pipeline, tensor, data))


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_stages(zero):
    assert_equal(trial_of(tiny_config("llama"), 1, 2, 2, deepspeed=ds_config(f"zero{zero}_fp32.json"), recompute_every=1))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    optimizer = SGD(lr=0.1, momentum=momentum, weight_decay=0.3, clip=0.5)
    assert_equal(trial_of(tiny_config("llama"), 2, 1, 1, optimizer=optimizer))
