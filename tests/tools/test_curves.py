"""Curves of several runs: what is drawn is what the runs wrote."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests.support.small_runs import call
from tools.common.svg_chart import Axis, Line, chart

STEPS = 120
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("one", "two & <b>")):
        (folder / name).mkdir()
        lines = [{"step": 0, "val_loss": 8.0}]
        for step in range(1, STEPS + 1):
            lines.append({"step": step, "loss": 8 / step**0.2 + rng.normal(0, 0.01), "tokens": 64, "consumed_tokens": 64 * step})
            if step % 40 == 0:
                lines[-1]["val_loss"] = 5.0 + number - step / 100
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def paths(file):
    """The drawn curves: [points, 2] of each, in pixels."""
    tree = ElementTree.parse(file)
    (group,) = [g for g in tree.iter(f"{SVG}g") if g.get("clip-path")]
    return [np.array(re.findall(r"[-\d.]+", path.get("d")), float).reshape(-1, 2) for path in group.iter(f"{SVG}path")]


def test_the_picture_holds_the_means_of_the_runs(runs, tmp_path):
    out = tmp_path / "loss.svg"
    flags = ("--x", "tokens", "--mean-of", 5, "--limits", "3:7", "--out", out)
    called = call("curves", runs / "one", runs / "two & <b>", *flags, "--json")
    assert called.code == 0, called.err
    assert [run["run"] for run in called.json["runs"]] == ["one", "two & <b>"]
    for run, drawn in zip(called.json["runs"], paths(out), strict=True):
        losses = [json.loads(line).get("loss") for line in (runs / run["run"] / "metrics.jsonl").read_text().splitlines()][1:]
        wanted = [sum(losses[i - 5 : i]) / 5 for i in range(5, STEPS + 1)]
        np.testing.assert_allclose(run["y"], wanted)
        assert run["x"] == [64.0 * step for step in range(5, STEPS + 1)]
        x, y = (Axis(run["x"][0], run["x"][-1], 64, 744), Axis(3, 7, 316, 34))
        np.testing.assert_allclose(drawn, np.stack([x.pixels(np.array(run["x"])), y.pixels(np.array(wanted))], 1), atol=0.06)
    assert out.stat().st_size < 20_000 and "http" not in out.read_text().replace("http://www.w3.org/2000/svg", "")


def test_few_points_are_dots_and_the_table_says_where_the_lowest_is(runs, tmp_path):
    out = tmp_path / "val.svg"
    called = call("curves", runs / "one", runs / "two & <b>", "--y", "val_loss", "--out", out)
    rows = [line.split() for line in called.out.splitlines()]
    assert rows[1] == ["one", "4", "3.8", "3.8", "120"]
    assert called.out.splitlines()[-1] == str(out)
    assert len(list(ElementTree.parse(out).iter(f"{SVG}circle"))) == 8
    assert "two &amp; &lt;b&gt;" in out.read_text()


def test_another_programs_log_is_drawn(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{step},{5 - step / 100}\n" for step in range(1, 50)))
    called = call("curves", tmp_path / "log.csv", "--log", "--out", tmp_path / "x.svg", "--json")
    assert called.code == 0, called.err
    assert called.json["runs"][0]["y"][-1] == pytest.approx(4.51)
    drawn = paths(tmp_path / "x.svg")[0][:, 1]
    assert drawn[0] == pytest.approx(34, abs=0.1) and drawn[-1] == pytest.approx(316, abs=0.1)


def test_a_logarithmic_scale_leaves_out_what_it_cannot_show(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,lr\n" + "".join(f"{step},1,{max(9 - step, 0)}\n" for step in range(1, 11)))
    called = call("curves", tmp_path / "log.csv", "--y", "lr", "--log", "--out", tmp_path / "x.svg", "--json")
    assert called.code == 0 and "log.csv: 2 of 10 values are 0 or less" in called.err
    assert called.json["runs"][0]["y"] == [8, 7, 6, 5, 4, 3, 2, 1]
    (tmp_path / "flat.csv").write_text("step,loss,lr\n1,1,0\n2,1,0\n")
    called = call("curves", tmp_path / "flat.csv", "--y", "lr", "--log", "--out", tmp_path / "y.svg")
    assert called.code == 2 and "no lr of flat.csv is over 0" in called.err


def test_ticks_are_round_and_inside():
    assert Axis(4.13, 7.9, 0, 100).ticks() == [5, 6, 7]
    assert Axis(0.0012, 0.3, 0, 100, log=True).ticks() == pytest.approx([0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2])


def test_a_long_key_stays_in_the_picture():
    lines = [Line(f"a_run_with_a_long_name_{i}", np.arange(3.0), np.arange(3.0) * i) for i in range(1, 10)]
    tree = ElementTree.fromstring(chart(lines, x_name="step", y_name="y", limits=None, log=False))
    _, top, width, _ = map(float, tree.get("viewBox").split())
    names = [text for text in tree.iter(f"{SVG}text") if text.text.startswith("a_run")]
    assert len(names) == 9
    for text in names:
        assert float(text.get("y")) > top + 10 and float(text.get("x")) + 6.6 * len(text.text) <= width


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["none"], "none: no such run directory or log"),
        (["one", "--y", "vall_loss"], "--y=vall_loss"),
        (["one", "--mean-of", "0"], "--mean-of=0 must be at least 1"),
        (["one", "--mean-of", "500"], "--mean-of=500"),
        (["one", "--limits", "7:4"], "--limits=7:4: write LOW:HIGH with LOW < HIGH"),
        (["one", "--limits", "0:4", "--log"], "over 0 with --log"),
        (["one", "--out", "/none/x.svg"], "--out=/none/x.svg"),
    ],
)
def test_a_mistake_is_exit_2(runs, tmp_path, flags, told):
    called = call("curves", runs / flags[0], "--out", tmp_path / "x.svg", *flags[1:])
    assert called.code == 2 and told in called.err and "Traceback" not in called.err
    assert not (tmp_path / "x.svg").exists()
