"""`changed A B`: its words, its numbers and its picture, for runs, segments, logs and runs of earlier versions."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil

import numpy as np
import pytest

from recipes.common.run_dir.metrics import encode
from recipes.common.run_dir.segments import append_segment
from tests.support.recorded_runs import LR, WARMUP, example_facts
from tools.changed.__main__ import main
from tools.changed.part import compare_metrics
from tools.curves import read_line
from tools.spikes.report import report

STEPS = 40


def losses(*, apart_at=0, by=0.0, noise=0.01):
    curve = 5 / np.arange(1, STEPS + 1) ** 0.2 + np.random.default_rng(0).normal(0, noise, STEPS)
    curve[apart_at - 1 :] += by if apart_at else 0.0
    return curve.tolist()


def run(folder, *segments, curve=None):
    folder.mkdir(parents=True)
    curve = losses() if curve is None else curve
    rows = [
        {"step": s, "loss": loss, "lr": LR * min(s / WARMUP, 1), "tokens": 4096, "seconds": 0.1}
        for s, loss in enumerate(curve, 1)
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
    for number, (cause, step, facts) in enumerate(segments, 1):
        append_segment(folder, cause=cause, step=step, attempt=number, run_id="x", facts=facts)
    return folder


def changed(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


FACTS = example_facts()
OTHER = FACTS | {"recipe.seed": 7, "seed.recipe": 7, "environment.NCCL_ALGO": "Tree", "package.tqdm.version": "4.68.0"}


def test_differences_stand_by_what_they_can_do_and_are_counted_once(tmp_path):
    a, b = run(tmp_path / "a", ("start", 0, FACTS)), run(tmp_path / "b", ("start", 0, OTHER), curve=losses(apart_at=9, by=0.02))
    code, out, _ = changed(a, b)
    assert code == 0
    lines = out.splitlines()
    at = [
        next(i for i, line in enumerate(lines) if line == words)
        for words in ("the order of the data", "rounding", "nothing that is trained")
    ]
    assert at == sorted(at) and "seed" in lines[at[0] + 1] and "NCCL_ALGO" in lines[at[1] + 1] and "tqdm" in lines[at[2] + 1]
    assert "follows from seed" in out and "these 2 can change the loss; this 1 cannot" in lines
    assert "the first to part is loss at step 9, by +0.02" in out and "beyond rounding" in out
    assert (b / "changed.svg").is_file() and lines[-1] == str(b / "changed.svg")
    assert "parts at step 9" in (b / "changed.svg").read_text()


def test_an_identical_rerun_and_a_copy_elsewhere_differ_in_nothing(tmp_path):
    a = run(tmp_path / "a", ("start", 0, FACTS), ("resume", 20, OTHER))
    rerun = run(tmp_path / "rerun", ("start", 0, FACTS), ("resume", 20, OTHER))
    shutil.copytree(a, tmp_path / "far" / "away" / "copy")
    for other in (rerun, tmp_path / "far" / "away" / "copy"):
        code, out, _ = changed(a, other, "--json", "--out", tmp_path / "x.svg")
        found = json.loads(out)
        assert code == 0 and found["differences"] == [] and found["partings"] == [] and found["incidents"] == []
        assert found["verdict"] == "no differences" and found["common_steps"] == STEPS


def test_runs_are_compared_in_the_segments_that_were_in_force_at_the_same_steps(tmp_path):
    early = FACTS | {"environment.OMP_NUM_THREADS": "1"}
    a = run(tmp_path / "a", ("start", 0, FACTS), ("resume", 20, FACTS))
    b = run(tmp_path / "b", ("start", 0, early), ("resume", 20, FACTS))
    names = [d["name"] for d in json.loads(changed(a, b, "--json")[1])["differences"]]
    assert names == ["environment.OMP_NUM_THREADS"]  # though their last segments are equal
    found = json.loads(changed(f"{b}:1", f"{b}:2", "--json")[1])
    assert [d["name"] for d in found["differences"]] == names and found["common_steps"] == 0
    assert found["boundary"].startswith("after step 20, where segment 2 begins, the loss moves by")
    late = run(tmp_path / "late", ("start", 0, FACTS), ("resume", 100, early))  # of steps that were not reached
    assert json.loads(changed(a, late, "--json")[1])["differences"] == []


def test_a_log_and_a_run_of_an_earlier_version_are_compared_by_what_they_have(tmp_path):
    a = run(tmp_path / "a", ("start", 0, FACTS))
    log = tmp_path / "train.csv"
    log.write_text("step,loss\n" + "".join(f"{s},{loss:.4f}\n" for s, loss in enumerate(losses(), 1)))
    code, out, _ = changed(a, log, "--out", tmp_path / "x.svg")
    assert code == 0 and f"nothing is recorded of {log}" in out and "within rounding" in out  # that of its four decimals
    old = run(tmp_path / "old")
    recipe = {"name": "x", "seed": 1, "optimizer": {"class": "AdamW", "lr": 0.1}}
    newer = recipe | {"optimizer": {"class": "AdamW", "lr": 0.2}}
    (old / "recipe.before_step_00000021.json").write_text(json.dumps(recipe))
    (old / "recipe.json").write_text(json.dumps(newer))
    starts = [{"resumed_step": step, "git": {"commit": "a", "dirty": False}} for step in (None, 20)]
    (old / "run.json").write_text(json.dumps({"run_id": "x", "name": "x", "starts": starts}))
    found = json.loads(changed(f"{old}:1", f"{old}:2", "--json")[1])
    assert [(d["name"], d["old"], d["new"]) for d in found["differences"]] == [("recipe.optimizer.lr", 0.1, 0.2)]
    found = json.loads(changed(a, old, "--json")[1])
    assert "package" in found["not_recorded"] and not any(d["name"].startswith("package") for d in found["differences"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none", "a"], "none: no such run directory or log"),
        (["a:3", "a"], "has no segment 3; it has 1"),
        (["log.csv:1", "a"], "a log has no segments"),
        (["a", "a", "--out", "x.gift"], "x.gift"),
    ],
)
def test_a_mistake_is_exit_2(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "a", ("start", 0, FACTS))
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n2,3\n")
    code, out, err = changed(*words)
    assert code == 2 and told in err and not out


def table(values, **more):
    return {"step": np.arange(1, len(values) + 1), "loss": np.array(values), "tokens": np.full(len(values), 4096.0), **more}


def test_rounding_is_what_the_type_gives_and_grows_with_the_steps():
    a = np.full(60, 4.0) + np.random.default_rng(1).normal(0, 0.02, 60)
    drift = 4.0 * 2.0**-24 * np.maximum(np.arange(60) - 9, 0)  # a rounding a step, from step 11 on
    inside = compare_metrics(table(a), table(a + drift), "fp32").of("loss")
    assert inside.step == 11 and inside.within_rounding
    assert inside.expected == pytest.approx(8 * a[10] * 2.0**-24 * (1 + 1 / 64))
    beyond = compare_metrics(table(a), table(a + 1e-4 * (np.arange(60) >= 10)), "fp32").of("loss")
    assert beyond.jump == 11 and not beyond.within_rounding
    assert compare_metrics(table(a), table(a + 1e-4 * (np.arange(60) >= 10)), "bf16").of("loss").within_rounding
    later = drift + 0.5 * (np.arange(60) >= 40)  # rounding first, then something that it cannot do
    assert compare_metrics(table(a), table(a + later), "fp32").of("loss").jump == 41
    rate = np.full(60, 1e-3)
    exact = compare_metrics(table(a, lr=rate), table(a, lr=rate * (1 + 1e-12)), "fp32").first
    assert (exact.column, exact.step, exact.expected, exact.within_rounding) == ("lr", 1, 0.0, False)


def test_numbers_that_are_not_finite_in_one_run_only_part_there():
    a, b = [3.0, 2.9, 2.8, 2.7], [3.0, 2.9, np.nan, np.nan]
    parting = compare_metrics(table(a), table(b), "fp32").of("loss")
    assert parting.step == 3 and not parting.within_rounding and parting.as_json()["difference"] is None


def test_a_number_that_one_run_took_more_often_is_compared_where_both_have_it():
    a = np.linspace(4, 3, 40)
    often, rarely = np.full(40, np.nan), np.full(40, np.nan)
    often[4::5], rarely[9::10] = a[4::5] + 0.1, a[9::10] + 0.1
    found = compare_metrics(table(a, val_loss=often), table(a, val_loss=rarely), "fp32")
    assert found.partings == () and "val_loss" in found.equal
    never = np.roll(rarely, 1)  # at other steps: nothing to compare, so not said to be equal
    found = compare_metrics(table(a, val_loss=rarely), table(a, val_loss=never), "fp32")
    assert found.partings == () and found.equal == ("loss", "tokens")
    found = compare_metrics(table(a, val_loss=often), table(a, val_loss=rarely + (np.arange(40) >= 30)), "fp32")
    assert found.first.column == "val_loss" and found.first.step == 40


def test_a_log_is_compared_to_the_digits_that_it_prints():
    steps = np.arange(1, 41)
    loss, rate = 3.0 - 0.0123456789 * steps, 3e-4 * steps / 1300
    by_decimals = table([float(f"{v:.4f}") for v in loss], lr=np.array([float(f"{v:.3E}") for v in rate]))
    found = compare_metrics(table(loss, lr=rate), by_decimals, "fp32", (False, True))
    assert {p.column: p.within_rounding for p in found.partings} == {"loss": True, "lr": True}
    assert found.of("lr").expected == pytest.approx(0.5e-3 * 10 ** np.floor(np.log10(rate[found.of("lr").step - 1])), rel=1e-3)
    other = table(loss, lr=rate * (1 + 2e-3 * (steps >= 20)))
    assert compare_metrics(other, by_decimals, "fp32", (False, True)).of("lr").jump == 20
    late = table(loss + 6e-4 * (steps >= 35))  # a digit does not grow with the steps, as rounding does
    assert compare_metrics(late, by_decimals, "fp32", (False, True)).of("loss").jump == 35
    exact = compare_metrics(table(loss, lr=np.full(40, 0.001)), table(loss, lr=np.full(40, 0.0014)), "fp32", (False, False))
    assert not exact.of("lr").within_rounding


def test_equal_values_written_otherwise_differ_in_nothing_and_infinities_are_told(tmp_path):
    a = run(tmp_path / "a", ("start", 0, FACTS | {"recipe.optimizer.clip": 1, "recipe.optimizer.betas": [0.9, 1]}))
    same = FACTS | {"recipe.optimizer.clip": 1.0, "recipe.optimizer.betas": [0.9, 1.0]}
    b = run(tmp_path / "b", ("start", 0, same), curve=losses())
    assert json.loads(changed(a, b, "--json")[1])["differences"] == []
    c = run(tmp_path / "c", ("start", 0, same | {"recipe.optimizer.clip": True, "recipe.model.time_step_limit": [0.0, math.inf]}))
    code, out, _ = changed(b, c, "--json")
    found = {d["name"]: d["new"] for d in json.loads(out, parse_constant=pytest.fail)["differences"]}
    assert code == 0 and found == {"recipe.optimizer.clip": True, "recipe.model.time_step_limit": [0.0, "Infinity"]}


@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        ({"sizes.world": 2, "host.0.gpus": 2 * ["Tesla V100-SXM2-32GB"]}, ["another layout"]),  # more of the same
        ({"host.0.driver": "580.1", "host.0.firmware.gpus": ["96.00"]}, []),
        ({"host.1.cpu": "EPYC 9654", "host.1.gpus": ["Tesla V100-SXM2-32GB"], "rank_hosts": [0, 1]}, []),
        ({"host.1.cpu": "EPYC 9654", "host.1.gpus": ["NVIDIA H200"], "rank_hosts": [0, 1]}, ["another kind of device"]),
        ({"recipe.optimizer.clip": 0.5}, []),  # no gradient was so large
        ({"recipe.optimizer.clip": 0.05}, ["silently ignored"]),
        ({"recipe.schedule.decay_steps": 999}, []),  # the rate is as both schedules give it
        ({"data.tokens.hash": "sha256:" + 64 * "9"}, []),  # described anew, prepared from the same
    ],
)
def test_an_incident_is_claimed_only_where_it_is_one(tmp_path, other, kinds):
    a, b = (run(tmp_path / name, ("start", 0, facts)) for name, facts in (("a", FACTS), ("b", FACTS | other)))
    for folder in (a, b):
        rows = [json.loads(line) | {"grad_norm": 0.09} for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
    found = json.loads(changed(a, b, "--json")[1])
    assert found["partings"] == [] and [incident["kind"] for incident in found["incidents"]] == kinds


def test_the_report_and_the_curves_show_the_segments_and_what_changed_at_each(tmp_path):
    a = run(tmp_path / "a", ("start", 0, FACTS), ("resume", 20, OTHER), ("rewind", 30, OTHER))
    text = report(a, tmp_path / "page.html").read_text()
    facts = json.loads(text.partition('id="facts">')[2].partition("</script>")[0])
    first, resumed, rewound = facts["segments"]
    assert (first["changes"], resumed["step"], resumed["cause"], rewound["changes"]) == ([], 20, "resume", [])
    told = [(c["name"], c["effect"], c["grave"]) for c in resumed["changes"]]
    assert told[0] == ("seed", "the order of the data", True) and told[-1][1:] == ("nothing that is trained", False)
    assert resumed["verdict"] == "these 2 can change the loss; this 1 cannot"
    line = read_line(a, "step", "loss", 1)
    assert [x for x, _ in line.marks] == [20, 30]
    assert line.marks[0][1].startswith("resume: seed 1234 → 7; NCCL_ALGO (not there) → Tree") and line.marks[1][1] == ""
