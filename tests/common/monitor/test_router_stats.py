"""Loads, dead experts and entropies, equal in every layout, in the record and in tensor_stats."""

import json
import math

import numpy as np
import pytest

from recipes.common.monitor.monitor import RunMonitor
from recipes.common.monitor.router_stats import expert_values, router_fields, router_values
from recipes.common.recipe import AdamW, Monitor, Router
from recipes.common.run_dir.tensor_stats import read_routers
from tests.support.parity import trial_of
from tests.support.tiny import tiny_config, tiny_recipe
from tools.common.forked_ranks import run_ranks
from tools.common.parity import batches, build_trial_trainer, initial_model, rank_batches

ROUTER = Router(coefficient=0.02, z_loss=0.001)


def _train(trial, folder):
    trainer = build_trial_trainer(trial)
    recipe = tiny_recipe(folder, monitor=Monitor(activations_every_steps=2), optimizer=AdamW(lr=1e-3))
    monitor = RunMonitor(trainer, recipe, folder / "run")
    writes = trainer.grid.rank == 0
    monitor._note = print if writes else None
    monitor.rewind(None)
    records = []
    for step, micro in enumerate(rank_batches(trial, trainer), 1):
        monitor.before_step(step)
        result = trainer.train_step(micro, 1e-3, trial.global_seqs * trial.seq_len)
        records.append(monitor.after_step(step, result, micro, trial.global_seqs * trial.seq_len))
    monitor.close()
    return records, result.router_loads, result.router_entropies


def _reference(trial):
    model, loads, entropies = initial_model(trial), [], []
    logits = model(input_ids=batches(trial)[0][:, :-1], output_router_logits=True).router_logits
    for each in logits:
        p = each.softmax(-1)
        chosen = p.topk(2).indices.flatten()
        loads.append([int((chosen == expert).sum()) for expert in range(4)])
        entropies.append(float(-(p * p.log()).sum(-1).mean()))
    return loads, entropies


@pytest.mark.parametrize(
    ("layout", "options"), [((2, 2, 1), {"recompute": "full"}), ((1, 1, 2), {}), ((1, 1, 2), {"context": 2})]
)
def test_loads_and_entropies_of_the_global_batch(tmp_path, layout, options):
    trial = trial_of(tiny_config("mixtral"), *layout, global_seqs=4, steps=2, router=ROUTER, **options)
    ranks = run_ranks(_train, trial.world_size, trial, tmp_path)
    assert all(json.dumps(rank[0]) == json.dumps(ranks[0][0]) for rank in ranks)
    loads, entropies = run_ranks(_reference, 1, trial)[0]
    first = ranks[0][0][0]
    over_mean = np.array(loads) / 32
    assert first["router_load_max/max"] == over_mean.max()
    assert first["router_entropy"] == pytest.approx(min(entropies) / math.log(4), rel=1e-5)
    assert first["dead_experts"] == (np.array(loads) == 0).sum()
    assert 1.9 < first["router_loss"] < 4.1 and first["router_log_z_squared"] > 0
    records = read_routers(tmp_path / "run", 1, 2)
    assert records.steps.tolist() == [1, 2] and records.load_steps.tolist() == [2]
    assert records.routers == tuple(f"model.layers.{i}.mlp.gate" for i in range(4))
    assert records.values["entropy"][0] == pytest.approx(np.array(entropies) / math.log(4), rel=1e-5)
    assert records.experts[5] == "model.layers.1.mlp.gate 1"
    assert records.loads.shape == (1, 16) and records.loads[0].sum() == pytest.approx(16)


class _Result:
    """What router_stats reads of a step's result."""

    def __init__(self, loads, entropies):
        self.router_loads, self.router_entropies = np.array(loads, float), np.array(entropies, float)
        self.router_loss = self.router_log_z_squared = 0.0


class _Plan:
    experts, chosen, balances, z_loss = 4, 2, False, 0.0


class _Losses:
    plan = _Plan()


def test_extremes():
    result = _Result([[8, 8, 8, 8], [16, 16, 0, 0], [0, 0, 0, 0]], [math.log(4), 0.0, 0.0])
    values = router_values(result, _Plan())
    assert values["load_evenness"].tolist() == [1.0, 0.0, 0.0]
    assert values["dead"].tolist() == [0, 2, 4]
    assert values["entropy"] == pytest.approx([1.0, 0.0, 0.0])
    assert expert_values(result)["load"].tolist() == [1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0]
    fields = router_fields(result, _Losses())
    assert fields == {"router_load_max/max": 2.0, "load_evenness": 0.0, "router_entropy": 0.0, "dead_experts": 6}
    assert router_fields(result, None) == {}
