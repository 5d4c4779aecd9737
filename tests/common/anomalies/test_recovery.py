"""Rewind and skip: the run goes back by itself, and equals the run that a person resumes by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from recipes.common.anomalies import recovery
from recipes.common.anomalies.events import Event
from recipes.common.anomalies.rewinds import read_history
from recipes.common.checkpoint.reader import Reader
from recipes.common.checks.recipe_checks import reaction_problems
from recipes.common.data.order import sequence_position
from recipes.common.recipe import AdamW, Batch, Checkpoints, Constant, Evaluation, Layout, Monitor, Reaction
from recipes.common.run_dir.black_box import read_boxes
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.segments import changed_facts, read_chain, read_segments
from tests.support.small_runs import assert_same_state, run, small_recipe
from tests.support.tiny import tiny_config, write_shards
from tools.common.forked_ranks import RankError

STEPS, BAD_STEP = 8, 6
SMALL = tiny_config("llama", num_hidden_layers=2)
KNOWN, UNKNOWN = (3, 60), (100, 131)  # ids of the good text, and of the bad document that no step before has seen


def diverged(step, delta):
    return Event(step, step, None, delta, "diverged", True, "loss", 0, number=step)


class HalfANat:
    """Stands in for the detectors: half a nat above the best loss so far is a divergence, seen at once."""

    failures = ()

    def __init__(self, detectors=None):
        self.best = np.inf
        self.of_step_time = detectors is not None

    def push(self, step, values):
        return [] if self.of_step_time else self.judge(step, values)

    def judge(self, step, values):
        loss, self.best = values["loss"], min(self.best, values["loss"])
        return [diverged(step, loss - self.best)] if loss > self.best + 0.5 else []

    def resumed(self, step):
        pass


@pytest.fixture(autouse=True)
def simple_detectors(request, monkeypatch):
    """The detectors have tests of their own; ranks are forked, so they see this too."""
    if "real_detectors" not in request.fixturenames:
        monkeypatch.setattr(recovery, "AnomalyDetector", HalfANat)


@pytest.fixture
def real_detectors():
    """For a test that shows the whole: what the detectors see is what the run undoes."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Easy text, and hard sequences where step BAD_STEP reads."""
    return write_easy_text(tmp_path_factory.mktemp("data") / "tokens", np.arange(4 * (BAD_STEP - 1), 4 * BAD_STEP))


def write_easy_text(folder, bad_sequences):
    write_shards(folder, tokens=8_000)
    rng = np.random.default_rng(0)
    for name in ("train", "validation"):
        path = folder / f"{name}_00000.bin"
        count = path.stat().st_size // 2
        ids = rng.integers(*KNOWN, count).astype("<u2")
        if name == "train":
            for position in sequence_position(1234, bad_sequences, (count - 1) // 16):
                ids[position * 16 : position * 16 + 17] = rng.integers(*UNKNOWN, 17)
        path.write_bytes(ids.tobytes())
    return folder


def recipe_on(data, **fields):
    values = {
        "steps": STEPS,
        "batch": Batch(seq_len=16, micro_seqs=2, global_seqs=4),
        "layouts": {1: Layout(), 2: Layout(pipeline=2)},
        "optimizer": AdamW(lr=1e-2, clip=1.0),
        "schedule": Constant(warmup_steps=4),
        "evaluation": Evaluation(),
        "checkpoints": Checkpoints(every_steps=2, keep_last=9),
        "reaction": Reaction(action="rewind"),
    }
    return small_recipe(data, fields.pop("model", SMALL), **(values | fields))


def numbers(records):
    return {step: (r["loss"], r["grad_norm"], r["lr"], r["consumed_seqs"]) for step, r in records.items()}


@pytest.mark.parametrize(("layout", "config"), [(Layout(), "zero1_fp32.json"), (Layout(tensor=2), "zero1_bf16.json")])
def test_a_rewound_run_equals_bitwise_one_resumed_by_hand(data, tmp_path, layout, config):
    ranks, recipe = 2, recipe_on(data, deepspeed=config, layouts={2: layout})
    rewound = run(recipe, ranks, tmp_path / "rewound")
    logged = replace(recipe, reaction=Reaction())
    assert max(r["loss"] for r in rewound.values()) == rewound[1]["loss"]
    spiked = run(logged, ranks, tmp_path / "by_hand", max_steps=BAD_STEP)
    assert spiked[BAD_STEP]["loss"] > spiked[BAD_STEP - 1]["loss"] + 0.5
    # the suspects are steps 5 and 6, sequences 16 to 23; the checkpoint before them is step 4's
    by_hand = run(logged, ranks, tmp_path / "by_hand", resume=True, resume_step=4, skips=((16, 24),))
    assert numbers(rewound) == numbers(by_hand)
    assert_same_state(tmp_path / "rewound", tmp_path / "by_hand", 0.0)


def test_a_bad_document_is_seen_undone_and_costs_nothing(tmp_path, real_detectors):
    """Steps 43 to 45 read words that no text before had, at a high learning rate. The clean run never meets them."""
    steps, bad = 50, np.arange(4 * 42, 4 * 45)
    final = {}
    for name, sequences in (("clean", bad[:0]), ("planted", bad)):
        recipe = recipe_on(
            write_easy_text(tmp_path / name / "data", sequences),
            steps=steps,
            evaluation=Evaluation(every_steps=steps, seqs=16),
            checkpoints=Checkpoints(every_steps=10),
            monitor=Monitor(activations_every_steps=0, drift_every_steps=0),
        )
        final[name] = run(recipe, 1, tmp_path / name / "run")
    (rewind,) = read_history(tmp_path / "planted/run")
    assert rewind.onset_step == 43
    assert rewind.to_step == 40
    assert rewind.from_step <= 46
    assert set(bad[:8].tolist()) <= set(range(*rewind.skipped))  # all that was read of it by the time it was seen
    assert read_history(tmp_path / "clean/run") == ()
    undone = [r["loss"] for r in read_metrics(tmp_path / "planted/run/metrics.after_step_00000040.jsonl")]
    assert max(undone) > final["clean"][42]["loss"] + 1
    assert final["planted"][steps]["val_loss"] == pytest.approx(final["clean"][steps]["val_loss"], abs=0.05)
    (box,) = [box for box in read_boxes(tmp_path / "planted/run") if box["reaction"]]
    with np.load(tmp_path / "planted/run/events" / box["folder"] / "tensor_stats.npz") as stats:
        assert stats["steps"].max() >= 44  # of steps that the run's own statistics no longer hold
        assert "lm_head.weight" in stats["names"]


def test_a_rewind_is_in_the_metrics_the_history_and_a_black_box(data, tmp_path):
    records = run(recipe_on(data), 2, tmp_path)
    assert [records[step].get("rewinds") for step in (4, 5, STEPS)] == [None, 1, 1]
    assert records[5]["rewound_from_step"] == BAD_STEP
    undone = list(read_metrics(tmp_path / "metrics.after_step_00000004.jsonl"))
    assert [(r["step"], r.get("event")) for r in undone] == [(5, None), (6, "diverged")]
    manifest = json.loads((tmp_path / "run.json").read_text())
    entry = manifest["history"][0]
    assert (entry["from_step"], entry["to_step"], entry["skipped"], entry["kind"]) == (6, 4, [16, 24], "diverged")
    assert manifest["starts"][-1]["skips"] == [[16, 24]]  # where the tools look for what a step read
    start, rewind = read_segments(tmp_path)
    assert (rewind.cause, rewind.step, rewind.attempt, read_chain(tmp_path)[1]) == ("rewind", 4, 1, [])
    assert changed_facts(start.facts, rewind.facts) == ["run.skips"] and rewind.facts["run.skips"] == [[16, 24]]
    assert manifest["starts"][-1]["segments"] == [start.hash, rewind.hash]
    (box,) = read_boxes(tmp_path)
    assert (box["folder"], box["class"], box["reaction"]["to_step"]) == ("step_00000006_diverged", "diverged", 4)
    window = list(read_metrics(tmp_path / "events" / box["folder"] / "metrics_window.jsonl"))
    assert [r["step"] for r in window] == [1, 2, 3, 4, 5, 6]
    read = json.loads((tmp_path / "events" / box["folder"] / "sequences.json").read_text())["steps"]
    assert read["6"]["sequences"] == [20, 21, 22, 23]
    count = (8_000 - 1) // 16
    assert read["6"]["position"] == sequence_position(1234, np.arange(20, 24), count).tolist()


def test_a_stop_after_the_rewind_forgets_nothing(data, tmp_path):
    """Stopped before the next save, the skip and the lowered rate are in the history alone."""
    recipe = recipe_on(data, reaction=Reaction(action="rewind", lr_factor=0.5, lr_steps=3))
    straight = run(recipe, 1, tmp_path / "straight")
    assert [straight[step]["lr"] for step in (4, 5, 7, 8)] == [1e-2, 5e-3, 5e-3, 1e-2]
    assert straight[5]["lr_factor"] == 0.5
    stopped = replace(recipe, checkpoints=Checkpoints(every_steps=4, keep_last=9))
    run(stopped, 1, tmp_path / "stopped", max_steps=BAD_STEP)
    shutil.rmtree(tmp_path / "stopped/checkpoints/step_00000006")  # as if killed before this save
    assert [folder.name for folder in sealed_checkpoints(tmp_path / "stopped")] == ["step_00000004"]
    resumed = run(stopped, 1, tmp_path / "stopped", resume=True)
    assert numbers(resumed) == numbers(straight)


class HighestNormSoFar(HalfANat):
    """A step whose norm is a quarter above all before it is off the curve."""

    def judge(self, step, values):
        self.highest = max(getattr(self, "highest", 0.0), values.get("grad_norm", 0.0))
        return []

    def norm_limit(self):
        return 1.25 * getattr(self, "highest", np.inf)


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        (Layout(pipeline=2), "zero1_bf16.json"),
        (Layout(tensor=2), "zero1_fp32.json"),
    ],
)
def test_a_step_over_the_ceiling_changes_no_weight(data, tmp_path, monkeypatch, layout, config):
    """Of ZeRO 2 and 3: tests/common/engine/test_deepspeed_patches.py."""
    monkeypatch.setattr(recovery, "AnomalyDetector", HighestNormSoFar)
    recipe = recipe_on(
        data,
        model=tiny_config("llama"),  # whose norm rises at step 3
        steps=4,
        layouts={2: layout},
        deepspeed=config,
        checkpoints=Checkpoints(every_steps=1, keep_last=9),
        reaction=Reaction(action="skip"),
    )
    records = run(recipe, 2, tmp_path)
    assert [step for step in records if "skip_reason" in records[step]] == [3]
    assert 1.25 * max(records[step]["grad_norm"] for step in (1, 2)) < records[3]["grad_norm"] < np.inf
    assert records[3]["skipped_steps"] == 1
    readers = [Reader(folder) for folder in sealed_checkpoints(tmp_path)[1:]]
    for kind in ("master", "exp_avg"):
        before, after, later = ({name: reader.whole(name, kind) for name in reader.names(kind)} for reader in readers)
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert any(not np.array_equal(after[name], later[name]) for name in after)


def test_tries_are_bounded_and_the_error_names_them(data, tmp_path, monkeypatch):
    class Always(HalfANat):
        def judge(self, step, values):
            return [diverged(step, 1.0)] if step >= BAD_STEP else []

    monkeypatch.setattr(recovery, "AnomalyDetector", Always)
    recipe = recipe_on(data, reaction=Reaction(action="rewind", max_rewinds=2, lr_factor=0.5, lr_steps=2))
    words = (
        r"TrainingError: step 6: diverged from step 6; tried: diverged from step 6: from step 6 back to 4, sequences 16:24 "
        r"skipped, learning rate x 0.5 up to step 6; tried: .*from step 6 back to 2, sequences 24:40 skipped.*; "
        r"the last checkpoint"
    )
    with pytest.raises(RankError, match=words):
        run(recipe, 1, tmp_path)
    assert len(read_boxes(tmp_path)) == 3


def test_weights_that_are_not_finite_are_left_behind(data, tmp_path):
    """A mad rate throws the weights out of range at step 3: no later step is finite, and each is skipped."""
    recipe = recipe_on(data, steps=9, checkpoints=Checkpoints(every_steps=8, keep_last=2))
    run(recipe, 2, tmp_path, max_steps=2)
    mad = replace(recipe, optimizer=AdamW(lr=1e25, clip=0.0), reaction=Reaction(action="rewind", lr_factor=1e-27, lr_steps=99))
    records = run(mad, 2, tmp_path, resume=True)
    assert sorted(records) == list(range(1, 10))
    assert records[9]["loss"] < 4.5
    assert records[9]["rewinds"] == 1
    box = read_boxes(tmp_path)[-1]
    assert "3 steps in a row were not finite" in box["hopeless"]
    assert box["reaction"]["to_step"] == 2


def test_without_a_checkpoint_before_it_the_run_goes_on_and_says_so(data, tmp_path, capfd):
    recipe = recipe_on(data, steps=BAD_STEP + 1, checkpoints=Checkpoints(every_steps=50))
    records = run(recipe, 1, tmp_path)
    assert sorted(records) == list(range(1, BAD_STEP + 2))
    assert "cannot rewind, no checkpoint is from before it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"action": "rewnd"}, "reaction.action='rewnd' must be one of"),
        ({"action": "rewind", "max_rewinds": 0}, "reaction.max_rewinds=0 must be a whole number from 1"),
        ({"action": "rewind", "lr_factor": 0.0, "lr_steps": 5}, "reaction.lr_factor=0.0 must be above 0"),
        ({"action": "rewind", "lr_factor": 0.5}, "lr_steps=0: neither does anything without the other"),
        ({"action": "log", "lr_factor": 0.5, "lr_steps": 5}, "has no effect without action='rewind'; remove it"),
    ],
)
def test_what_cannot_work_is_refused(fields, told):
    (problem,) = reaction_problems(Reaction(**fields), Checkpoints(every_steps=10))
    assert told in problem


def test_a_rewind_needs_checkpoints_that_stay():
    assert len(reaction_problems(Reaction(action="rewind"), Checkpoints(keep_last=1))) == 2
    assert reaction_problems(Reaction(action="rewind"), Checkpoints(every_minutes=5.0)) == []
