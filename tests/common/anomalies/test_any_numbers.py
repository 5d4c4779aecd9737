"""The detectors take any numbers: zero, negative, huge, not finite, in any order and length; one that fails is off, and said."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from recipes.common.anomalies import detector as detector_module
from recipes.common.anomalies.detector import AnomalyDetector, judge_log, scan
from recipes.common.anomalies.recovery import Recovery
from recipes.common.anomalies.step_time import StepTime
from tests.support.synthetic_logs import bump, healthy_loss

ODD = (0.0, -1.0, 1e300, np.nan, np.inf, 2.5)
NAMES = ("loss", "grad_norm", "loss_scale", "seconds")
pytestmark = pytest.mark.filterwarnings("error")  # numpy's, of what is not defined


def judged(columns):
    findings = judge_log(np.arange(1, len(columns["loss"]) + 1), columns)
    assert findings.failures == ()
    return findings.events


def test_every_short_series_is_judged():
    for length in range(6):
        for series in product(ODD, repeat=length):
            values = np.array(series)
            judged({"loss": values} | {name: np.roll(values, shift) for shift, name in enumerate(NAMES[1:], start=1)})


@pytest.mark.parametrize("seed", range(12))
def test_long_series_are_judged(seed):
    """Some odd numbers among ordinary ones, or stretches of one odd number, in every column."""
    rng = np.random.default_rng(seed)
    points = int(rng.integers(100, 6000))
    columns = {}
    for name in NAMES:
        values = rng.choice([2.5, 0.0, -3.0, 1e-300, 1e37]) + rng.choice([0.0, 0.1]) * rng.standard_normal(points)
        odd = rng.random(points) < rng.choice([0.001, 0.1, 0.9])
        if seed % 2:
            odd = np.repeat(rng.random(points // 50 + 1) < 0.3, 50)[:points]
        values[odd] = np.repeat(rng.choice([*ODD, -np.inf, -1e300], points // 70 + 1), 70)[:points][odd]
        columns[name] = values
    judged(columns)


@pytest.mark.parametrize("level", [0.0, -1.0, 1e-9])
def test_a_loss_that_stays_at_or_below_zero_is_no_event(level):
    assert judged({"loss": np.full(5000, level), "grad_norm": np.zeros(5000)}) == ()


def test_a_run_that_learns_its_one_token_by_heart_is_healthy():
    loss = 10 * np.exp(-np.arange(3000) / 40)
    loss[1200:] = 0.0
    assert [event.kind for event in judged({"loss": loss}) if event.actionable] == []


def test_a_spike_from_a_loss_of_zero_is_seen():
    loss = np.zeros(3000)
    loss[1999:2019] = 1.5
    (event,) = judged({"loss": loss})
    seen = event.onset_step, event.end_step, event.kind, event.actionable, event.delta
    assert seen == (2000, 2019, "fast_recovery", True, 1.5)


@pytest.mark.parametrize("value", [1e300, -np.inf, np.inf, np.nan])
def test_a_huge_loss_is_one_that_is_not_finite(value):
    loss = healthy_loss(points=3000)
    loss[1999] = value
    (event,) = judged({"loss": loss})
    assert (event.onset_step, event.kind, event.actionable) == (2000, "precision", True)


class Broken(StepTime):
    """Raises at its first point, as a bug would."""

    def add(self, points):
        raise KeyError("usual")


def test_a_detector_that_raises_is_off_and_said_and_the_others_go_on(monkeypatch):
    loss = healthy_loss(points=3000) + bump(2000, 2.0, 10, 3000)
    columns = {"loss": loss, "seconds": np.ones(3000)}
    before = scan(np.arange(1, 3001), columns)
    monkeypatch.setattr(detector_module.AnomalyDetector.__init__, "__defaults__", ((*detector_module.DETECTORS, Broken),))
    findings = judge_log(np.arange(1, 3001), columns)
    assert list(findings.events) == before and len(before) == 1
    assert findings.failures == ("Broken failed and is off: KeyError: 'usual'",)


def test_a_live_run_is_told_once_and_goes_on():
    """A bare Recovery of one rank: observe() is all that a step's numbers go through."""
    notes = []
    recovery = object.__new__(Recovery)
    fields = {"history": (), "_new": [], "_open": {}, "_recent": [], "_told": set(), "_box": None}
    vars(recovery).update(fields, _log=SimpleNamespace(note=notes.append), _detector=AnomalyDetector((Broken,)))
    recovery._step_time = AnomalyDetector((StepTime,))
    for step in range(1, 200):
        recovery.observe({"step": step, "loss": 0.0, "grad_norm": 0.0, "seconds": 0.0})
    assert notes == ["monitor: Broken failed and is off: KeyError: 'usual'"]


def test_the_norm_limit_is_a_number_whatever_the_norms_were():
    watch = AnomalyDetector()
    for step, norm in enumerate(np.geomspace(1e-30, 1e38, 200), start=1):
        watch.push(step, {"loss": 2.0, "grad_norm": norm})
        assert watch.norm_limit() > 0
