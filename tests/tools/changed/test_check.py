"""`changed check` says what of a run's surroundings is not here, each with its cure; on the machine of the run, nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from recipes.common.recipe import Checkpoints, Evaluation
from recipes.common.run_dir.segments import Segment, read_segments
from tests.support.small_runs import call, run
from tests.support.tiny import tiny_recipe, write_shards
from tools.changed.check import launched_facts, missing_here

RECIPE = tiny_recipe(Path("/data/web"))
FACTS: dict[str, Any] = {
    "recipe.seed": 1234,
    "package.torch.version": "2.13.0",
    "package.torch.files": "sha256:1",
    "package.tqdm.version": "4.0",
    "git.commit": "abc",
    "git.patch": "",
    "code.hash": "sha256:2",
    "library.cuda": "13.0",
    "environment.NCCL_ALGO": "Ring",
    "threads.torch": 8,
    "torch.tf32_matmul": False,
    "data.web.hash": "sha256:3",
    "data.web.train_00000": "sha256:4",
    "tokenizer.hash": "sha256:5",
    "algorithm.order": 1,
    "seed.dropout": "sha256:6",
    "host.0.cpu": "EPYC",
    "host.0.name": "node-a",
    "host.0.gpus": ["H100"] * 8,
    "host.1.gpus": ["H100"] * 8,
}


def found(
    here: dict[str, Any], gone: tuple[str, ...] = (), launched: dict[str, str] | None = None
) -> list[tuple[str, bool, str]]:
    segment = Segment(
        index=1, cause="start", step=0, attempt=1, time="", run_id="", previous="", hash="", facts=FACTS, origins={}
    )
    now = {name: value for name, value in {**FACTS, **here}.items() if name not in gone}
    return [
        (each.fact, each.matters, each.cure) for each in missing_here(segment, now, RECIPE, Path("runs/mine"), launched or {})
    ]


@pytest.mark.parametrize(
    ("here", "gone", "fact", "matters", "cure"),
    [
        (
            {"package.torch.version": "2.12", "package.torch.files": "x"},
            (),
            "package.torch.version",
            True,
            "install torch==2.13.0",
        ),
        ({"package.torch.files": "x"}, (), "package.torch.files", True, "install torch==2.13.0, the same wheel"),
        ({}, ("package.torch.version", "package.torch.files"), "package.torch.version", True, "install torch==2.13.0"),
        ({"package.tqdm.version": "5.0"}, (), "package.tqdm.version", False, "install tqdm==4.0"),
        ({"git.commit": "def"}, (), "git.commit", False, "git checkout abc"),  # the code is the same
        ({"code.hash": "x", "git.commit": "def", "git.patch": "y"}, (), "code.hash", True, "git checkout abc"),
        ({"library.cuda": "12.8"}, (), "library.cuda", True, "use an environment with that library"),
        ({"environment.NCCL_ALGO": "Tree"}, (), "environment.NCCL_ALGO", True, "export NCCL_ALGO=Ring"),
        ({"environment.NVIDIA_TF32_OVERRIDE": "1"}, (), "environment.NVIDIA_TF32_OVERRIDE", True, "unset NVIDIA_TF32_OVERRIDE"),
        ({"threads.torch": 4}, (), "threads.torch", True, "OMP_NUM_THREADS"),
        ({"data.web.train_00000": "x"}, (), "data.web.train_00000", True, "copy the run's data to /data/web"),
        ({}, ("data.web.train_00000",), "data.web.train_00000", True, "copy the run's data to /data/web"),
        ({"tokenizer.hash": None}, (), "tokenizer.hash", True, "copy the run's tokenizer to /data/web/tokenizer"),
        ({"algorithm.order": 2}, (), "algorithm.order", True, "the version of this code"),
        ({"seed.dropout": "x"}, (), "seed.dropout", True, "the version of torch"),
        ({"host.0.gpus": ["A100"]}, (), "host.0.gpus", True, "use a machine of that kind"),
        ({"host.0.cpu": "Xeon"}, (), "host.0.cpu", True, "use a machine of that kind"),
    ],
)
def test_a_single_lack(here: dict[str, Any], gone: tuple[str, ...], fact: str, matters: bool, cure: str) -> None:
    ((name, counts, what),) = found(here, gone)
    assert (name, counts) == (fact, matters) and cure in what


def test_what_is_no_lack() -> None:
    assert found({}) == []
    more = {"host.0.name": "node-b", "host.0.gpus": ["H100"], "package.black.version": "1", "package.black.files": "sha256:9"}
    assert found(more) == []
    assert found({}, ("torch.tf32_matmul",)) == []  # no GPU here: the GPUs say so


def test_what_the_launch_scripts_set_is_no_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"environment.NCCL_ALGO": "Ring", "environment.OMP_NUM_THREADS": "8"}
    assert found({"threads.torch": 2}, ("environment.NCCL_ALGO",), told) == []
    told = {"environment.NCCL_ALGO": "Tree", "environment.OMP_NUM_THREADS": "1"}
    lacks = found({"threads.torch": 2}, ("environment.NCCL_ALGO",), told)
    assert [fact for fact, *_ in lacks] == ["environment.NCCL_ALGO", "threads.torch"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    launched = launched_facts()
    assert (launched["environment.OMP_NUM_THREADS"], launched["environment.NCCL_DEBUG"]) == ("1", "INFO")


def test_a_run_on_its_own_machine_and_then_with_another_byte(tmp_path: Path) -> None:
    write_shards(tmp_path / "tokens", tokens=4_000)
    recipe = tiny_recipe(tmp_path / "tokens", checkpoints=Checkpoints(every_steps=1), evaluation=Evaluation())
    run(recipe, 1, tmp_path / "run", max_steps=1)
    same = call("changed", "check", tmp_path / "run")
    assert same.code == 0 and "nothing is missing" in same.out, same
    shard = tmp_path / "tokens/train_00000.bin"
    times = shard.stat()
    content = bytearray(shard.read_bytes())
    content[99] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = call("changed", "check", tmp_path / "run", "--json")
    assert changed.code == 1 and not changed.json["exact"]
    assert [each["fact"] for each in changed.json["found"] if each["matters"]] == [
        "data.tokens.train_00000",
        "data.tokens.contents",
    ]
    wrong = call("changed", "check", tmp_path / "run", "--segment", 7)
    assert wrong.code == 2 and "--segment 7: the record has 1" in wrong.err
    assert json.dumps(read_segments(tmp_path / "run")[0].facts)  # the run is as it was
    assert call("changed", "check", tmp_path / "tokens").code == 2
