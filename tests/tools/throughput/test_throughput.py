"""`run`, `report`, `diff`: numbers follow from the timing files, the bubble from its formula, the trace opens, the page shows."""

import json
from dataclasses import replace

import pytest

from recipes.common.config.placement import FOLDED, ONE_PASS, ZERO_BUBBLE, Placement
from recipes.common.run_dir.timing_files import TimingWriter
from recipes.common.runtime.step_clock import BACKWARD, FORWARD, OPTIMIZER, PARTS, CommKey, StepTimes
from tests.support.browser import CHROMIUM, browser
from tests.support.small_runs import call
from tests.support.tiny import ROOT
from tools.throughput.bubble import StageTimes, formula_share, simulate
from tools.throughput.page import page_text

RECIPE = """
from transformers import LlamaConfig
from recipes.common.recipe import AdamW, Batch, Constant, Layout, Recipe

recipe = Recipe(
    name="small",
    model=LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
                      vocab_size=131, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2),
    num_params=140_224,
    tokenizer="nowhere", data="nowhere",
    layouts={1: Layout()},
    batch=Batch(seq_len=16, micro_seqs=1, global_seqs=4),
    optimizer=AdamW(lr=1e-3), schedule=Constant(warmup_steps=1), steps=8, deepspeed="zero1_fp32.json",
)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A timed run of two stages, with what it said, its trace and its page."""
    folder = tmp_path_factory.mktemp("throughput")
    (folder / "small.py").write_text(RECIPE)
    files = ("--out", folder / "run", "--trace", folder / "trace.json", "--html", folder / "page.html")
    options = ("--layout", "pipeline=2,recompute=full", "--steps", 4, "--micro-batches", 5, "--random-tokens", "--json")
    called = call("throughput", "run", folder / "small.py", *options, *files)
    assert called.code == 0, called.err
    return folder, called.json


def test_the_parts_of_every_rank_add_up_to_the_step(ran):
    facts = ran[1]
    assert facts["steps"] == 4 and facts["last_step"] == 6 and facts["micro_batches"] == 5
    assert sum(facts["parts"].values()) == pytest.approx(facts["step_ms"])
    for rank in facts["ranks"]:
        assert rank["parts"]["forward"] > 0 and rank["parts"]["backward"] > 0 and rank["parts"]["optimizer"] > 0


def test_memory_is_that_of_the_tensors(ran):
    """Stage 0 of 2 has 2 micro batches in flight: of each the ids, in the storage of the 17 that were read, and the inputs of 2
    recomputed layers. Adam keeps 2 states."""
    first, last = (rank["memory"] for rank in ran[1]["ranks"])
    assert first["activations"] == 2 * (17 * 8 + 2 * 16 * 64 * 4)
    assert (first["logits"], last["logits"]) == (0, 16 * 131 * 4)
    for memory in (first, last):
        assert memory["master_weights"] == 0  # fp32 weights are their own
        assert memory["weights"] >= memory["gradients"]  # and buffers
        assert memory["optimizer"] == pytest.approx(2 * memory["gradients"], rel=0.01)
    assert first["gradients"] + last["gradients"] == 140_224 * 4


def test_communication_has_its_group_in_the_bandwidth(ran):
    rows = {(row["op"], row["bytes"]): row for row in ran[1]["communication"]}
    sent, received = (rows[op, 16 * 64 * 4] for op in ("isend", "irecv"))
    assert sent["calls_per_step"] == received["calls_per_step"] == 5  # stage 0 sends activations, stage 1 gradients
    assert sent["bus_gb_s"] is received["bus_gb_s"] is None  # the clock sees the wait for a message, not the message


def test_the_difference_to_the_formula_is_told_apart(ran):
    bubble = ran[1]["bubble"]
    assert bubble["formula"] == pytest.approx(1 / 6)
    assert sum(bubble[name] for name in ("formula", "imbalance", "exposed_p2p", "warm_up")) == pytest.approx(bubble["measured"])
    balance = ran[1]["balance"]
    assert balance["partition"] == [[[0, 2]], [[2, 4]]]
    assert max(balance["stage_ms"]) == pytest.approx((1 + balance["imbalance"]) * sum(balance["stage_ms"]) / 2)


def test_the_trace_has_a_track_a_rank_and_an_arrow_for_every_message(ran):
    events = json.loads((ran[0] / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "rank 0: stage 0, data 0, tensor 0", 1: "rank 1: stage 1, data 0, tensor 0"}
    begins = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert begins.keys() == ends.keys()
    assert len(begins) == 2 * 2 * 5  # two traced steps, both ways
    assert all(begins[id]["tid"] != ends[id]["tid"] and begins[id]["ts"] < ends[id]["ts"] for id in begins)
    spans = [event for event in events if event["ph"] == "X"]
    for end in (*begins.values(), *ends.values()):  # an arrow begins and ends in a span of its track
        assert any(s["tid"] == end["tid"] and s["ts"] <= end["ts"] <= s["ts"] + s["dur"] + 1e-3 for s in spans)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")
def test_the_page_shows_a_bar_for_every_rank(ran):
    with browser() as page:
        page.open(
            (ran[0] / "page.html").as_uri(), "document.readyState == 'complete' && document.querySelector('.stack') != null"
        )
        assert page.value("document.querySelectorAll('.stack').length") == 2
        widths = page.value(
            "[...document.querySelectorAll('.stack')].map(s => [...s.children].at(-1).getBoundingClientRect().right)"
        )
        assert widths[0] == pytest.approx(widths[1], rel=0.05)
        text = page.value("document.body.innerText")
        assert f"{ran[1]['step_ms']:,.1f} ms" in text and "all_reduce" in text
        assert page.errors == []
    assert "http" not in (ran[0] / "page.html").read_text()


def test_names_in_the_page_are_text(ran):
    page = page_text({**ran[1], "name": "</title><!--<script>__BODY__"})
    assert "&lt;/title&gt;&lt;!--&lt;script&gt;__BODY__" in page and "<script" not in page and "<!--" not in page


def test_report_and_diff_read_the_run_again(ran):
    report = call("throughput", "report", ran[0] / "run")
    assert report.code == 0, report.err
    assert "by formula 16.7 %" in report.out and "rank 1" in report.out
    same = call("throughput", "diff", ran[0] / "run", ran[0] / "run", "--json").json
    assert all(row["change_ms"] == 0 for row in same["parts"] + same["communication"])


def write_run(folder, parts_by_rank, *, pipeline=1, steps=20):
    """Timing files of a made-up run: ms by part and rank."""
    folder.mkdir()
    comms = {CommKey("data", "all_reduce", 6_000_000, 4, -1): [2, 8_000_000, 3_000_000]}
    for rank, parts in enumerate(parts_by_rank):
        start = {"world": len(parts_by_rank), "pipeline": pipeline, "data": len(parts_by_rank) // pipeline, "tensor": 1}
        writer = TimingWriter(folder, rank, start | {"schedule": "1f1b", "layers": [0, 4], "host": "made_up", "device": "cpu"})
        for step in range(1, steps + 1):
            full = dict.fromkeys(PARTS, 0) | {part: round(ms * 1e6) for part, ms in parts.items()}
            writer.step(StepTimes(step, 0, 4, full, comms, []))
        writer.close()
    return folder


def test_diff_names_the_part_that_changed(tmp_path):
    first = write_run(tmp_path / "a", [{FORWARD: 10, BACKWARD: 20}, {FORWARD: 10, BACKWARD: 20}])
    second = write_run(tmp_path / "b", [{FORWARD: 10, BACKWARD: 26}, {FORWARD: 9, BACKWARD: 26}])
    found = call("throughput", "diff", first, second, "--json").json
    assert [(row["part"], row["change_ms"]) for row in found["parts"][:2]] == [("backward", 6.0), ("forward", -0.5)]
    assert found["b"]["step_ms"] - found["a"]["step_ms"] == pytest.approx(sum(row["change_ms"] for row in found["parts"]))


def test_bus_bandwidth_is_by_the_groups_size(tmp_path):
    run = write_run(tmp_path / "a", [{FORWARD: 10}] * 4)
    (row,) = call("throughput", "report", run, "--json").json["communication"]
    # 6 MB in 4 ms: 1.5 GB/s; a ring of 4 passes 2 x 3/4 of it over each link
    assert row["algorithm_gb_s"] == pytest.approx(1.5) and row["bus_gb_s"] == pytest.approx(2.25)
    assert row["best_bus_gb_s"] == pytest.approx(3.0) and row["calls_per_step"] == 2


def test_a_slow_rank_is_named_with_what_it_costs(tmp_path):
    usual = {FORWARD: 30, BACKWARD: 60, OPTIMIZER: 10}
    run = write_run(tmp_path / "a", [usual, usual, usual | {BACKWARD: 63}, usual])
    slowest = call("throughput", "report", run, "--json").json["stragglers"][0]
    assert (slowest["rank"], slowest["called"]) == (2, True)
    assert slowest["slower"] == pytest.approx(0.03) and slowest["gain_ms"] == pytest.approx(3.0)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 4), (4, 8), (4, 4), (3, 7)])
def test_equal_stages_wait_as_the_formulas_say(pipeline, micro_batches):
    """(p - 1) / (m + p - 1) of 1F1B; a zero bubble with F = B = W leaves a third of it, a folded one a sixth. Interleaved with
    v chunks, each loses a v-th."""
    once, filled, folded = (Placement(name, pipeline) for name in (ONE_PASS, ZERO_BUBBLE, FOLDED))
    folded = replace(folded, per_rank=2)
    plain = StageTimes(1.0, 2.0, 0.0)
    share = (pipeline - 1) / (micro_batches + pipeline - 1)
    assert formula_share(once, micro_batches, plain) == pytest.approx(share)
    assert simulate([plain] * pipeline, micro_batches, once) == pytest.approx(share)
    split = StageTimes(1.0, 1.0, 1.0)
    third = (pipeline - 1) / (3 * micro_batches + pipeline - 1)
    assert formula_share(filled, micro_batches, split) == pytest.approx(third)
    assert simulate([split] * pipeline, micro_batches, filled) == pytest.approx(third, abs=0.02)
    sixth = (pipeline - 1) / (6 * micro_batches + pipeline - 1)
    assert formula_share(folded, micro_batches, split) == pytest.approx(sixth)
    if micro_batches % pipeline == 0:
        for kind, times, of_work in ((once, plain, 1), (filled, split, 3)):
            thrice = replace(kind, per_rank=3)
            share = (pipeline - 1) / (3 * of_work * micro_batches + pipeline - 1)
            assert formula_share(thrice, micro_batches, times) == pytest.approx(share)
            assert simulate([times] * pipeline, micro_batches, thrice) == pytest.approx(share, abs=0.02)


def test_a_dearer_stage_shows_as_imbalance():
    stages = [StageTimes(1.0, 2.0, 0.0), StageTimes(1.2, 2.4, 0.0)]
    # the dearer stage never waits but to fill: 1 + 8 x 3.6 + 2 in all, of which the other works 8 x 3
    assert simulate(stages, 8, Placement(ONE_PASS, 2)) == pytest.approx(1 - 8 * (3.0 + 3.6) / 2 / (1.0 + 8 * 3.6 + 2.0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("report", "{0}/nowhere"), "nowhere: no such run directory"),
        (("report", "{0}"), "holds no rank_*.jsonl"),
        (("diff", "{0}/a", "{0}/nowhere"), "nowhere: no such run directory"),
        (("report", "{0}/a", "--trace", "{0}/t.json"), "--trace-steps FIRST:STOP"),
        (("report", "{0}/a", "--html", "{0}/no/page.html"), "page.html"),
        (("report", "{0}/lost"), "of 2 ranks, [1] have no file"),
        (("run", "{0}/none.py"), "there is no such file"),
        (("run", "{1}", "--steps", "0"), "--steps=0: must be 1 or more"),
        (("run", "{1}", "--micro-batches", "0"), "--micro-batches=0"),
        (("run", "{1}", "--layout", "depth=2"), "'depth=2' is not tensor=N"),
        (("run", "{1}", "--layout", "tensor=5", "--random-tokens"), "tensor=5"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(tmp_path, words, told):
    write_run(tmp_path / "a", [{FORWARD: 1}])
    lost = write_run(tmp_path / "lost", [{FORWARD: 1}] * 2)
    (lost / "timing/rank_00001.jsonl").unlink()
    recipe = ROOT / "recipes/quickstart.py"
    called = call("throughput", *(word.format(tmp_path, recipe) for word in words))
    assert called.code == 2
    assert told in called.err and "Traceback" not in called.err
