"""The detectors against curves with known trouble, and against the lines of BLOOM's spike."""

import pickle

import numpy as np
import pytest

from recipes.common.anomalies.detector import AnomalyDetector, scan
from recipes.common.anomalies.events import KINDS
from tests.support.synthetic_logs import NOISE, POINTS, bump, curve, healthy_loss, healthy_norm, steps_of

STEPS = steps_of()
AT = 6000


def events_of(loss=None, *, steps=STEPS, resumes=(), **columns):
    return scan(steps, {"loss": healthy_loss() if loss is None else loss, **columns}, resumes)


def only(events, kind):
    assert [event.kind for event in events] == [kind], events
    return events[0]


# BLOOM-176B: iteration, lm loss, grad norm, as in bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles.md
BLOOM = np.array(
    [
        (31214, 2.198845, 0.242),
        (31215, 2.220424, 0.947),
        (31216, 2.595213, 2.390),
        (31217, 2.241558, 15.886),
        (31218, 2.345279, 145.119),
        (31219, 5.098124, 960.351),
        (31220, 3.492029, 353.201),
        (31221, 3.213059, 379.330),
        (31222, 2.804948, 650.246),
        (31250, 2.215699, 0.267),
        (31251, 2.235667, 0.205),
    ]
)


@pytest.mark.parametrize("history", [0, 200], ids=["the published lines alone", "after healthy steps"])
def test_blooms_spike_is_seen_at_its_gradient_norm_four_steps_before_the_peak(history):
    noise = np.random.default_rng(0).standard_normal((2, history))
    before = np.stack([31214 - history + np.arange(history), 2.2 + 0.01 * noise[0], 0.2 * np.exp(0.1 * noise[1])])
    steps, loss, norm = np.concatenate([before, BLOOM.T], axis=1)
    event = only(events_of(loss, steps=steps.astype(int), grad_norm=norm), "fast_recovery")
    assert (event.onset_step, event.peak_step, event.lead_steps, event.first_signal) == (31215, 31219, 4, "grad_norm")
    assert event.actionable and event.delta == pytest.approx(2.9, abs=0.05)


def test_live_it_is_worth_an_alarm_before_the_peak():
    watch, told = AnomalyDetector(), []
    for step in range(31014, 31214):
        watch.push(step, {"loss": 2.2 + 0.01 * np.sin(step), "grad_norm": 0.2 + 0.02 * np.cos(step)})
    for step, loss, norm in BLOOM:
        told += [(int(step), event) for event in watch.push(int(step), {"loss": loss, "grad_norm": norm, "lr": 5e-5})]
    assert told[0][0] == 31215 and not told[0][1].actionable and told[0][1].end_step is None
    assert min(step for step, event in told if event.actionable) < 31219


def eventful_log():
    """A bit of everything, for the one code path: spikes, NaN, a restart, a loss scale, slow steps, a slow rise, a long gap."""
    loss = healthy_loss() + bump(1500, 2.0, 8) + bump(2500, 1.0, 1e-9) + bump(5000, 0.2, 1e9)
    loss[3000:3004] = np.nan
    norm = healthy_norm() * (1 + bump(1499, 8.0, 6))
    scale = np.full(POINTS, 65536.0)
    for at in (3500, 3505, 3510, 3520):
        scale[at:] /= 2
    seconds = 1 + 0.01 * np.random.default_rng(3).standard_normal(POINTS)
    seconds[4000:4060] *= 1.2
    again = slice(5900, POINTS)
    steps = np.concatenate([STEPS[:6200], STEPS[again]])
    steps[-100:] += 5000
    columns = {"loss": loss, "grad_norm": norm, "loss_scale": scale, "seconds": seconds}
    return steps, {name: np.concatenate([values[:6200], values[again]]) for name, values in columns.items()}


@pytest.mark.parametrize("points", [1, 7, 1000])
def test_events_do_not_depend_on_how_the_log_is_cut(points):
    steps, columns = eventful_log()
    whole, cut = AnomalyDetector(), AnomalyDetector()
    expected = [*whole.feed(steps, columns), *whole.finish()]
    found = []
    for start in range(0, len(steps), points):
        if points == 1:
            found += cut.push(int(steps[start]), {name: float(values[start]) for name, values in columns.items()})
        else:
            found += cut.feed(steps[start : start + points], {n: v[start : start + points] for n, v in columns.items()})
    found += cut.finish()
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    assert {event.kind for event in found} >= {"fast_recovery", "outlier_batch", "precision", "hardware_suspect", "slow_rise"}
    assert {event.kind for event in found} <= set(KINDS)


def test_memory_is_bounded():
    sizes = []
    watch = AnomalyDetector()
    for part in range(3):
        steps = part * 150_000 + np.arange(150_000)
        watch.feed(steps, {"loss": curve(steps) + NOISE * np.random.default_rng(part).standard_normal(len(steps))})
        sizes.append(len(pickle.dumps(watch)))
    assert max(sizes) < 200_000 and sizes[2] < 1.1 * sizes[1]


NOISES = {
    "normal": lambda rng, n: rng.standard_normal(n) * NOISE,
    "large batches": lambda rng, n: rng.standard_normal(n) * 0.002,
    "small batches": lambda rng, n: rng.standard_normal(n) * 0.2,
    "heavy tails": lambda rng, n: rng.standard_t(3, n) * NOISE,
    "correlated": lambda rng, n: _filtered(rng.standard_normal(n), 0.9) * NOISE,
    "random walk": lambda rng, n: np.cumsum(rng.standard_normal(n)) * 0.0005 + rng.standard_normal(n) * NOISE,
    "a learning rate that drops": lambda rng, n: rng.standard_normal(n) * NOISE - 0.15 * (np.arange(n) > n // 2),
    "a batch ramp": lambda rng, n: rng.standard_normal(n) * 0.1 / np.sqrt(1 + np.arange(n) // 1000),
    "code in every seventh batch": lambda rng, n: rng.standard_normal(n) * NOISE - 0.5 * (rng.random(n) < 0.14),
    "two digits": lambda rng, n: rng.uniform(-0.006, 0.006, n),
}


def _filtered(noise, rho):
    out = np.zeros(len(noise))
    for i in range(1, len(noise)):
        out[i] = rho * out[i - 1] + np.sqrt(1 - rho * rho) * noise[i]
    return out


@pytest.mark.parametrize("with_norm", [True, False], ids=["grad norm", "loss only"])
@pytest.mark.parametrize("noise", NOISES)
def test_a_healthy_curve_wakes_nobody(noise, with_norm):
    for seed in range(3):
        loss = curve(STEPS) + NOISES[noise](np.random.default_rng(seed), POINTS)
        loss = loss.round(2) if noise == "two digits" else loss
        columns = {"grad_norm": healthy_norm(seed)} if with_norm else {}
        assert [event for event in events_of(loss, **columns) if event.actionable] == []


@pytest.mark.parametrize("every", [1, 5, 100])
@pytest.mark.parametrize("first_step", [0, 50_000], ids=["from the start", "from the middle"])
def test_sampled_logs_and_missing_lines_wake_nobody(every, first_step):
    loss = healthy_loss(1, every=every)
    kept = np.random.default_rng(2).random(POINTS) > 0.3
    events = events_of(loss[kept], steps=(first_step + steps_of(every=every))[kept])
    assert [event for event in events if event.actionable] == []


def test_a_hard_batch_is_classed_as_one_though_its_gradient_norm_jumps():
    norm = healthy_norm()
    norm[AT] *= 5
    event = only(events_of(healthy_loss() + bump(AT, 2.0, 1e-9), grad_norm=norm), "outlier_batch")
    assert (event.onset_step, event.end_step, event.actionable) == (AT, AT, False)
    assert event.delta == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("decay", "kind"), [(8, "fast_recovery"), (150, "slow_recovery")])
def test_a_spike_is_actionable_and_classed_by_its_recovery(decay, kind):
    event = only(events_of(healthy_loss() + bump(AT, 1.5, decay)), kind)
    assert (event.onset_step, event.actionable, event.first_signal) == (AT, True, "loss")
    assert event.evidence["actionable_step"] <= AT + 2


def test_the_signal_that_moves_first_is_named():
    norm = healthy_norm() * (1 + bump(AT - 2, 10.0, 10))
    event = only(events_of(healthy_loss() + bump(AT, 1.5, 8), grad_norm=norm), "fast_recovery")
    assert (event.onset_step, event.first_signal) == (AT - 2, "grad_norm")
    assert event.lead_steps == event.peak_step - event.onset_step >= 2


def test_a_spike_in_a_log_of_every_fifth_step_is_no_single_batch():
    loss = healthy_loss(points=3000, every=5)
    loss[2000] += 0.5
    event = only(events_of(loss, steps=steps_of(3000, 5)), "fast_recovery")
    assert (event.onset_step, event.actionable) == (10_000, True)


def test_one_spike_does_not_hide_the_next():
    events = events_of(healthy_loss() + bump(AT, 3.0, 5) + bump(AT + 60, 0.6, 5))
    assert [event.onset_step for event in events] == [AT, AT + 60]


def test_one_nan_is_one_event_and_blinds_nothing():
    loss = healthy_loss() + bump(AT + 10, 1.0, 5)
    loss[AT] = np.nan
    first, second = events_of(loss)
    assert (first.kind, first.onset_step, first.end_step, first.actionable) == ("precision", AT, AT, True)
    assert (second.kind, second.onset_step) == ("fast_recovery", AT + 10)


def test_nan_for_good_is_a_divergence():
    loss = healthy_loss()
    loss[AT:] = np.nan
    event = only(events_of(loss), "diverged")
    assert (event.onset_step, event.end_step) == (AT, POINTS - 1)


@pytest.mark.parametrize("nats_a_step", [0.01, 0.05, 0.5])
def test_a_divergence_is_told_within_200_steps_however_steep(nats_a_step):
    loss = healthy_loss() + np.minimum(np.maximum(STEPS - AT, 0) * nats_a_step, 5.0)
    event = next(event for event in events_of(loss) if event.actionable)
    assert event.kind == "diverged" and event.onset_step >= AT - 64  # a block of steps
    assert event.evidence["actionable_step"] <= AT + 200


def test_a_slow_rise_is_told_before_015_nat():
    rise = np.maximum(STEPS - 4000, 0) * 2e-4
    event = only(events_of(healthy_loss() + rise), "slow_rise")
    clean = (curve(STEPS) + rise)[: event.evidence["actionable_step"] + 1]
    assert event.actionable and clean[-1] - clean.min() < 0.15 and clean[-1] - clean[event.onset_step] < 0.15


def test_other_data_is_a_new_level_and_no_alarm():
    events = events_of(healthy_loss() + 0.3 * (STEPS >= AT), grad_norm=healthy_norm())
    event = only(events, "data_regime_shift")
    assert (event.onset_step, event.actionable) == (AT, False)
    assert only(events_of(healthy_loss() - 0.3 * (STEPS >= AT), grad_norm=healthy_norm()), "data_regime_shift").delta < 0


def test_a_gradient_norm_that_stays_higher_while_the_loss_does_not_move_hides_nothing():
    norm = healthy_norm() * np.where(STEPS >= AT, 4.0, 1.0)  # a batch ramp, another clipping
    shift, spike = events_of(healthy_loss() + bump(AT + 200, 1.0, 8), grad_norm=norm)
    assert (shift.kind, shift.actionable, shift.first_signal) == ("data_regime_shift", False, "grad_norm")
    assert (spike.onset_step, spike.kind, spike.actionable) == (AT + 200, "fast_recovery", True)


@pytest.mark.parametrize(("shift", "sign"), [(-0.12, -1), (0.12, 1)], ids=["data read before", "state lost"])
def test_the_level_after_a_resume_is_compared_with_before(shift, sign):
    loss = healthy_loss() + shift * (STEPS > AT)
    event = next(event for event in events_of(loss, grad_norm=healthy_norm(), resumes=[AT]) if event.kind == "resume_artefact")
    assert event.actionable and event.onset_step == AT + 1 and event.delta * sign > 0.05


def test_a_bump_after_a_resume_is_an_artefact_of_it():
    event = only(events_of(healthy_loss() + bump(AT + 3, 0.8, 20), resumes=[AT]), "resume_artefact")
    assert event.actionable


@pytest.mark.parametrize(("ran_to", "back_to"), [(300, 100), (6200, 5900), (7000, 2000)])
def test_a_restart_that_repeats_steps_is_no_event(ran_to, back_to):
    steps = np.concatenate([STEPS[:ran_to], STEPS[back_to:]])
    loss = np.concatenate([healthy_loss(1)[:ran_to], healthy_loss(2)[back_to:]])
    assert events_of(loss, steps=steps) == []


def test_a_spike_stays_an_event_though_the_run_went_back_before_it():
    spiky = healthy_loss(1) + bump(6100, 3.0, 2000)
    steps, loss = np.concatenate([STEPS[:6200], STEPS[5900:]]), np.concatenate([spiky[:6200], healthy_loss(2)[5900:]])
    event = events_of(loss, steps=steps)[0]
    assert (event.onset_step, event.end_step, event.actionable) == (6100, 6199, True)


def test_a_falling_loss_scale_is_the_first_signal_as_on_glm_130b():
    scale = np.full(POINTS, 65536.0)
    for at in (AT - 30, AT - 24, AT - 17, AT - 10, AT - 4):
        scale[at:] /= 2
    event = only(events_of(healthy_loss() + bump(AT, 3.0, 10), loss_scale=scale), "fast_recovery")
    assert (event.onset_step, event.first_signal, event.lead_steps) == (AT - 30, "loss_scale", 30)
    assert only(events_of(loss_scale=scale), "precision").actionable  # five halvings


def test_the_life_of_a_loss_scale_is_no_event():
    scale, norm = np.full(POINTS, 65536.0), healthy_norm()
    for at in range(16):  # the search from 2**32 down
        scale[:at] *= 2
    for at in range(500, POINTS, 1000):
        scale[at : at + 500] /= 2
        norm[at] = np.inf
    assert events_of(grad_norm=norm, loss_scale=scale) == []


def test_noise_that_grows_at_once_wakes_nobody_and_spikes_are_seen_in_it():
    loss = healthy_loss() + np.where(STEPS >= 4000, 5, 0) * (healthy_loss(11) - curve(STEPS)) + bump(7000, 3.0, 10)
    alarms = [event for event in events_of(loss) if event.actionable]
    assert [event.onset_step for event in alarms] == [7000]


def test_slow_steps_are_told_and_a_slow_save_is_not():
    seconds = 1 + 0.003 * np.random.default_rng(0).standard_normal(POINTS)
    seconds[::500] = 4.0
    assert events_of(seconds=seconds) == []
    seconds[AT + 100 : AT + 140] *= 1.05
    event = only(events_of(seconds=seconds), "hardware_suspect")
    assert (event.onset_step, event.end_step, event.first_signal, event.actionable) == (AT + 100, AT + 139, "step_time", False)


def test_a_run_that_does_not_learn_is_on_a_plateau():
    event = only(events_of(np.maximum(healthy_loss(), 6.9) + healthy_loss(2) - curve(STEPS)), "plateau")
    assert not event.actionable and event.onset_step < 2000


def test_a_step_without_a_loss_is_left_out():
    watch = AnomalyDetector()
    assert watch.push(1, {"val_loss": 3.0}) == []
    assert watch.push(2, {"loss": 3.0, "grad_norm": None}) == []
