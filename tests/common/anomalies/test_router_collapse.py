"""A run of steps in which few experts get most tokens is an event; an uneven start, or one step, is none."""

import numpy as np
import pytest

from recipes.common.anomalies.detector import AnomalyDetector, scan

STEPS = 300


def curve(*dips):
    """Return columns of a healthy run whose evenness is 0.9, but for (first step, last step, evenness)."""
    steps = np.arange(1, STEPS + 1)
    evenness = 0.9 + 0.02 * np.sin(steps)
    for first, last, low in dips:
        evenness[first - 1 : last] = low
    return steps, {"loss": 3.0 - 0.001 * steps, "load_evenness": evenness}


def collapses(steps, columns):
    return [event for event in scan(steps, columns) if event.kind == "router_collapse"]


@pytest.mark.parametrize("dips", [(), [(1, 15, 0.1)], [(100, 118, 0.0)], [(50, 50, 0.0), (60, 78, 0.3)], [(100, 200, 0.51)]])
def test_what_is_no_event(dips):
    assert collapses(*curve(*dips)) == []


def test_a_collapse_that_ends():
    (event,) = collapses(*curve((100, 160, 0.4), (130, 130, 0.2)))
    assert (event.onset_step, event.peak_step, event.end_step) == (100, 130, 160)
    assert event.actionable and event.first_signal == "load_evenness" and event.evidence == {"load_evenness": 0.2}


def test_a_collapse_for_good_and_one_that_wavers():
    (event,) = collapses(*curve((100, STEPS, 0.3)))
    assert (event.onset_step, event.end_step) == (100, None)
    (event,) = collapses(*curve((100, 150, 0.3), (120, 125, 0.55), (151, 165, 0.7), (166, 200, 0.3)))
    assert (event.onset_step, event.end_step) == (100, 200)


def test_it_is_told_when_it_opens_and_when_it_ends_and_a_resume_starts_anew():
    steps, columns = curve((100, 160, 0.4))
    detector, told = AnomalyDetector(), []
    for index, step in enumerate(steps.tolist()):
        found = detector.push(step, {name: float(values[index]) for name, values in columns.items()})
        told += [(step, event.end_step) for event in found if event.kind == "router_collapse"]
    assert told == [(119, None), (180, 160)]
    detector = AnomalyDetector()
    detector.feed(steps[:130], {name: values[:130] for name, values in columns.items()})
    detector.resumed(90)
    assert [event.end_step for event in detector.finish() if event.kind == "router_collapse"] == [130]


def test_runs_without_routers_have_no_such_number():
    steps, columns = curve((100, STEPS, 0.0))
    assert collapses(steps, {"loss": columns["loss"]}) == []
