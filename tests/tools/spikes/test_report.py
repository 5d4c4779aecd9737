"""The report of a run shows what the run wrote, offline, in a real browser."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pytest

from recipes.common.anomalies.rewinds import Rewind
from recipes.common.run_dir.segments import append_segment
from recipes.common.run_dir.tensor_stats import StatsWriter
from tests.support.browser import CHROMIUM, browser
from tests.support.small_runs import call
from tools.common.console import UsageError
from tools.spikes.report import report
from tools.spikes.report_page.columns import Columns, extremes
from tools.spikes.report_page.heat_map import read_slice

STEPS, ONSET, REWOUND = 600, 320, (450, 480)
NAME = "</script><!--<script>"  # ends an element, or keeps it from ending, where it is not escaped
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")
LAYERS, FIRST_LAYER = 6, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a spike that layer FIRST_LAYER began, a stretch that was undone, and names that are HTML."""
    folder = tmp_path_factory.mktemp("report") / "run <b>1"
    folder.mkdir()
    rng = np.random.default_rng(0)
    steps = np.arange(1, STEPS + 1)
    loss = 2 + 6 * np.exp(-steps / 20) + rng.normal(0, 0.01, STEPS)
    norm = np.exp(rng.normal(0, 0.05, STEPS))
    spike = np.arange(STEPS - ONSET + 1)
    loss[ONSET - 1 :] += np.minimum(spike + 1, 3) * 0.5 * np.exp(-spike / 12)
    norm[ONSET - 1 :] *= 1 + 9 * np.exp(-spike / 6)
    lines = [{"step": 0, "val_loss": 8.0}]
    for i, step in enumerate(steps.tolist()):
        lines.append({"step": step, "loss": loss[i], "grad_norm": norm[i], "lr": 1e-3, "tokens": 64, "seconds": 0.1})
        lines[-1] |= {"loss_max": loss[i] + 0.25, "loss_max_rank": step % 4, "update_ratio": 1e-3}
    write_lines(folder / "metrics.jsonl", lines)
    undone = [{"step": step, "loss": 5.0, "grad_norm": 3.0} for step in range(REWOUND[0] + 1, REWOUND[1] + 1)]
    write_lines(folder / f"metrics.after_step_{REWOUND[0]:08d}.jsonl", undone)
    batch = {"global_seqs": 4, "seq_len": 16}
    recipe = {"name": NAME, "model": {"class": "LlamaConfig"}, "num_params": 140_224, "batch": batch}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    start = {"time": "2026-11-23T10:00:00+00:00", "resumed_step": None, "sizes": {"tensor": 2, "pipeline": 2, "data": 2}}
    rewind = Rewind(
        kind="diverged",
        onset_step=470,
        from_step=REWOUND[1],
        to_step=REWOUND[0],
        skipped=(1876, 1900),
        lr_factor=1.0,
        lr_until_step=450,
    )
    (folder / "run.json").write_text(json.dumps({"starts": [start], "history": [vars(rewind)]}))
    write_stats(folder, rng)
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_stats(folder, rng):
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.down_proj")]
    writer = StatsWriter(folder, "parameters", tuple(names))
    for step in range(ONSET - 60, ONSET + 40):
        norms = np.exp(rng.normal(0, 0.02, len(names)))
        for i, name in enumerate(names):
            layer = int(name.split(".")[2]) if "layers" in name else LAYERS
            norms[i] *= 16.0 if step >= ONSET + 2 * abs(layer - FIRST_LAYER) else 1.0
        writer.append(step, {"grad_norm": norms, "weight_norm": np.ones(len(names)), "nonfinite": np.zeros(len(names))})
    writer.close()


@pytest.fixture(scope="module")
def page(run):
    made = call("spikes", "report", run, "--json")
    assert made.code == 0, made.err
    assert made.json["report"] == str(run / "spikes.html")
    return run / "spikes.html"


@needs_chromium
def test_the_page_shows_the_run_and_asks_nobody(run, page):
    records = {r["step"]: r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    with browser() as tab:
        tab.open(page.as_uri(), "document.body?.dataset.openedMs")
        assert tab.errors == []
        assert tab.value("performance.getEntriesByType('resource').length") == 0
        assert tab.value("document.getElementById('about').textContent").startswith(f"{NAME}: Llama, 140,224 parameters")
        rows = tab.value("[...document.querySelectorAll('#events tr')].map(row => row.innerText)")
        assert any(row.startswith("fast recovery") and f"{ONSET}" in row for row in rows), rows
        titles = ["Loss", "Gradient norm", "Learning rate", "Update / weight", "Worst data rank", "Which data rank is worst"]
        assert tab.value("[...document.querySelectorAll('.title b')].map(b => b.textContent)") == [*titles, "Step time"]
        # at the pointer: the numbers of that step, as the run wrote them
        box = tab.value("(r => [r.x, r.y])(document.querySelector('.panel canvas').getBoundingClientRect())")
        tab.move(box[0] + 400, box[1] + 50)
        tab.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        step = int(re.sub(r"\D", "", tab.value("document.getElementById('where').textContent")))
        shown = tab.value("[...document.querySelectorAll('.title output')].map(o => o.textContent)")
        assert float(shown[0]) == pytest.approx(records[step]["loss"], rel=1e-3)
        assert "0.25" in shown
        assert str(step % 4) in shown
        assert tab.value("[document.getElementById('pointer').hidden, document.getElementById('selection').hidden]") == [
            False,
            True,
        ]
        # a click on the event zooms in on it
        tab.value("[...document.querySelectorAll('#events tr')].find(row => row.innerText.startsWith('fast')).click()")
        first, last = tab.value("view")
        assert first < ONSET < last < STEPS


@needs_chromium
def test_wheel_and_drag_zoom_in_and_a_double_click_shows_the_whole_run(page):
    with browser() as tab:
        tab.open(page.as_uri(), "document.body?.dataset.openedMs")
        left, top, width = tab.value(
            "(r => [r.x, r.y, r.width])(document.querySelector('.panel canvas').getBoundingClientRect())"
        )
        step_at = f"toStep({left} + 300 - document.getElementById('charts').getBoundingClientRect().x, {width})"
        before = tab.value(step_at)
        tab.move(left + 300, top + 50, "mouseWheel", deltaX=0, deltaY=-100)
        first, last = tab.value("view")
        assert last - first == pytest.approx(STEPS / 1.2, rel=0.01)
        assert tab.value(step_at) == pytest.approx(before, abs=0.01)  # the step at the pointer stays there
        wanted = tab.value(f"[toStep(300, {width}), toStep(500, {width})]")
        tab.move(left + 300, top + 50, "mousePressed", button="left", clickCount=1)
        tab.move(left + 500, top + 50, button="left", buttons=1)
        assert tab.value(
            "(r => [r.left, r.right])(document.getElementById('selection').getBoundingClientRect())"
        ) == pytest.approx([left + 300, left + 500], abs=1)
        tab.move(left + 500, top + 50, "mouseReleased", button="left", clickCount=1)
        assert tab.value("view") == pytest.approx(wanted, abs=0.01)
        for count in (1, 2):
            tab.move(left + 500, top + 50, "mousePressed", button="left", clickCount=count)
            tab.move(left + 500, top + 50, "mouseReleased", button="left", clickCount=count)
        assert tab.value("view") == [0, STEPS]


@needs_chromium
def test_the_page_lists_the_segments_with_what_changed_at_each(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for cause, step, facts in (
        ("start", 0, {"recipe.seed": 1}),
        ("resume", 100, {"recipe.seed": 2, "environment.NCCL_ALGO": "Ring"}),
    ):
        append_segment(copy, cause=cause, step=step, attempt=1, run_id="x", facts=facts | {"library.nccl": "2.27"})
    with browser() as tab:
        tab.open(report(copy).as_uri(), "document.body?.dataset.openedMs")
        assert tab.errors == []
        first, second = tab.value("[...document.querySelectorAll('#segments tr')].map(row => row.innerText)")
        assert first.split("\t")[:3] == ["1", "start", "0"]
        assert "seed: 1 → 2" in second and "NCCL_ALGO" in second and "these 2 can change the loss; these 0 cannot" in second
        tab.value("document.querySelectorAll('#segments tr')[1].click()")
        assert tab.value("view") == [60, 140]


@needs_chromium
def test_a_stretch_that_was_undone_is_drawn(run, page):
    with browser() as tab:
        tab.open(f"{page.as_uri()}#{REWOUND[0] - 20}-{REWOUND[1] + 20}", "document.body?.dataset.openedMs")
        tab.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        pixels = (
            "(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])(document.querySelector('.panel canvas'))"
        )
        found = np.array(tab.value(pixels)).reshape(-1, 4)
        assert (np.abs(found[:, :3] - [0xD6, 0x33, 0x6C]).max(axis=1) < 12).sum() > 100  # the line of what was undone


def facts_of(page):
    return json.loads(re.search(r'id="facts">(.*?)</script>', page.read_text(), re.S).group(1))


def test_the_map_shows_which_layer_moved_first(page):
    (heat,) = facts_of(page)["heat"]
    assert heat["onset"] == ONSET
    assert heat["layers"] == ["embedding", *(f"layer {i}" for i in range(LAYERS)), "final norm"]
    values = np.array(heat["stats"][0]["layers"], dtype=float).reshape(len(heat["layers"]), -1)
    moved = {name: heat["steps"][int(np.argmax(row > 2))] for name, row in zip(heat["layers"], values, strict=True)}
    assert moved[f"layer {FIRST_LAYER}"] == ONSET
    assert moved["layer 0"] == moved["layer 4"] == ONSET + 4
    assert values[heat["layers"].index(f"layer {FIRST_LAYER}"), -1] == pytest.approx(4.0, abs=0.2)  # 16 times its median


def test_columns_read_back_equal():
    columns = Columns()
    steps, values = np.array([1, 2, 4, 9]), np.array([1.5, np.inf, -3.25, 1e-9])
    place = columns.series(steps, values)
    planes = np.frombuffer(zlib.decompress(base64.b64decode(columns.encoded())), np.uint8)
    words = np.ascontiguousarray(planes.reshape(4, -1).T).view("<u4").ravel()
    at, length = place["y"]["at"], place["y"]["length"]
    np.testing.assert_array_equal(words[at : at + length].view(np.float32), np.float32([1.5, np.nan, -3.25, 1e-9]))
    assert words[place["x"]["at"] :][:4].tolist() == steps.tolist()
    assert columns.series(np.arange(5, 50, 5), np.ones(9))["x"] == {"start": 5, "stride": 5, "length": 9}


def test_no_peak_is_lost_when_points_are_too_many():
    values = np.random.default_rng(0).normal(size=10_007)
    values[[17, 9_999]] = 50.0, -50.0
    steps, kept = extremes(np.arange(10_007), values, 1000)
    assert len(kept) <= 1100
    assert {17, 9_999} <= set(steps.tolist())
    assert (values[steps] == kept).all()


def test_another_programs_log_with_a_restart(tmp_path):
    rows = ["step,loss", *(f"{step},{3 + 0.001 * step}" for step in [*range(1, 60), *range(50, 80)])]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    assert call("spikes", "report", tmp_path / "log.csv", "--out", tmp_path / "page.html").code == 0
    loss, undone = facts_of(tmp_path / "page.html")["panels"][0]["series"]
    assert (loss["x"]["start"], loss["x"]["length"]) == (1, 79)
    assert (undone["x"]["start"], undone["x"]["length"]) == (50, 10)


def test_metrics_without_a_recipe_are_drawn(tmp_path):
    alone = {"loss": 3.0, "loss_max": 3.0, "loss_max_rank": 0}  # one data rank
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "tokens": 64, **alone} for step in range(1, 9)])
    assert call("spikes", "report", tmp_path).code == 0
    facts = facts_of(tmp_path / "spikes.html")
    assert facts["about"] == str(tmp_path)
    assert [panel["title"] for panel in facts["panels"]] == ["Loss"]


def test_mistakes_are_reported(tmp_path):
    for words, message in (([tmp_path / "none"], "no such"), ([tmp_path], "no run directory")):
        made = call("spikes", "report", *words)
        assert made.code == 2
        assert message in made.err


@pytest.mark.parametrize("reaction", [{}, {"kind": "spike", "skipped": 5}, [1]])
def test_a_black_box_whose_fields_are_damaged_is_named(run, tmp_path, reaction):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "events" / "step_00000470_diverged" / "event.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"onset_step": 470, "written_step": 480, "actionable": True, "reaction": reaction}))
    made = call("spikes", "report", copy)
    assert (made.code, made.out) == (2, "") and made.err.count("\n") == 1 and f"{path}: not laid out" in made.err
    path.write_text(json.dumps({"onset_step": ONSET, "written_step": 480, "actionable": True}))
    assert call("spikes", "report", copy).code == 0


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(60)])
def test_damaged_statistics_of_a_black_box_are_named(tmp_path, content):
    file = tmp_path / "events" / "step_00000005_spike" / "tensor_stats.npz"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"is damaged .*; delete it") as error:
        read_slice(tmp_path, file.parent.name, 5, 6)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
