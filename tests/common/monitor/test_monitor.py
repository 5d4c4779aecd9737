"""Whole runs with the monitor: on or off the weights are the same bits; what it says is in the run's files, resumes included."""

import contextlib
import importlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes.common import train as train_module
from recipes.common.monitor import parameter_stats
from recipes.common.monitor.monitor import RunMonitor
from recipes.common.monitor.optimizer_sums import SUMS
from recipes.common.monitor.parameter_stats import STATS, ParameterStats
from recipes.common.monitor.replica_drift import Drift
from recipes.common.recipe import AdamW, Checkpoints, Evaluation, Layout, Monitor
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.tensor_stats import read_stats
from recipes.common.runtime.exits import TrainingError
from tests.support.small_runs import run
from tests.support.tiny import tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import RankError

STEPS = 4
TENSOR = {2: Layout(tensor=2)}
OFF = Monitor(every_steps=0, activations_every_steps=0, drift_every_steps=0)
ON = Monitor(activations_every_steps=2, drift_every_steps=2)
FIELDS = ("weight_norm", "update_norm", "update_ratio", "max_logit", "log_z", "loss_max", "loss_max_rank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    write_shards(folder)
    return folder


def recipe_on(folder, monitor, **fields):
    values = {"steps": STEPS, "evaluation": Evaluation(), "checkpoints": Checkpoints(every_steps=2)}
    return tiny_recipe(folder, monitor=monitor, **(values | fields))


def saved(out_dir):
    """Every byte of the last checkpoint's tensors, by file and name."""
    files = sorted((out_dir / "checkpoints" / "latest").resolve().glob("*.safetensors"))
    return {
        (file.name, name): tensor.view(torch.uint8).numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(("ranks", "config"), [(4, "zero1_bf16.json"), (2, "zero3_fp32.json")])
def test_weights_and_optimizer_are_the_same_bits_with_the_monitor_on_and_off(folder, tmp_path, ranks, config):
    model = tiny_config("llama", num_hidden_layers=2)
    fields = {"deepspeed": config, "layouts": {2: Layout(), 4: Layout(tensor=2, pipeline=2)}, "model": model}
    watched = run(recipe_on(folder, ON, **fields), ranks, tmp_path / "on")
    alone = run(recipe_on(folder, OFF, **fields), ranks, tmp_path / "off")
    assert len(saved(tmp_path / "on")) > 0
    assert saved(tmp_path / "on") == saved(tmp_path / "off")
    assert [watched[step]["loss"] for step in watched] == [alone[step]["loss"] for step in alone]
    assert not (tmp_path / "off" / "tensor_stats").exists()
    for record in watched.values():
        assert all(np.isfinite(record[field]) for field in FIELDS)
    stats = read_stats(tmp_path / "on", 1, STEPS)
    assert stats.steps.tolist() == [1, 2, 3, 4]
    assert stats.activation_steps.tolist() == [2, 4]
    assert stats.layers == (0, 1)
    assert set(stats.values) == set(STATS)
    whole = np.sqrt((stats.values["grad_norm"].astype(float) ** 2).sum(axis=1))
    assert whole == pytest.approx([record["grad_norm"] for record in watched.values()], rel=1e-5)
    assert (stats.activations["activation_rms"] > 0).all()


def test_a_resumed_run_writes_its_statistics_over_those_it_repeats(folder, tmp_path):
    whole = tmp_path / "whole"
    run(recipe_on(folder, ON), 2, whole)
    again = tmp_path / "again"
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step_00000004")  # as if the run had died before its last save
    latest = again / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("step_00000002")
    run(recipe_on(folder, ON), 2, again, resume=True)
    wanted, got = read_stats(whole, 1, STEPS), read_stats(again, 1, STEPS)
    assert got.steps.tolist() == wanted.steps.tolist()
    for stat in STATS:
        assert np.array_equal(got.values[stat], wanted.values[stat], equal_nan=True), stat
    assert np.array_equal(got.activations["activation_rms"], wanted.activations["activation_rms"])


def poisoned(monkeypatch, bad_calls):
    """Layer 1's MLP gives a NaN on rank 1 in these calls of it; ranks are forked from here, and so see it."""
    build = train_module.build_recipe_trainer

    def build_with_fault(*args, **options):
        trainer = build(*args, **options)
        calls = iter(range(10**6))

        def fault(module, inputs, output):
            return output * torch.nan if next(calls) in bad_calls else None

        if trainer.grid.data_rank == 1:
            trainer.stage.causal.model.layers[1].mlp.register_forward_hook(fault)
        return trainer

    monkeypatch.setattr(train_module, "build_recipe_trainer", build_with_fault)


def test_a_nan_is_skipped_counted_and_told(folder, tmp_path, monkeypatch, capfd):
    """Two micro batches a step and rank: the second of step 3 goes wrong (call 5), and again when it is looked into (call 7)."""
    poisoned(monkeypatch, {5, 7})
    recipe = recipe_on(folder, ON, layouts={2: tiny_recipe(folder).layouts[1]})
    records = run(recipe, 2, tmp_path)
    assert [record.get("skipped_steps", 0) for record in records.values()] == [0, 0, 1, 1]
    reason = records[3]["skip_reason"]
    assert "NaN" in reason and "output of model.layers.1.mlp," in reason and "data rank 1" in reason
    assert "micro batch 1 (sequences 3 to 3 of the step); in 1 of 4 micro batches" in reason
    assert f"step 3 skipped: {reason}" in capfd.readouterr().err
    assert ["skip_reason" in record for record in records.values()] == [step == 3 for step in records]
    stats = read_stats(tmp_path, 1, STEPS)
    assert stats.steps.tolist() == [1, 2, 3, 4]
    counts = dict(zip(stats.names, stats.values["nonfinite"][2], strict=True))
    assert counts["model.layers.1.mlp.down_proj.weight"] == 64 * 96
    assert np.isnan(stats.values["weight_norm"][2]).all()
    assert stats.values["nonfinite"][[0, 1, 3]].sum() == 0


def test_as_many_in_a_row_as_the_recipe_says_end_the_run(folder, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(4, 1000)))
    recipe = recipe_on(folder, Monitor(max_nonfinite_steps=2), layouts={2: tiny_recipe(folder).layouts[1]})
    with pytest.raises(RankError, match=r"TrainingError: step 4: 2 steps in a row were not finite: NaN .* model.layers.1.mlp"):
        run(recipe, 2, tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def twenty_times(optimizer, args, options):
    """What norms and biases are given to learn from."""
    for group in optimizer.param_groups:
        for flat in group["params"] if not group["weight_decay"] else ():
            flat.grad.mul_(20)


@pytest.mark.parametrize("choice", ["stop", "log"])
def test_drift_stops_the_run_or_is_logged_as_the_recipe_says(folder, tmp_path, monkeypatch, capfd, choice):
    build = train_module.build_recipe_trainer

    def build_with_fault(*args, **options):
        trainer = build(*args, **options)
        if trainer.grid.tensor_rank == 1:
            trainer.optimizer.register_step_pre_hook(twenty_times)
        return trainer

    monkeypatch.setattr(train_module, "build_recipe_trainer", build_with_fault)
    monitor = Monitor(drift_every_steps=2, on_drift=choice)
    recipe = recipe_on(folder, monitor, layouts=TENSOR, optimizer=AdamW(lr=1e-3, clip=0.5))
    told = "step 2: copies .*model.layers.0.input_layernorm.weight differs across tensor ranks"
    if choice == "stop":
        with pytest.raises(RankError, match=f"TrainingError: {told}"):
            run(recipe, 2, tmp_path)
        return
    assert len(run(recipe, 2, tmp_path)) == STEPS
    err = capfd.readouterr().err
    assert "step 2: copies differ: model.layers.0.input_layernorm.weight differs across tensor ranks" in err
    assert err.count("copies differ") == 1  # the same ones, at every check


def test_on_a_gpu_copies_that_were_never_equal_are_logged(monkeypatch):
    """Its first runs may show kernels that differ between ranks; once copies have been equal, a difference is a fault."""
    drift = Drift(name="w", across="tensor", ranks=(1,), group=(0, 1), largest=1e-3)
    for device, checks, stops in (("cpu", [[drift]], True), ("cuda", [[drift], [drift]], False), ("cuda", [[], [drift]], True)):
        found = iter(checks)
        monkeypatch.setattr("recipes.common.monitor.monitor.find_drift", lambda trainer, found=found: next(found))
        trainer, said = SimpleNamespace(grid=SimpleNamespace(device=torch.device(device), rank=0)), []
        monkeypatch.setattr("recipes.common.monitor.monitor.ParameterStats", lambda *_: SimpleNamespace(names=(), layers=None))
        recipe = SimpleNamespace(monitor=Monitor(every_steps=0, activations_every_steps=0), optimizer=AdamW(lr=1.0))
        monitor = RunMonitor(trainer, recipe, None, log=SimpleNamespace(note=said.append))
        with pytest.raises(TrainingError) if stops else contextlib.nullcontext():
            for step, _ in enumerate(checks, 1):
                monitor._check_drift(step)
        assert stops or [text.split(":")[0] for text in said] == ["step 1"]


FAULTS = {  # what raises, and the part that goes off for it
    "parameter_stats.add_sums": "statistics are off from step 1: another rank failed, see its output",
    "layer_stats.largest_logit": "statistics are off from step 2: another rank failed, see its output",
    "replica_drift.checksum": "the comparison of copies is off from step 2: another rank failed, see its output",
}


@pytest.fixture(scope="module")
def unwatched(folder, tmp_path_factory):
    return run(recipe_on(folder, OFF, layouts=TENSOR), 2, tmp_path_factory.mktemp("unwatched") / "run")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_that_raises_on_one_rank_is_off_on_all_and_told_once(folder, unwatched, tmp_path, monkeypatch, capfd, fault):
    """Statistics of one rank, of a layer in the middle of a forward pass, and what comes before a collective."""
    module, name = fault.split(".")
    real = getattr(importlib.import_module(f"recipes.common.monitor.{module}"), name)

    def broken(*args):
        if torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("planted")
        return real(*args)

    monkeypatch.setattr(f"recipes.common.monitor.{fault}", broken)
    records = run(recipe_on(folder, ON, layouts=TENSOR), 2, tmp_path / "broken")
    assert [records[step]["loss"] for step in records] == [unwatched[step]["loss"] for step in unwatched]
    said = capfd.readouterr().err
    assert said.count(f"monitor: {FAULTS[fault]}") == 1
    assert said.count("rank 1: monitor: ") == said.count("planted") == 1
    assert ("weight_norm" in records[STEPS]) == (module == "replica_drift")


def test_weights_that_are_all_zero_have_no_ratio(folder, tmp_path, monkeypatch):
    """Nothing to divide by: a number that is none, not an exception."""
    stats = object.__new__(ParameterStats)
    stats.names, stats._clip, stats._sizes, stats._padding = ("w",), 0.0, np.ones(1), np.zeros(1)
    sums = np.zeros((len(SUMS), 1))
    assert np.isnan(parameter_stats._totals(sums)["update_ratio"])
    assert np.isnan(stats._decode(sums, 0.0, np.zeros(1, dtype=bool))["update_ratio"]).all()


def test_statistics_that_cannot_be_opened_are_left_out(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipes.common.monitor.monitor.StatsWriter", full)
    monitor, said = object.__new__(RunMonitor), []
    monitor._writers, monitor._note, monitor._monitor, monitor._out_dir = {}, said.append, Monitor(), tmp_path
    monitor._trainer = SimpleNamespace(stage=SimpleNamespace(router_losses=None))
    monitor._stats = SimpleNamespace(names=("w",), layers=SimpleNamespace(depth=1))
    monitor.rewind(None)
    assert len(said) == 2
    assert all("are not written: OSError" in text for text in said)
    monitor.close()
