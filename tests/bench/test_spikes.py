"""The bench of `tools.spikes`: how it scores labelled logs and planted causes, and which runs it plants."""

import dataclasses

import numpy as np
import pytest

from tests.bench.spikes.detection import score_detection
from tests.bench.spikes.planted_causes import HELD_OUT, TUNING, VALIDATION, scores
from tests.support.small_runs import call_bench
from tests.support.synthetic_logs import bump, healthy_loss, healthy_norm, steps_of, write_log
from tools.spikes.evidence.causes import NAMES


@pytest.fixture
def labelled(tmp_path):
    """A folder of logs laid out like the real one, each with what its name stands for."""
    sparse = healthy_loss(7, 2000, 5) + bump(1000, 1.0, 2, 2000)
    write_log(tmp_path / "megatron_golden_history" / "mixtral_a.csv", sparse, every=5)
    write_log(tmp_path / "megatron_golden_history" / "gpt.csv", healthy_loss(8, 2000, 5), every=5)
    hard = healthy_loss(9) + bump(5000, 1.5, 1e-9)
    write_log(tmp_path / "llmc" / "gpt2.csv", hard, grad_norm=healthy_norm())
    rise = np.maximum(steps_of() - 4000, 0) * 2e-4
    for name, loss in (("14m-1", healthy_loss(1) + rise), ("70m-1", healthy_loss(2) + rise), ("410m-1", healthy_loss(3))):
        write_log(tmp_path / "polypythias" / f"{name}.csv.gz", loss)
    for seed in (4, 5):
        bad = bump(918, 1.5, 1e-9, 1500) + bump(946, 1.5, 1e-9, 1500)
        write_log(tmp_path / "modded_nanogpt" / f"x__ValueEmbed__{seed}.csv", healthy_loss(seed, 1500) + bad)
    rows = [
        ("mixtral", "megatron_golden_history/mixtral_a.csv", 5000, 5000, 1.0, 10, 30),
        ("llmc", "llmc/gpt2.csv", 5000, 5000, 1.5, 0, 30),
    ]
    header = "set,file,onset_step,peak_step,delta_loss,duration_steps,robust_z_at_peak\n"
    (tmp_path / "labels.csv").write_text(header + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return tmp_path


def test_every_kind_of_log_is_scored(labelled):
    scores = score_detection(labelled)
    assert [score.name for score in scores if not score.good] == []
    assert len(scores) == 11  # all but BLOOM, which is not there


def test_a_spike_that_is_not_seen_is_a_goal_missed(labelled):
    labels = labelled / "labels.csv"
    labels.write_text(labels.read_text().replace("mixtral_a.csv,5000", "mixtral_a.csv,6000"))
    called = call_bench("spikes", labelled, "--only", "detection", "--json")
    assert (called.code, called.json["good"]) == (1, False)
    missed = [score for score in called.json["scores"]["detection"] if not score["good"]]
    assert [score["name"] for score in missed] == [
        f"Mixtral spikes of {nats} nat or more, at their sample" for nats in (0.5, 0.3)
    ]
    assert "not 6000" in missed[0]["value"]


def test_every_cause_is_planted_and_the_held_out_runs_are_others():
    known = (*TUNING, *VALIDATION)
    assert {planted.cause for planted in known} == {planted.cause for planted in HELD_OUT} == set(NAMES)
    assert not {planted.seed for planted in known} & {planted.seed for planted in HELD_OUT}
    assert not {planted.hidden for planted in TUNING} & {planted.hidden for planted in HELD_OUT}


def test_the_score_counts_first_and_second_places():
    planted = next(p for p in HELD_OUT)
    others = [dataclasses.replace(planted, seed=seed) for seed in range(10)]
    first, two, *_ = scores([(p, place) for p, place in zip(others, [0] * 8 + [1, 2], strict=True)])
    assert first.good and "8 of 10" in first.value
    assert not two.good and "9 of 10" in two.value
