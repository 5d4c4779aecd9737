"""`spikes batch`, `replay`, `compare` and `plan-rewind` on a real small run with one bad sequence in it."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from recipes.common.anomalies.events import Event
from recipes.common.data.order import kept_index
from recipes.common.run_dir.metrics import read_metrics
from tests.bench.spikes.planted import Planted, make_run
from tests.support.small_runs import call
from tools.spikes import plan_rewind
from tools.spikes.evidence.causes import BAD_DOCUMENT

AT, STEPS = 33, 40
PLANTED = Planted(BAD_DOCUMENT, "noise", AT, seed=5, options={"seqs": 8}, steps=STEPS)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(PLANTED, tmp_path_factory.mktemp("planted"))


def spikes(*arguments):
    return call("spikes", *arguments)


def content(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if "loss" in r}


def test_the_losses_of_a_batch_are_those_of_the_run(run_dir):
    """The step after a checkpoint sees the very weights that are in it."""
    found = spikes("batch", run_dir, 31, "--json").json
    assert found["checkpoint"].endswith("step_00000030")
    assert np.mean([s["loss"] for s in found["sequences"]]) == pytest.approx(losses(run_dir)[31], abs=2e-6)
    assert found["mean_loss"] == pytest.approx(losses(run_dir)[31], abs=2e-6)


def test_the_bad_sequences_are_the_worst_of_their_batch_and_called_odd(run_dir):
    sequences = spikes("batch", run_dir, AT, "--json").json["sequences"]
    rng = np.random.default_rng(PLANTED.seed)  # as the planting drew them
    bad = set(rng.choice(PLANTED.global_seqs, PLANTED.options["seqs"], replace=False).tolist())
    assert {s["index"] for s in sequences[: len(bad)]} == bad
    assert all(s["odd"] for s in sequences[: len(bad)])
    assert sum(bool(s["odd"]) for s in sequences[len(bad) :]) <= 1
    assert [s["loss"] for s in sequences] == sorted((s["loss"] for s in sequences), reverse=True)
    text = spikes("batch", run_dir, AT, "--top", 2)
    assert text.code == 0 and "language.txt" in text.out and "30 more with --top 32" in text.out


def test_before_the_first_checkpoint_the_batch_is_shown_without_losses(run_dir):
    found = spikes("batch", run_dir, 5, "--json").json
    assert found["checkpoint"] is None and {s["loss"] for s in found["sequences"]} == {None}


def test_a_replay_is_bitwise_what_was_logged_and_changes_no_file(run_dir):
    before = content(run_dir)
    found = spikes("replay", run_dir, AT, "--other-batch", "--json").json
    assert found["bitwise"] and found["reproducible"] and found["first_different_step"] is None
    assert found["replayed"]["same batch"]["loss"] == losses(run_dir)[AT]
    assert "reproducible" in found["verdicts"][0] and "goes away with another batch" in found["verdicts"][1]
    assert content(run_dir) == before


def test_before_the_first_checkpoint_a_replay_begins_with_the_initial_weights(run_dir):
    found = spikes("replay", run_dir, 2, "--json").json
    assert found["bitwise"] and found["checkpoint"] == "the initial weights"


def test_a_layout_that_the_model_is_too_small_for_is_rejected_in_one_line(run_dir):
    told = spikes("replay", run_dir, 32, "--layout", "pipeline=2,pipeline_schedule=zero_bubble_v")
    assert told.code == 2 and "Traceback" not in told.err
    assert "the model has 2 layers; use 1 stages at most, or pipeline_schedule='zero_bubble'" in told.err


@pytest.mark.parametrize("layout", ["tensor=2", "pipeline=2,pipeline_schedule=zero_bubble", "tensor=2,sequence_parallel=1"])
def test_a_replay_in_another_layout_agrees_to_rounding(run_dir, layout):
    found = spikes("replay", run_dir, 32, "--layout", layout, "--json").json
    assert found["reproducible"] and found["ranks"] == 2
    assert found["replayed"]["same batch"]["loss"] == pytest.approx(losses(run_dir)[32], rel=1e-5)


def test_what_the_checkpoint_and_the_data_do_not_give_is_called_a_hardware_suspect(run_dir, tmp_path):
    """A step whose logged loss nobody can compute again: here the log is what changed."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["step"] == 32:
            record["loss"] *= 1.5
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    replayed = spikes("replay", copy, AT, "--json")
    assert replayed.code == 1
    assert replayed.json["first_different_step"] == 32 and "hardware suspect" in replayed.json["verdicts"][0]


def test_a_run_compared_with_itself_and_with_a_changed_recipe(run_dir, tmp_path):
    same = spikes("compare", run_dir, run_dir, "--json").json
    assert same["first_different_step"] is None and same["differences"] == [] and same["same_data_order"]
    copy = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["seed"] += 1
    (copy / "recipe.json").write_text(json.dumps(recipe))
    other = spikes("compare", run_dir, copy, "--json").json
    assert other["same_data_order"] is False
    assert [(d["field"], d["a"], d["b"]) for d in other["differences"]] == [("seed", PLANTED.seed, PLANTED.seed + 1)]


def test_spikes_at_the_same_steps_are_the_data_and_at_other_steps_the_dynamics(tmp_path):
    rng = np.random.default_rng(0)
    names = {"a": (400, 900, 1300), "b": (400, 900, 1300), "c": (500, 1000, 1500)}
    for name, at in names.items():
        curve = 3 + 2 / np.sqrt(np.arange(1, 2001)) + 0.01 * rng.standard_normal(2000)
        curve[list(at)] += 1.0
        rows = "".join(f"{step},{loss:.6f}\n" for step, loss in enumerate(curve))
        (tmp_path / f"{name}.csv").write_text("step,loss\n" + rows)
    data = spikes("compare", tmp_path / "a.csv", tmp_path / "b.csv", "--json").json
    assert data["verdict"] == "data" and data["shared"] == [400, 900, 1300] and data["chance"] < 1e-6
    dynamics = spikes("compare", tmp_path / "a.csv", tmp_path / "c.csv", "--json").json
    assert dynamics["verdict"] == "dynamics" and dynamics["shared"] == []


def test_a_rewind_rolls_back_before_the_event_and_skips_what_its_steps_read(run_dir):
    plan = spikes("plan-rewind", run_dir, AT, "--json").json
    first, last = plan["suspect_steps"]
    assert first < AT <= last and plan["resume_step"] == 30
    records = {r["step"]: r for r in read_metrics(run_dir) if "loss" in r}
    read = [records[first - 1]["consumed_seqs"], records[last]["consumed_seqs"] - 1]
    start, end = kept_index(np.array(read), ()).tolist()
    assert plan["skip"] == [start, end + 1]
    assert plan["steps_repeated"] == STEPS - 30
    assert plan["tokens_repeated"] == sum(r["tokens"] for s, r in records.items() if s > 30)
    assert f"--resume-step 30 --skip {start}:{end + 1}" in plan["command"]
    wider = spikes("plan-rewind", run_dir, AT, "--margin-steps", 5, "--skip-steps", 20, "--json").json
    assert wider["suspect_steps"] == [AT - 5, AT + 14] and wider["resume_step"] == 20
    assert wider["sequences_skipped"] == 20 * PLANTED.global_seqs


def test_slow_steps_before_an_event_are_not_its_onset(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    slow = [record | {"seconds": 0.01 * record["step"] if AT - 10 <= record["step"] < AT - 1 else 0.1} for record in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in slow))
    assert spikes("plan-rewind", copy, AT, "--json").json["suspect_steps"] == [AT - 1, AT]


def test_a_rewind_is_planned_for_the_spike_though_slow_steps_and_a_slow_rise_last(monkeypatch):
    def event(kind, onset, peak):
        return Event(onset, peak, None, 1.0, kind, True, "loss", peak - onset)

    found = [event("hardware_suspect", 33, 34), event("slow_rise", 5, 40), event("outlier_batch", 33, 33)]
    monkeypatch.setattr(plan_rewind, "scan", lambda steps, columns: found)
    records = {step: {"loss": 2.0} for step in range(1, 41)}
    assert plan_rewind._event_at(records, 33) is found[2]
    cured = event("fast_recovery", 31, 35)
    found.append(cured)
    assert plan_rewind._event_at(records, 33) is cured
    del found[2:]
    assert plan_rewind._event_at(records, 33) is None


def test_without_a_checkpoint_before_the_event_the_run_cannot_roll_back(run_dir):
    called = spikes("plan-rewind", run_dir, 4)
    assert called.code == 1 and "cannot roll back" in called.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("batch", "RUN", 99), "has steps 1 to 40"),
        (("batch", "NONE", 3), "no recipe.json"),
        (("replay", "RUN", 99), "has no step 99; it has 1 to 40"),
        (("replay", "RUN", 33, "--fp32"), "was trained in fp32"),
        (("replay", "RUN", 33, "--layout", "data=3"), "is not a multiple of micro_seqs"),
        (("replay", "RUN", 33, "--layout", "tensors=3"), "is not tensor=N"),
        (("compare", "RUN", "NONE"), "no"),
        (("plan-rewind", "RUN", "step_x"), "neither a step nor a black box"),
        (("plan-rewind", "RUN", 33, "--skip-steps", 0), "--skip-steps=0: must be 1 or more"),
        (("explain", "RUN", 99), "has steps 1 to 40"),
        (("explain", "NONE", 1), "is no run directory"),
    ],
)
def test_mistakes_are_said_in_a_line(run_dir, tmp_path, arguments, words):
    called = spikes(*({"RUN": run_dir, "NONE": tmp_path / "none"}.get(word, word) for word in arguments))
    assert called.code == 2 and called.out == ""
    assert called.err.startswith("error: ") and words in called.err and "Traceback" not in called.err


DAMAGED = {
    "cut": ('{"step": 101, "loss"', "line 12 is not a record of a step"),
    "no step": ('{"step": null, "loss": 2}', "line 12 is not a record of a step: it has no step"),
    "a step beyond all": ('{"step": 10000000000000000000000, "loss": 2}', "its step 10000000000000000000000 is beyond"),
    "zeros": ("\0\0\0", "line 12 is not a record of a step"),
}


@pytest.mark.parametrize(
    ("verb", "name"),
    [*(("plan-rewind", name) for name in DAMAGED), *((verb, "cut") for verb in ("explain", "batch", "replay", "report"))],
)
def test_a_damaged_line_of_the_metrics_is_named_by_every_command(run_dir, tmp_path, verb, name):
    line, words = DAMAGED[name]
    copy = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([*lines[:11], line, *lines[11:]]) + "\n")
    called = spikes(verb, copy, *([] if verb == "report" else [AT]))
    assert (called.code, called.out) == (2, "") and called.err.count("\n") == 1
    assert called.err.startswith("error: ") and words in called.err and str(copy / "metrics.jsonl") in called.err


@pytest.mark.parametrize(("field", "value"), [("loss", [1]), ("tokens", None), ("seconds", {}), ("consumed_seqs", "x")])
def test_a_step_without_the_numbers_that_a_plan_is_made_of_is_named(run_dir, tmp_path, field, value):
    copy = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    wrong = [record | ({field: value} if record["step"] == 12 else {}) for record in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in wrong))
    called = spikes("plan-rewind", copy, AT)
    assert (called.code, called.out) == (2, "") and called.err.count("\n") == 1
    assert f"metrics.jsonl: step 12 has {field}={json.dumps(value)}: must be a number" in called.err
    assert spikes("report", copy).code == spikes("explain", copy, AT).code == 0
