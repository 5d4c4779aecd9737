"""The GPU tier itself, on the CPU: every check runs to its end at a tiny size, fails when it should, and results are kept."""

import json
from types import SimpleNamespace

import pytest
import torch

from recipes.common.model.sharding import Holdings
from tests.gpu import driver, numerics, results, speed
from tests.gpu.__main__ import parse_args
from tests.gpu.device_waits import forbidden_in_micro_batches
from tests.gpu.place import PRECISIONS, GpuCheck, Place, RefutedError, SkippedError, demand_equal, differing
from tests.support.parity import trial_of
from tests.support.tiny import tiny_config
from tools.common.console import FAILED, GOOD, UsageError
from tools.common.forked_ranks import run_ranks

# the rest of the suite runs these on the CPU: the gate with other recipes and precisions, the statistics' oracle, preflight
ELSEWHERE = {f"gate {family} {precision}" for family in ("gpt2", "mixtral") for precision in PRECISIONS}
ELSEWHERE |= {"gate llama bf16", "statistics", "preflight"}


def args(tmp_path, *words):
    return parse_args([*words, "--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.parametrize("check", [check for check in driver.CHECKS if check.name not in ELSEWHERE], ids=lambda check: check.name)
def test_every_check_passes_on_the_cpu(check, tmp_path):
    """Two ranks where it has a use for them. What needs a device says so."""
    found = driver.run_check(check, "cpu", check.ranks, tmp_path / "work")
    assert found["verdict"] == (results.SKIPPED if check.device_only else results.PASSED), found["why"]
    assert found["why"] == ("needs a GPU" if check.device_only else "")
    assert bool(found["figures"]) != check.device_only
    json.dumps(found, allow_nan=False)
    assert not (tmp_path / "work").exists()


def test_checks_have_names_of_their_own_and_the_gate_has_three_families():
    names = [check.name for check in driver.CHECKS]
    assert len(set(names)) == len(names)
    assert {name.split()[1] for name in names if name.startswith("gate ")} == {"llama", "gpt2", "mixtral"}
    assert ELSEWHERE.issubset(names)


def passing(place):
    (place.folder / "left").write_text("deleted")
    return {"ranks": place.ranks}


def refuted(place):
    raise RefutedError("it is not so")


def broken(place):
    return {}["missing"]


def absent(place):
    raise SkippedError("needs a card that is not here")


CHECKS = (
    *(GpuCheck(check.__name__, "shows", check) for check in (passing, refuted, broken, absent)),
    GpuCheck("pair", "shows", passing, ranks=2),
)


def test_results_are_kept_continued_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "describe_machine", lambda device, ranks: {"GPU": "<card>", "GPUs": ranks})
    assert driver.run_tier(args(tmp_path, "1", "--json"), CHECKS) == FAILED
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["checks"] == printed["checks"] and kept["passed"] is printed["passed"] is False
    assert {name: check["verdict"] for name, check in kept["checks"].items()} == {
        "passing": "passed", "refuted": "failed", "broken": "failed", "absent": "skipped", "pair": "skipped",
    }  # fmt: skip
    assert kept["checks"]["passing"]["figures"] == {"ranks": 1}
    assert kept["checks"]["pair"]["why"] == "needs 2 GPUs; NCCL allows one rank a GPU"
    assert "KeyError: 'missing'" in kept["checks"]["broken"]["why"]
    page = (tmp_path / "results.html").read_text()
    assert "1 passed, 2 failed, 2 skipped" in page and "&lt;card&gt;" in page and "<card>" not in page and "http" not in page

    # the same call repeats what failed alone; another machine, or --again, repeats all
    calls = []
    counting = tuple(
        GpuCheck(c.name, "shows", lambda place, c=c: calls.append(c.name) or {"n": 1}, ranks=c.ranks) for c in CHECKS
    )
    assert driver.run_tier(args(tmp_path, "1"), counting) == GOOD
    assert calls == ["refuted", "broken"]
    assert driver.run_tier(args(tmp_path, "1", "--again", "--only", "passing"), counting) == GOOD
    assert calls[2:] == ["passing"]
    monkeypatch.setattr(driver, "describe_machine", lambda device, ranks: {"GPU": "another", "GPUs": ranks})
    assert driver.run_tier(args(tmp_path, "1"), counting) == GOOD
    assert calls[3:] == ["passing", "refuted", "broken", "absent"]


def test_without_time_left_nothing_is_called_good(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "describe_machine", lambda device, ranks: {})
    assert driver.run_tier(args(tmp_path, "1", "--minutes", "-1"), CHECKS[:1]) == FAILED
    assert "no time was left for passing" in capsys.readouterr().out


def test_a_wrong_call_says_what_there_is(tmp_path):
    with pytest.raises(UsageError, match="--only=nothing: no such check; there are: passing, refuted"):
        driver.run_tier(args(tmp_path, "--only", "nothing"), CHECKS)
    if not torch.cuda.device_count():
        with pytest.raises(UsageError, match="2 GPUs are asked for, torch sees 0"):
            driver.run_tier(parse_args(["2", "--out", str(tmp_path)]), CHECKS)


def test_what_differs_is_named():
    a, b = {"x": torch.zeros(2), "y": torch.zeros(1)}, {"x": torch.zeros(2), "y": torch.ones(1), "z": torch.ones(1)}
    assert differing(a, b) == ["y", "z"] and differing(a, a) == []
    with pytest.raises(RefutedError, match="weights differ: y, z"):
        demand_equal("weights", differing(a, b))


def test_a_wrong_gradient_is_refuted(monkeypatch, tmp_path):
    """Each check of numbers can fail: one schedule's losses are moved, fp16's are, and the gate's bound is 0."""
    found = {"losses": [1.0], "norms": [1.0], "held": Holdings(), "skipped": [False]}
    ranks = iter([[found | {"shards": {"w": torch.full((1,), float(name == "zero_bubble_v"))}}] for name in numerics.SCHEDULES])
    monkeypatch.setattr(numerics, "run_ranks", lambda *_: next(ranks))
    with pytest.raises(RefutedError, match="weights of zero_bubble_v and 1f1b differ: "):
        numerics.schedules(Place("cpu", 2, tmp_path))
    plain = SimpleNamespace(losses=[1.0], grad_norms=[1.0])
    answers = iter([[plain], [{"losses": [1.01], "norms": [1.0], "skipped": [False]}]])
    monkeypatch.setattr(numerics, "run_ranks", lambda *_: next(answers))
    with pytest.raises(RefutedError, match="loss off by 1"):
        numerics.half(Place("cpu", 1, tmp_path))


def test_a_wait_in_each_micro_batch_is_refuted(monkeypatch, tmp_path):
    """By the counter on any device; on a GPU torch itself raises where it happens, between the two changes of its mode."""
    quiet, loud = {"step": {"a.py:1": 2}, "evaluation": {}}, {"step": {"a.py:1": 2}, "evaluation": {"b.py:2": 6}}
    monkeypatch.setattr(speed, "run_ranks", lambda *_: [(quiet, loud)])
    with pytest.raises(RefutedError, match="8 micro batches wait oftener than 2"):
        speed.waits(Place("cpu", 1, tmp_path))
    many = {"step": {"a.py:1": 7}, "evaluation": {}}
    monkeypatch.setattr(speed, "run_ranks", lambda *_: [(many, many)])
    with pytest.raises(RefutedError, match="7 waits in a step, 6 are allowed"):
        speed.waits(Place("cpu", 1, tmp_path))


def _modes(trial):
    trainer = speed.build_trial_trainer(trial)
    seen, modes = [], []
    trainer.stage.register_forward_pre_hook(lambda *_: seen.append(("pass", modes[-1])))
    step = trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(("update", modes[-1])))
    with forbidden_in_micro_batches(trainer, modes.append):
        trainer.train_step(speed._set_micro_batches(trainer, trial, 2), 1e-3, 2 * trial.seq_len)
    step.remove()
    before = list(modes)
    trainer.train_step(speed._set_micro_batches(trainer, trial, 2), 1e-3, 2 * trial.seq_len)
    return {item for item in seen if item[1] is not None}, modes == before


@pytest.mark.parametrize("pipeline", [1, 2])
def test_waits_are_forbidden_in_the_passes_and_allowed_in_the_update(pipeline):
    trial = trial_of(tiny_config("llama"), pipeline, 1, 1)
    for seen, as_before in run_ranks(_modes, pipeline, trial):
        assert {("pass", "error"), ("update", "default")} <= seen
        assert ("update", "error") not in seen
        assert as_before
