"""The bench of the step runs every side on the same work, and their losses prove it."""

import pytest

from recipes.common.recipe import PIPELINE_SCHEDULES
from tests.bench.step import __main__ as step
from tests.bench.step.__main__ import HUGGING_FACE, PLAIN, TORCH, SideTimes, disagreement
from tests.support.small_runs import call_bench

RECIPE = """
from transformers import LlamaConfig
from recipes.common.recipe import AdamW, Batch, Constant, Layout, Recipe

recipe = Recipe(
    name="bench",
    model=LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                      vocab_size=131, tie_word_embeddings={tied}),
    num_params=0, tokenizer="", data="", layouts={{1: Layout()}},
    batch=Batch(seq_len=16, micro_seqs=2, global_seqs=8),
    optimizer=AdamW(lr=1e-2, clip=0.5), schedule=Constant(warmup_steps=1), steps=1, deepspeed="zero1_fp32.json",
)
"""


def bench(tmp_path, *flags, tied=False):
    file = tmp_path / "bench_recipe.py"
    file.write_text(RECIPE.format(tied=tied))
    return call_bench("step", "--recipe", file, "--rounds", 1, *flags)


@pytest.mark.parametrize("layout", ["tensor=1", "tensor=2,pipeline=2", "pipeline=2,data=2"])
def test_all_sides_train_the_same(tmp_path, monkeypatch, layout):
    """In one schedule, the last where there are stages: that all train the same is shown in tests/common/pipeline."""
    schedules = PIPELINE_SCHEDULES[:1] if layout == "tensor=1" else PIPELINE_SCHEDULES[-1:]
    monkeypatch.setattr(step, "PIPELINE_SCHEDULES", schedules)
    called = bench(tmp_path, "--layout", layout, "--json")
    assert called.code == 0, called.err
    rows = {row["side"]: row for row in called.json["rows"]}
    alone = layout == "tensor=1"
    ours = {"Trifold"} if alone else {f"Trifold, {schedule}" for schedule in schedules}
    ours.add(f"Trifold{'' if alone else f', {schedules[-1]}'}, torch's linears")
    assert set(rows) == ours | ({PLAIN, HUGGING_FACE} if alone else {TORCH})
    assert called.json["loss_difference"] <= 1e-5
    for side, row in rows.items():
        assert len(row["losses"]) == 3
        assert row["losses"][-1] < row["losses"][0] - 0.05  # all learn, and clipping counts: a loss held still proves nothing
        assert row["step_seconds"] > 0
        assert (row["goal"] is not None) == (side in ours)
        assert (row["ratio"] is None) == (side in (PLAIN, TORCH))


def test_sides_that_do_not_agree_fail():
    assert disagreement_of([4.0, 3.0], [4.0, 3.0]) == 0.0
    assert disagreement_of([4.0, 3.0], [4.0, 3.3]) == pytest.approx(0.1)
    assert disagreement_of([4.0, 3.0], [4.0, float("nan")]) == float("inf")


def disagreement_of(*losses):
    side = {"layout": "a", "ranks": 1, "side": "", "tokens_per_second": 1.0, "step_seconds": 1.0}
    judged = {"ratio": None, "processor_ratio": None, "goal": None, "mfu": None}
    return disagreement([SideTimes(**side, **judged, losses=each) for each in losses])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layout", "tensor=2"), "pipeline=2 or more"),
        (("--layout", "pipeline=2", "--micro-batches", 1), "--micro-batches=2 or more"),
        (("--layout", "pipeline=2,pipeline_schedule=zero_bubble"), "it compares every schedule itself"),
        (("--layout", "pipeline=5", "--micro-batches", 5), "exceeds the model's 4 layers; use 4 stages at most"),
        (("--micro-seqs", 0), "--micro-seqs=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_rejected_before_anything_runs(tmp_path, flags, said):
    called = bench(tmp_path, *flags)
    assert called.code == 2
    assert said in called.err


def test_tied_embeddings_are_compared_on_one_rank_only(tmp_path):
    assert "tied embeddings" in bench(tmp_path, "--layout", "pipeline=2", tied=True).err
