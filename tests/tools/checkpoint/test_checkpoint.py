"""tools.checkpoint lists, verifies, inspects, compares and advises correctly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from recipes.common.checkpoint.files import Part, merge_index, seal, write_rank_file
from recipes.common.checkpoint.reader import Reader
from recipes.common.model.sharding import RankShard
from recipes.common.recipe import Checkpoints, Evaluation, Layout
from tests.support.small_runs import call, small_recipe, train_run, write_data
from tests.support.tiny import tiny_config
from tools.checkpoint.advise import RunTimes, advise, daly, measured, young
from tools.checkpoint.contents import gaps

HOUR = 3600.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a run with checkpoints of steps 2 and 4 at tensor 2 x pipeline 2."""
    data = write_data(tmp_path_factory.mktemp("data") / "tokens")
    folder = tmp_path_factory.mktemp("run")
    recipe = small_recipe(
        data, tiny_config("llama"), evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2, keep_last=5)
    )
    train_run(recipe, folder, Layout(tensor=2, pipeline=2), 4, steps=4)
    return folder


def write(folder: Path, tensors: dict[tuple[str, str], np.ndarray], **state: object) -> Path:
    folder.mkdir(parents=True)
    parts = [Part(n, k, t.shape, RankShard(), 0, t.size, t.reshape(-1)) for (n, k), t in tensors.items()]
    report = write_rank_file(folder, 0, parts)
    (folder / "index.json").write_text(json.dumps(merge_index([report])))
    (folder / "state.json").write_text(json.dumps({"step": 1, "consumed_seqs": 4, "tied": False, "world_size": 1} | state))
    seal(folder, {report["file"]: report})
    return folder


def test_ls(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    (tmp_path / "checkpoints" / ".step_00000006.saving").mkdir()
    (tmp_path / "checkpoints" / "step_00000002" / "rank_00000.safetensors").write_bytes(b"")
    shutil.copytree(run / "checkpoints" / "latest", tmp_path / "checkpoints" / "step_00000003")
    (tmp_path / "checkpoints" / "step_00000003" / "checksums.json").unlink()
    done = call("checkpoint", "ls", tmp_path, "--json")
    assert done.code == 0, done.err
    found = {entry["name"]: (entry["state"], entry["latest"], entry["step"]) for entry in done.json["checkpoints"]}
    assert found == {
        ".step_00000006.saving": ("being written, or left by a kill", False, None),
        "step_00000002": ("damaged: 1 files of another size", False, None),
        "step_00000003": ("not sealed: never loaded", False, None),
        "step_00000004": ("sealed", True, 4),
    }
    lines = call("checkpoint", "ls", tmp_path).out.splitlines()
    assert len(lines) == 5 and lines[-1].split()[:2] == ["step_00000004", "sealed"] and lines[-1].endswith("latest")


def test_verify_names_what_is_damaged(run, tmp_path):
    assert call("checkpoint", "verify", run).code == 0
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    victim = tmp_path / "checkpoints" / "step_00000002" / "rank_00002.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 128
    victim.write_bytes(content)
    done = call("checkpoint", "verify", tmp_path, "--json")
    assert done.code == 1 and not done.json["good"]
    assert [len(lines) for lines in done.json["checkpoints"].values()] == [1, 0]
    done = call("checkpoint", "verify", tmp_path)
    assert done.code == 1 and str(victim) in done.out and "step_00000004: intact" in done.out
    assert call("checkpoint", "verify", tmp_path / "checkpoints" / "latest").code == 0


def test_verify_finds_gaps_that_checksums_cannot(tmp_path):
    data = np.arange(12, dtype=np.float32)
    whole = [Part("w", "master", (4, 3), RankShard(), a, b, data[a:b]) for a, b in ((0, 5), (5, 12))]
    for number, (parts, found) in enumerate([(whole, 0), (whole[:1], 1), (whole[1:], 1), ([whole[0], whole[0]], 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        reports = [write_rank_file(folder, rank, [part]) for rank, part in enumerate(parts)]
        (folder / "index.json").write_text(json.dumps(merge_index(reports)))
        (folder / "state.json").write_text('{"step": 1, "consumed_seqs": 4}')
        seal(folder, {})
        assert len(gaps(Reader(folder))) == found, number
    assert call("checkpoint", "verify", tmp_path / "1").code == 1
    (tmp_path / "0" / "model").mkdir()
    (tmp_path / "0" / "model" / "evil.py").write_text("")
    done = call("checkpoint", "verify", tmp_path / "0")
    assert done.code == 1 and "model/evil.py: the seal does not name it" in done.out
    assert "the seal does not name model/evil.py" in call("checkpoint", "to-hf", tmp_path / "0", tmp_path / "out").err
    assert not (tmp_path / "out").exists()


def test_no_gaps_in_a_cut_and_padded_checkpoint(run):
    assert gaps(Reader(run / "checkpoints" / "latest")) == []


def test_inspect(run, tmp_path):
    done = call("checkpoint", "inspect", run / "checkpoints" / "latest", "--json")
    assert done.code == 0, done.err
    reader = Reader(run / "checkpoints" / "latest")
    assert {(t["name"], t["kind"]) for t in done.json["tensors"]} == {(n, k) for k in reader.kinds() for n in reader.names(k)}
    for tensor in done.json["tensors"]:
        whole = reader.whole(tensor["name"], tensor["kind"])
        assert tuple(tensor["shape"]) == whole.shape and tensor["non_finite"] == 0
        assert tensor["norm"] == pytest.approx(np.linalg.norm(whole.astype(np.float64)), rel=1e-12)
        assert (tensor["min"], tensor["max"]) == (whole.min(), whole.max())
    total = math.sqrt(sum(t["norm"] ** 2 for t in done.json["tensors"] if t["kind"] == "master"))
    assert done.json["totals"]["master"]["norm"] == pytest.approx(total)
    for pattern, count in (("layers.0.mlp", 3), ("*.norm.weight", 1), ("*layers.[01].mlp.up*", 2)):
        found = call("checkpoint", "inspect", run / "checkpoints" / "latest", "--name", pattern, "--kind", "master", "--json")
        assert len(found.json["tensors"]) == count
    assert "non-finite" in call("checkpoint", "inspect", run / "checkpoints" / "latest").out


def test_inspect_counts_what_is_not_a_number(tmp_path):
    values = np.array([[1, -2, np.nan], [np.inf, 0, -np.inf]], dtype=np.float32)
    folder = write(tmp_path / "c", {("w", "master"): values, ("bad", "master"): np.full(3, np.nan, dtype=np.float32)})
    bad, w = call("checkpoint", "inspect", folder, "--json").json["tensors"]
    assert (w["non_finite"], w["zeros"], w["min"], w["max"], w["norm"]) == (3, 1, -2, 1, pytest.approx(math.sqrt(5)))
    assert (bad["non_finite"], bad["min"], bad["max"]) == (3, None, None)


def test_diff_of_a_run_with_itself_and_with_its_past(run):
    a, b = run / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000004"
    same = call("checkpoint", "diff", a, a)
    assert same.code == 0 and same.out == "all tensors are equal\n"
    done = call("checkpoint", "diff", a, b, "--json")
    assert done.code == 1 and not done.json["equal"] and done.json["state"]["step"] == [2, 4]
    found = {(d["name"], d["kind"]): d for d in done.json["differences"]}
    left, right = Reader(a), Reader(b)
    assert set(found) == {(n, k) for k in left.kinds() for n in left.names(k)}
    for (name, kind), difference in found.items():
        x, y = (r.whole(name, kind).astype(np.float64) for r in (left, right))
        assert difference["largest"] == np.abs(x - y).max() and difference["changed"] == np.count_nonzero(x != y)
        scale = max(np.linalg.norm(x), np.linalg.norm(y))
        assert difference["relative"] == pytest.approx(np.linalg.norm(x - y) / scale, rel=1e-9)
    relative = [d["relative"] for d in done.json["differences"]]
    assert relative == sorted(relative, reverse=True)
    assert "... and" in call("checkpoint", "diff", a, b, "--top", 3).out


def test_diff_names_what_one_side_lacks(tmp_path):
    one, nan = np.ones((2, 3), dtype=np.float32), np.full(2, np.nan, dtype=np.float32)
    a = write(tmp_path / "a", {("w", "master"): one, ("w", "exp_avg"): one, ("s", "master"): one, ("n", "master"): nan})
    b = write(tmp_path / "b", {("w", "master"): one, ("v", "master"): one, ("s", "master"): one.T.copy(), ("n", "master"): nan})
    done = call("checkpoint", "diff", a, b, "--json")
    assert done.code == 1 and done.json["differences"] == []
    assert (done.json["only_in_a"], done.json["only_in_b"]) == (["exp_avg w"], ["master v"])
    assert done.json["other_shape"] == ["s: [2, 3] and [3, 2]"]
    assert "only in A: exp_avg of 1 tensors: w" in call("checkpoint", "diff", a, b).out
    c = write(tmp_path / "c", {("n", "master"): np.array([np.nan, 1], dtype=np.float32)})
    d = write(tmp_path / "d", {("n", "master"): nan})
    assert call("checkpoint", "diff", c, d, "--json").json["differences"][0]["largest"] == math.inf


def lost(interval: float, stall: float, mtbf: float) -> float:
    """Return the lost share by Daly's exact model without restart time: wall time over useful time, minus 1."""
    return mtbf * math.expm1((interval + stall) / mtbf) / interval - 1


@pytest.mark.parametrize("stall", [0.5, 10.0, 300.0, 1800.0])
@pytest.mark.parametrize("mtbf", [1 * HOUR, 24 * HOUR, 720 * HOUR])
def test_the_interval_is_the_best_one(stall, mtbf):
    best = min((lost(t, stall, mtbf), t) for t in np.geomspace(1, 10 * mtbf, 4000))
    assert lost(daly(stall, mtbf), stall, mtbf) <= best[0] * 1.002
    assert daly(stall, mtbf) == pytest.approx(young(stall, mtbf) - stall, rel=0.6)


def test_no_interval_is_shorter_than_the_writing():
    assert daly(100.0, 10.0) == 10.0
    found = advise(60.0, 2 * HOUR, stall=0.01, step=2.0)
    assert found.bound_by_writing and found.interval == 60.0 and found.steps == 30
    assert not advise(60.0, 2 * HOUR).bound_by_writing


def test_advise(run, tmp_path):
    done = call("checkpoint", "advise", "--save-seconds", 40, "--mtbf-hours", 12, "--step-seconds", 3, "--json")
    assert done.code == 0 and done.json["interval"] == pytest.approx(daly(40, 12 * HOUR))
    assert done.json["steps"] == round(daly(40, 12 * HOUR) / 3)
    assert (
        "Checkpoints(every_steps="
        in call("checkpoint", "advise", "--save-seconds", 40, "--mtbf-hours", 12, "--step-seconds", 3).out
    )
    records = [
        {"step": 1, "seconds": 2.0},
        {"step": 1, "save_seconds": 30.0, "save_stall_seconds": 1.5},
        {"step": 2, "seconds": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "sec')
    assert measured(tmp_path) == RunTimes(30.0, 1.5, 3.0)
    done = call("checkpoint", "advise", tmp_path, "--mtbf-hours", 12, "--json")
    assert (done.json["save_seconds"], done.json["stall_seconds"], done.json["step_seconds"]) == (30.0, 1.5, 3.0)


def test_mistakes_are_one_message(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    cases = [
        (["ls", tmp_path], "has no folder `checkpoints`"),
        (["inspect", run], "is a run directory; give one of its checkpoints"),
        (["inspect", tmp_path / "x"], "no such folder"),
        (["inspect", run / "checkpoints" / "latest", "--name", "nothing"], "nothing matches --name nothing"),
        (["advise", "--mtbf-hours", 3], "give --save-seconds or a RUN"),
        (["advise", tmp_path, "--mtbf-hours", 3], "has recorded no save; give --save-seconds"),
        (["advise", "--mtbf-hours", -3, "--save-seconds", 3], "--mtbf-hours=-3.0: must be over 0"),
        (["advise", run / "checkpoints", "--mtbf-hours", 3], "it has no metrics.jsonl"),
        ([], "required: VERB"),
    ]
    for arguments, message in cases:
        done = call("checkpoint", *arguments)
        assert done.code == 2 and message in done.err and not done.out, done
    done = call("checkpoint", "inspect", tmp_path)
    assert done.code == 1 and "not a finished checkpoint" in done.err
