"""The incidents of large runs that a record must have caught, each in miniature: the tool names them, in words."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recipes.common.monitor.replica_drift import Drift
from tests.support.recorded_runs import WARMUP, Faults, example_facts, train_miniature, write_miniature
from tools.changed import show
from tools.changed.__main__ import main
from tools.common.forked_ranks import run_ranks

STEPS, RESUMED = 48, 24
FACTS = example_facts()
OTHER = "sha256:" + 64 * "e"


def facts(**other: Any) -> dict[str, Any]:
    return FACTS | {name.replace("__", "."): value for name, value in other.items()}


def resumed(folder: Path, faults: Faults, ease: float = 0.05, **other: Any) -> Path:
    """A run that was resumed, in whose second segment some facts may be others."""
    records = train_miniature(STEPS, faults, ease=ease)
    return write_miniature(folder, records, ("start", 0, FACTS), ("resume", RESUMED, facts(**other)))


def whole(folder: Path, faults: Faults | None = None, **other: Any) -> Path:
    return write_miniature(folder, train_miniature(STEPS, faults), ("start", 0, facts(**other)))


def opt_accidental_upgrade(folder):
    """OPT: Megatron 2.4 became 2.6 in the container; one line changed the path of the activations, and the steps' time."""
    return whole(folder, Faults(reversed_sums=True), package__megatron_core__version="2.6.0")


def adam_counter_not_saved(folder):
    """BLOOM/104B: DeepSpeed did not save Adam's step counter: every resume corrects the bias from 1."""
    return resumed(folder, Faults(counter_reset_after=RESUMED))


def flag_silently_ignored(folder):
    """--no-load-optim was given, and DeepSpeed loaded the optimizer's states: the numbers are those without the flag."""
    return whole(folder, flags__load_optimizer_states=False)


def clipping_on_some_tensor_ranks(folder):
    """BLOOM: clipping left out the norms of tensor ranks over 0, which drifted apart for weeks."""
    records = train_miniature(STEPS, Faults(unclipped_copy=True))
    for record in records[7::8]:
        assert record["norm_copy_apart"] > 0
        kwargs = {"across": "tensor", "ranks": (0, 1), "group": (0, 1), "largest": record["norm_copy_apart"]}
        record["drift"] = str(Drift(name="model.norm.weight", **kwargs))
    return write_miniature(folder, records, ("start", 0, FACTS))


def same_seed_on_another_device(folder):
    """The same seed on V100 and on A100: the losses part by rounding."""
    return whole(folder, Faults(reversed_sums=True), host__0__gpus=["NVIDIA A100-SXM4-40GB"])


def cached_tokens(folder):
    """Marin: the preprocessing was corrected, and the cached token files still held the test set."""
    return whole(folder, data__tokens__inputs=OTHER, data__tokens__hash="sha256:" + 64 * "d")


def affine_shuffle(folder):
    """Marin: an affine shuffle gave the loss phases; a Feistel network replaced it."""
    return write_miniature(folder, train_miniature(STEPS, seed=1), ("start", 0, facts(algorithm__order=2)))


def sampler_restarts(folder):
    """PTL and IDEFICS: the sampler starts over at a resume, its counters do not say so, and the loss is too low."""
    return resumed(folder, Faults(sampler_reset_after=RESUMED), ease=0.25)


def wrong_warmup_counter(folder):
    """GLM: a warm-up that counted something else: 26,850 steps instead of 6,000."""
    return whole(folder, Faults(warmup_counter=lambda step: step / 4.475))


def exchanged_data(folder):
    """GLM: a part of the data was exchanged, and the loss became NaN."""
    other = {"data__tokens__contents": OTHER, "data__tokens__train_00000": OTHER, "data__tokens__hash": OTHER}
    return resumed(folder, Faults(bad_data_after=RESUMED + 3), **other)


def tied_weights_not_reduced(folder):
    """BLOOM: the gradients of the tied embedding were not reduced, so its copies parted, and a restart made a spike."""
    records = train_miniature(STEPS, Faults(untied_after_step=4, reload_after=RESUMED), tied=True)
    for record in records[7::8]:
        assert record["tie_apart"] > 0
        kwargs = {"across": "pipeline", "ranks": (0, 3), "group": (0, 3), "largest": record["tie_apart"]}
        record["drift"] = str(Drift(name="model.embed_tokens.weight", **kwargs))
    return write_miniature(folder, records, ("start", 0, FACTS), ("resume", RESUMED, FACTS))


def fewer_nodes(folder):
    """BLOOM: from 48 nodes to 24, by a universal checkpoint."""
    half = {"sizes__world": 24, "sizes__data": 24, "sizes__accumulation": 8, "deepspeed__gradient_accumulation_steps": 8}
    full = {"sizes__world": 48, "sizes__data": 48}
    records = train_miniature(STEPS)
    return write_miniature(folder, records, ("start", 0, facts(**full)), ("layout change", RESUMED, facts(**half)))


@dataclass(frozen=True)
class Named:
    make: Any
    kind: str  # of the incident
    words: tuple[str, ...]  # in its text or its evidence


CASES = [
    Named(opt_accidental_upgrade, "code replaced", ("megatron_core", "2.6.0", "no field of the recipe")),
    Named(adam_counter_not_saved, "optimizer counter", ("Adam's step counter was not restored", f"after step {RESUMED}")),
    Named(flag_silently_ignored, "silently ignored", ("load_optimizer_states=False", "was not applied", "in one bit")),
    Named(clipping_on_some_tensor_ranks, "tensor ranks drift", ("model.norm.weight", "clipping is not applied on all", "grows")),
    Named(same_seed_on_another_device, "another kind of device", ("the same seed", "A100", "within the rounding")),
    Named(cached_tokens, "stale tokens", ("data.tokens", "those of before", "cached")),
    Named(affine_shuffle, "another shuffle", ("another algorithm: 1 -> 2",)),
    Named(sampler_restarts, "data read again", (f"after step {RESUMED}", "the sampler began anew", "correlation")),
    Named(wrong_warmup_counter, "schedule's counter", ("from step 1 on", f"{WARMUP * 4.475:.0f} steps for {WARMUP}")),
    Named(exchanged_data, "data exchanged", (f"exchanged after step {RESUMED}", f"from step {RESUMED + 4} on")),
    Named(tied_weights_not_reduced, "tied weights", ("model.embed_tokens.weight", "first and the last stage")),
    Named(fewer_nodes, "another layout", ("world 48 -> 24", "stays on its curve")),
]


def healthy_resume(folder):
    return resumed(folder, Faults())


def sampler_whose_counters_say_so(folder):
    records = train_miniature(STEPS, Faults(sampler_reset_after=RESUMED))
    for record in records[RESUMED:]:
        record["consumed_tokens"] -= RESUMED * record["tokens"]
    return write_miniature(folder, records, ("start", 0, FACTS), ("resume", RESUMED, FACTS))


def warmup_from_the_resume(folder):
    return resumed(folder, Faults(warmup_counter=lambda step: step if step <= RESUMED else step - RESUMED))


def wrong_release(version, **other):
    def release(folder):
        return write_miniature(folder, train_miniature(2), ("start", 0, facts(package__deepspeed__version=version, **other)))

    return release


RELEASES = {
    "lost and scaled": (wrong_release("0.18.9", layout__pipeline=2), ["issue 8152", "issue 7985"]),
    "neither": (wrong_release("0.18.9", deepspeed__gradient_accumulation_steps=1), []),
    "zero 2": (wrong_release("0.17.6", deepspeed__zero_optimization__stage=2), ["issue 7718"]),
    "right": (wrong_release("0.19.8", layout__pipeline=2), []),
}
MORE = (healthy_resume, sampler_whose_counters_say_so, warmup_from_the_resume)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name of a miniature -> what `changed` prints of it beside a healthy run, as JSON."""
    return run_ranks(_compare_all, 1, str(tmp_path_factory.mktemp("incidents")))[0]


def _compare_all(folder):
    healthy = whole(Path(folder) / "healthy")
    makers = {make.__name__: make for make in (*(case.make for case in CASES), *MORE)}
    makers |= {name: make for name, (make, _) in RELEASES.items()}
    told, draw = {}, show.draw_parting
    for name, make in makers.items():
        # what is in pictures: test_changed.py; drawing one takes longer than all else, so here only the one with NaNs is
        show.draw_parting = draw if make is exchanged_data else lambda *_: None
        run = make(Path(folder) / name)
        words = [f"{run}:1", f"{run}:2"] if make is fewer_nodes else [str(healthy), str(run)]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main([*words, "--json", *([] if make is fewer_nodes else ["--out", f"{run}.svg"])])
        told[name] = json.loads(out.getvalue()) if code == 0 else code
    return told


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)
def test_an_incident_is_named(case, found):
    incidents = found[case.make.__name__]["incidents"]
    named = [incident for incident in incidents if incident["kind"] == case.kind]
    assert named, incidents
    text = " ".join([named[0]["text"], *named[0]["evidence"]])
    assert [words for words in case.words if words not in text] == [], text
    assert [incident["kind"] for incident in incidents if incident["kind"] != case.kind] == [], incidents


def test_a_healthy_resume_is_none_of_them(found):
    told = found["healthy_resume"]
    assert told["incidents"] == [] and told["partings"] == [] and told["verdict"] == "no differences"
    assert {"loss", "grad_norm", "lr", "consumed_tokens", "update_norm"} <= set(told["equal"])


def test_a_sampler_whose_counters_say_so_is_named_by_them(found):
    (incident,) = found["sampler_whose_counters_say_so"]["incidents"]
    assert incident["kind"] == "data read again"
    assert any("tokens are consumed after step 25" in line for line in incident["evidence"])


def test_a_schedule_that_counts_from_the_resume_is_named(found):
    (incident,) = found["warmup_from_the_resume"]["incidents"]
    assert incident["kind"] == "schedule's counter"
    assert f"from 1 again after the resume at step {RESUMED}" in incident["text"]


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_that_trains_wrongly_is_named_where_it_does(name, found):
    texts = [incident["text"] for incident in found[name]["incidents"] if incident["kind"] == "wrong release"]
    wanted = RELEASES[name][1]
    assert len(texts) == len(wanted) and all(issue in text for issue, text in zip(wanted, texts, strict=True)), texts
