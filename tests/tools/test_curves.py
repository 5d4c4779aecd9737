"""The picture of several runs shows what the runs wrote."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests.support.small_runs import call
from tools.curves import Line, draw, read_line

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


def svg(file):
    """The parts of a picture by their ids, for example "axes_1"."""
    return {part.get("id"): part for part in ElementTree.parse(file).iter(f"{SVG}g")}


def scale(axis):
    """A function from pixels to values of an axis, by its first and last tick."""
    along = "y" if axis.get("id").endswith("2") else "x"
    ticks = [group for group in axis.findall(f"{SVG}g") if "tick" in group.get("id")]
    at = [float(next(tick.iter(f"{SVG}use")).get(along)) for tick in ticks]
    values = [number("".join(tick.itertext())) for tick in ticks]
    return lambda pixels: values[0] + (pixels - at[0]) / (at[-1] - at[0]) * (values[-1] - values[0])


def number(text):
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    return float(text.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(text[-1], 1)


def curves(file):
    """The drawn curves: [points, 2] of each, in values."""
    parts = svg(file)
    x, y = scale(parts["matplotlib.axis_1"]), scale(parts["matplotlib.axis_2"])
    drawn = []
    for group in parts["axes_1"].findall(f"{SVG}g"):
        if group.get("id").startswith("line2d"):
            path = group.find(f"{SVG}path").get("d").replace("M", "").replace("L", "").split()
            pixels = np.array(path, float).reshape(-1, 2)
            drawn.append(np.stack([x(pixels[:, 0]), y(pixels[:, 1])], axis=1))
    return drawn


def test_the_picture_holds_the_means_of_the_runs(runs, tmp_path):
    out = tmp_path / "loss.svg"
    flags = ("--x", "tokens", "--mean-of", 5, "--limits", "3:7", "--out", out)
    called = call("curves", runs / "one", runs / "two & <b>", *flags, "--json")
    assert called.code == 0, called.err
    assert [run["run"] for run in called.json["runs"]] == ["one", "two & <b>"]
    for run, drawn in zip(called.json["runs"], curves(out), strict=True):
        losses = [json.loads(line).get("loss") for line in (runs / run["run"] / "metrics.jsonl").read_text().splitlines()][1:]
        wanted = [sum(losses[i - 5 : i]) / 5 for i in range(5, STEPS + 1)]
        np.testing.assert_allclose(run["y"], wanted)
        assert run["x"] == [64.0 * step for step in range(5, STEPS + 1)]
        assert drawn[[0, -1], 0] == pytest.approx([run["x"][0], run["x"][-1]], abs=1)
        np.testing.assert_allclose(drawn[:, 1], np.interp(drawn[:, 0], run["x"], wanted), atol=0.005)
    again = tmp_path / "again.svg"
    assert call("curves", runs / "one", runs / "two & <b>", *flags[:-1], again).code == 0
    assert again.read_bytes() == out.read_bytes()  # pictures under version control change only with their runs


def test_few_points_are_dots_and_the_table_says_where_the_lowest_is(runs, tmp_path):
    out = tmp_path / "val.svg"
    called = call("curves", runs / "one", runs / "two & <b>", "--y", "val_loss", "--out", out)
    rows = [line.split() for line in called.out.splitlines()]
    assert rows[1] == ["one", "4", "3.8", "3.8", "120"]
    assert called.out.splitlines()[-1] == str(out)
    dots = [g.findall(f".//{SVG}use") for g in svg(out)["axes_1"].findall(f"{SVG}g") if g.get("id").startswith("line2d")]
    assert [len(found) for found in dots] == [4, 4]
    assert "two &amp; &lt;b&gt;" in out.read_text()


def test_another_programs_log_is_drawn(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{step},{5 - step / 100}\n" for step in range(1, 50)))
    called = call("curves", tmp_path / "log.csv", "--out", tmp_path / "x.svg", "--json")
    assert called.code == 0, called.err
    assert called.json["runs"][0]["y"][-1] == pytest.approx(4.51)
    (drawn,) = curves(tmp_path / "x.svg")
    assert drawn[[0, -1], 0] == pytest.approx([1, 49], abs=0.01)


def test_a_logarithmic_axis_shows_powers_evenly_and_drops_what_is_not_positive(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,lr\n" + "".join(f"{step},1,{max(9 - step, 0)}\n" for step in range(1, 11)))
    called = call("curves", tmp_path / "log.csv", "--y", "lr", "--log", "--out", tmp_path / "x.svg", "--json")
    assert called.code == 0 and "log.csv: 2 of 10 values are 0 or less and not drawn" in called.err
    assert called.json["runs"][0]["y"] == [8, 7, 6, 5, 4, 3, 2, 1]
    (tmp_path / "powers.csv").write_text("step,loss\n1,1\n2,10\n3,1000\n")
    draw([read_line(tmp_path / "powers.csv", "step", "loss", 1)], tmp_path / "z.svg", x_name="step", y_name="loss", log=True)
    (group,) = (g for g in svg(tmp_path / "z.svg")["axes_1"].findall(f"{SVG}g") if g.get("id").startswith("line2d"))
    low, middle, high = (float(point.split()[1]) for point in re.split("[ML]", group.find(f"{SVG}path").get("d"))[1:])
    assert (middle - low) / (high - low) == pytest.approx(1 / 3)
    (tmp_path / "flat.csv").write_text("step,loss,lr\n1,1,0\n2,1,0\n")
    called = call("curves", tmp_path / "flat.csv", "--y", "lr", "--log", "--out", tmp_path / "y.svg")
    assert called.code == 2 and "no lr of flat.csv is over 0" in called.err


def test_a_long_key_stays_in_the_picture_and_names_stay_as_they_are(tmp_path):
    names = [f"_run_with_a_long_name_{i}, $x_1$ & <b>" for i in range(9)]
    lines = [Line(name, np.arange(3.0), np.arange(3.0) * i) for i, name in enumerate(names)]
    draw(lines, tmp_path / "x.svg", x_name="step", y_name="y")
    _, _, width, height = map(float, ElementTree.parse(tmp_path / "x.svg").getroot().get("viewBox").split())
    texts = list(svg(tmp_path / "x.svg")["legend_1"].iter(f"{SVG}text"))
    assert sorted(text.text for text in texts) == names
    for text in texts:
        assert 10 < float(text.get("y")) < height / 2 and float(text.get("x")) + 4.5 * len(text.text) <= width


def test_no_spike_is_lost_among_a_million_steps(tmp_path):
    y = np.random.default_rng(0).normal(3, 0.03, 1_000_000)
    y[567_890] = 5.0
    draw([Line("run", np.arange(1e6), y)], tmp_path / "x.svg", x_name="step", y_name="y")
    (drawn,) = curves(tmp_path / "x.svg")
    assert drawn[drawn[:, 1].argmax()] == pytest.approx([567_890, 5.0], rel=1e-3)
    assert (tmp_path / "x.svg").stat().st_size < 1_000_000


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
        (["one", "--out", "x.gift"], "--out=x.gift: Format 'gift' is not supported"),
    ],
)
def test_a_mistake_is_exit_2(runs, tmp_path, flags, told):
    called = call("curves", runs / flags[0], "--out", tmp_path / "x.svg", *flags[1:])
    assert called.code == 2 and told in called.err and "Traceback" not in called.err
    assert not (tmp_path / "x.svg").exists()
