"""`spikes explain` finds what was planted in real small runs, and says what it could not answer."""

import math
import shutil

import pytest

from tests.bench.spikes.planted import make_run
from tests.bench.spikes.planted_causes import ranked_causes, trimmed
from tests.support.small_runs import call
from tools.common.forked_ranks import run_ranks
from tools.spikes.evidence.causes import CAUSES, NOTHING, SLOW_RANK, STALE_MOMENT
from tools.spikes.evidence.findings import Finding, Unanswered
from tools.spikes.explain import explain, rank


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A planted run of `trimmed`, made once."""
    made = {}

    def make(planted):
        if planted.cause not in made:
            made[planted.cause] = make_run(planted, tmp_path_factory.mktemp("planted"))
        return made[planted.cause]

    return make


# the stale second moment is explained in tests/bench/test_benches.py
@pytest.mark.parametrize("planted", [p for p in trimmed() if p.cause != STALE_MOMENT], ids=lambda planted: planted.cause)
def test_a_planted_cause_is_found(planted, run_of):
    """First; but this machine's own load makes steps slow as well."""
    ranked = ranked_causes(planted, run_of(planted))
    assert next(cause for cause in ranked if cause != SLOW_RANK or planted.cause == SLOW_RANK) == planted.cause


def test_without_tensor_statistics_it_says_what_to_log(run_of, tmp_path):
    planted = next(p for p in trimmed() if p.fault == "schedule")
    run_dir = shutil.copytree(run_of(planted), tmp_path / "run", ignore=shutil.ignore_patterns("tensor_stats"))
    found = call("spikes", "explain", run_dir, planted.event_step, "--json").json
    assert found["causes"][0]["cause"] == planted.cause
    asked = {cause["cause"]: [u["cure"] for u in cause["cannot_be_answered"]] for cause in found["causes"]}
    assert any("Recipe.monitor" in cure for cure in asked["stale second moment"])
    text = call("spikes", "explain", run_dir, planted.event_step)
    assert text.code == 0 and f"1. {planted.cause}" in text.out and "cannot be answered" in text.out


def test_evidence_adds_up_and_belief_sums_to_one():
    first, second = CAUSES[0], CAUSES[1]
    evidence = [Finding(first.name, 2.0, "a"), Finding(first.name, -0.5, "b"), Unanswered(second.name, "c", "d")]
    ranked = {verdict.cause.name: verdict for verdict in rank(evidence)}
    assert ranked[first.name].score == pytest.approx(first.prior + 1.5)
    assert [f.text for f in ranked[first.name].findings] == ["a", "b"]
    assert ranked[second.name].unanswered[0].cure == "d"
    assert math.fsum(verdict.share for verdict in ranked.values()) == pytest.approx(1)
    assert [v.score for v in rank(evidence)] == sorted((v.score for v in rank(evidence)), reverse=True)


def test_a_healthy_run_is_called_so_at_any_step(run_of):
    planted = next(p for p in trimmed() if p.cause == NOTHING)
    tops = run_ranks(_tops, 1, run_of(planted), range(12, planted.steps - 3, 4))[0]
    assert set(tops) - {SLOW_RANK} == {NOTHING}  # a shared machine is slow now and then


def _tops(run_dir, steps):
    return [explain(run_dir, str(step))[1][0].cause.name for step in steps]
