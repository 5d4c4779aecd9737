"""Every statistic equals what plain transformers and torch give in one process, in every layout; watching changes no weight."""

import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from recipes.common.engine import zero_state
from recipes.common.model.varlen_attention import segments
from recipes.common.monitor.layer_stats import largest_logit
from recipes.common.monitor.parameter_stats import STATS, ParameterStats
from recipes.common.recipe import SGD, AdamW, Layout
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, batches, build_trial_trainer, initial_model, rank_batches, torch_optimizer

# eps above rounding, so that near-zero gradients do not become whole steps, and between the sqrt(v) of these models
ADAMW = AdamW(lr=1e-3, eps=1e-4, weight_decay=0.3, clip=0.5)
LAYOUTS = [(1, 1, 1), (2, 1, 2)]  # pipeline, tensor, data; the other pairs of sizes are in the tests below
TWO_LAYERS = tiny_config("llama", num_hidden_layers=2)
LAYERS = ("activation_rms", "max_attention_logit", "router_load_max")


def trial_of(config, pipeline, tensor, data, **fields) -> Trial:
    cut = {name: fields.pop(name) for name in ("recompute", "pipeline_schedule", "sequence_parallel") if name in fields}
    layout = Layout(pipeline=pipeline, tensor=tensor, **cut)
    defaults = {"optimizer": ADAMW, "deepspeed": ds_config("zero1_fp32.json"), "steps": 2}
    batch = {"micro_seqs": 2, "global_seqs": 4 * data}
    return Trial(model=config, layout=layout, world_size=pipeline * tensor * data, **(defaults | batch | fields))


def watch_in_layout(trial: Trial) -> list[dict]:
    """Each step: the statistics by parameter, by layer, and those of the whole model."""
    trainer = build_trial_trainer(trial)
    stats = ParameterStats(trainer, trial.optimizer.clip)
    steps = []
    for micro in rank_batches(trial, trainer):
        stats.begin(parameters=True, layers=True)
        result = trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        measured = stats.read(result)
        fields = ("loss_max", "loss_max_rank", "log_z", "max_logit", "log_z_squared")
        model = measured.totals | {name: getattr(result, name) for name in fields}
        steps.append({"names": stats.names, "values": measured.values, "layers": measured.activations, "model": model})
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


def watch_both(trial: Trial) -> tuple[list[dict], list[dict]]:
    """What this rank of the layout sees; and, computed by the first rank, what one process does."""
    wanted = watch_plain(trial) if os.environ["RANK"] == "0" else []
    return wanted, watch_in_layout(trial)


def assert_equal(trial: Trial, bound: float = 1e-5) -> None:
    """Every rank sees what one process does."""
    ranks = run_ranks(watch_both, trial.world_size, trial)
    wanted = ranks[0][0]
    if isinstance(trial.optimizer, AdamW):  # the models have something to count
        assert 0 < np.mean(wanted[-1]["values"]["tiny_v_share"]) < 1
        assert trial.model.tie_word_embeddings or 0 < np.mean(wanted[-1]["values"]["zero_share"]) < 1
    for _, rank in ranks:
        for step, oracle in zip(rank, wanted, strict=True):
            assert step["names"] == oracle["names"]
            for stat in STATS:
                got, want = step["values"][stat], oracle["values"][stat]
                worst = int(np.nanargmax(np.abs(got - want))) if np.isfinite(want).any() else 0
                assert got == pytest.approx(want, rel=bound, abs=1e-12, nan_ok=True), (stat, oracle["names"][worst])
            for stat, want in oracle["layers"].items():
                assert step["layers"][stat] == pytest.approx(want, rel=bound), stat
            assert step["model"] == pytest.approx(oracle["model"], rel=bound)


@pytest.mark.parametrize(("pipeline", "tensor", "data"), LAYOUTS)
def test_every_layout(pipeline, tensor, data):
    assert_equal(trial_of(TWO_LAYERS, pipeline, tensor, data))


@pytest.mark.parametrize(
    ("tensor", "options"),
    [
        (2, {"sequence_parallel": True, "pipeline_schedule": "zero_bubble"}),
        (1, {"pipeline_schedule": "zero_bubble_v"}),
    ],
)
def test_other_ways_to_run_a_layout(tensor, options):
    assert_equal(trial_of(tiny_config("llama"), 2, tensor, 1, **options))


def test_fewer_key_value_heads_than_tensor_ranks():
    assert_equal(trial_of(tiny_config("llama", num_hidden_layers=2, num_key_value_heads=2), 1, 4, 1))


def test_tied_embeddings():
    assert_equal(trial_of(tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=True), 2, 2, 1))


@pytest.mark.parametrize(("zero", "tensor"), [(2, 1), (3, 2)])
def test_zero_stages(zero, tensor):
    assert_equal(trial_of(TWO_LAYERS, 1, tensor, 2, deepspeed=ds_config(f"zero{zero}_fp32.json"), recompute="full"))


@pytest.mark.parametrize(("momentum", "stages"), [(0.0, 3), (0.9, 1)])
def test_sgd(momentum, stages):
    optimizer = SGD(lr=0.1, momentum=momentum, weight_decay=0.3, clip=0.5)
    assert_equal(trial_of(tiny_config("llama"), stages, 1, 1, optimizer=optimizer))


def low_precision(config, pipeline, tensor, data):
    deepspeed = fp16_config(initial_scale_power=12) if config == "fp16" else ds_config(config)
    return trial_of(TWO_LAYERS, pipeline, tensor, data, deepspeed=deepspeed)


def watch_and_snapshot(trial: Trial) -> dict:
    """Statistics of the last step, beside the norms of the fp32 master weights and of what the step added to them."""
    if "fp16" in trial.deepspeed:
        allow_fp16()
    trainer = build_trial_trainer(trial)
    stats = ParameterStats(trainer, trial.optimizer.clip)
    for micro in rank_batches(trial, trainer):
        before = owned(trainer)
        stats.begin(parameters=True, layers=False)
        result = trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        measured = stats.read(result)
    squares = {name: ((after - before[name]).square().sum().item(), after.square().sum().item())
               for name, after in owned(trainer).items()}  # fmt: skip
    cuts = trainer.stage.tensor_plan.shards
    squares = {name: pair for name, pair in squares.items() if trainer.grid.tensor_rank == 0 or name in cuts}
    return {"names": stats.names, "values": measured.values, "grad_norm": result.grad_norm, "squares": squares}


def owned(trainer) -> dict[str, torch.Tensor]:
    return {
        fragment.name: flat[fragment.offset : fragment.offset + fragment.stop - fragment.start].detach().double()
        for flat, fragments in zero_state.locate(trainer)
        for fragment in fragments
    }


@pytest.mark.parametrize(
    ("config", "pipeline", "tensor", "data"),
    [("zero1_bf16.json", 2, 1, 2), ("zero2_bf16.json", 1, 2, 2), ("zero3_bf16.json", 1, 1, 2), ("fp16", 1, 2, 1)],
)
def test_low_precision_states_the_fp32_master_weights(config, pipeline, tensor, data):
    """Norms of weights and updates against the master weights themselves; gradients against the norm that DeepSpeed clips by."""
    trial = low_precision(config, pipeline, tensor, data)
    ranks = run_ranks(watch_and_snapshot, trial.world_size, trial)
    names, values = ranks[0]["names"], ranks[0]["values"]
    for row, name in enumerate(names):
        pairs = np.array([rank["squares"].get(name, (0.0, 0.0)) for rank in ranks])
        update, weight = np.sqrt(pairs.sum(axis=0))
        assert values["weight_norm"][row] == pytest.approx(weight, rel=1e-5), name
        assert values["update_norm"][row] == pytest.approx(update, rel=1e-4), name  # the weights are rounded, the update is not
    assert np.sqrt((values["grad_norm"] ** 2).sum()) == pytest.approx(ranks[0]["grad_norm"], rel=1e-5)
    for rank in ranks:
        assert all(np.array_equal(rank["values"][stat], values[stat]) for stat in STATS)


def test_router_load_and_fused_attention():
    """A mixtral on stages of data ranks sees what it sees in one process; sdpa shows the logits that eager attention shows."""
    config, once = tiny_config("mixtral", num_hidden_layers=2), {"steps": 1, "global_seqs": 8}
    alone, cut = ([r[0]["layers"] for r in run_ranks(watch_in_layout, t.world_size, t)] for t in
                  (trial_of(config, 1, 1, 1, **once), trial_of(config, 2, 1, 2, attention="sdpa", **once)))  # fmt: skip
    load = alone[0]["router_load_max"]
    assert ((load >= 1.0) & (load <= 4.0)).all()  # of 4 experts
    assert len(set(load)) > 1
    for layers in cut:
        for stat in LAYERS:
            assert layers[stat] == pytest.approx(alone[0][stat], rel=1e-5), stat


def test_a_family_without_attention_functions_has_no_logits_to_show():
    trial = trial_of(tiny_config("gptj", n_embd=64, n_head=4, n_layer=2, rotary_dim=8), 1, 1, 1, steps=1)
    (rank,) = run_ranks(watch_in_layout, 1, trial)
    assert np.isnan(rank[0]["layers"]["max_attention_logit"]).all()
    assert (rank[0]["layers"]["activation_rms"] > 0).all()


def test_a_few_queries_stand_for_all():
    assert run_ranks(_sampled, 1) == [True]


def _sampled():
    """Of 200 queries 32 are looked at; a mask hides what it hides."""
    query, key = torch.randn(2, 4, 200, 8), torch.randn(2, 2, 200, 8)
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.5
    seen = torch.ones(200, 200).tril().bool()
    places = torch.linspace(0, 199, 32).round().long()
    wanted = logits.masked_fill(~seen, -torch.inf)[:, :, places].max()
    window = seen & ~seen.tril(-5)
    masks = (window.expand(2, 1, 200, 200), torch.zeros(200, 200).masked_fill(~window, -torch.inf).expand(2, 1, 200, 200))
    banded = logits.masked_fill(~window, -torch.inf)[:, :, places].max()
    instead = segments(None, seqs=2, length=200, device=torch.device("cpu"), window=5)
    assert all(torch.allclose(largest_logit(query, key, mask, 0.5), banded) for mask in (*masks, instead))
    return torch.allclose(largest_logit(query, key, None, 0.5), wanted)
