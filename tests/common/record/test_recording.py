"""The record of whole runs, and what of it belongs to hosts and ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from recipes.common.config.fact_effects import ENVIRONMENT_EFFECTS
from recipes.common.recipe import Checkpoints, Evaluation
from recipes.common.record.environment import environment_facts
from recipes.common.record.machine import host_facts, library_facts
from recipes.common.record.recording import Gathered, facts_of_hosts, facts_of_ranks
from recipes.common.run_dir.segments import changed_facts, read_chain, read_segments
from tests.support.small_runs import run
from tests.support.tiny import tiny_recipe, write_shards

SOME_OF_EACH_KIND = """recipe.seed deepspeed.zero_optimization.stage git.commit git.patch code.hash package.torch.files
    package.torch.version host.0.name host.0.cpu library.python environment.OMP_NUM_THREADS threads.torch seed.dropout
    data.tokens.train_00000 tokenizer.hash algorithm.order algorithm.initial_weights determinism rank_hosts run.skips"""
VARIABLES = """NCCL_ALGO NCCL_PROTO CUBLAS_WORKSPACE_CONFIG OMP_NUM_THREADS NVIDIA_TF32_OVERRIDE CUDA_VISIBLE_DEVICES
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE LD_PRELOAD MKL_CBWR"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `first`: a start on one rank, a layout change to two, a resume; and `again`, the same start."""
    root = tmp_path_factory.mktemp("runs")
    write_shards(root / "tokens", tokens=8_000)
    recipe = tiny_recipe(root / "tokens", steps=3, checkpoints=Checkpoints(every_steps=1), evaluation=Evaluation())
    run(recipe, 1, root / "first", max_steps=1)
    run(recipe, 2, root / "first", resume=True, max_steps=2)
    run(recipe, 2, root / "first", resume=True)
    run(recipe, 1, root / "again", max_steps=1)
    return root


def test_a_run_with_a_layout_change_and_a_resume(runs: Path) -> None:
    segments, problems = read_chain(runs / "first")
    assert problems == []
    assert [(s.cause, s.step, s.attempt) for s in segments] == [("start", 0, 1), ("layout change", 1, 2), ("resume", 2, 3)]
    first, second, third = (segment.facts for segment in segments)
    assert changed_facts(first, second) == ["layout.pipeline", "sizes.world", "rank_hosts"]
    assert changed_facts(second, third) == []
    starts = json.loads((runs / "first/run.json").read_text())["starts"]
    assert [start["segments"] for start in starts] == [[segment.hash] for segment in segments]
    assert not [name for name in third if name.startswith("record.failed")]
    missing = set(SOME_OF_EACH_KIND.split()) - third.keys()
    assert not missing


def test_an_identical_rerun_and_a_moved_copy_have_the_same_facts(runs: Path) -> None:
    first, again = (read_segments(runs / name)[0] for name in ("first", "again"))
    assert changed_facts(first.facts, again.facts) == [] and first.origins.keys() == again.origins.keys()
    shutil.copytree(runs / "first", runs / "moved")
    assert read_segments(runs / "moved") == read_segments(runs / "first") and read_chain(runs / "moved")[1] == []


def test_the_variables_that_matter_are_listed_by_name_and_no_secret_is() -> None:
    secret = {"WANDB_API_KEY": "a", "HF_TOKEN": "b", "AWS_SECRET_ACCESS_KEY": "c", "NCCL_ALGO_SECRET": "d", "HOME": "/root"}
    facts = environment_facts(secret | {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    assert facts == {"environment.NCCL_ALGO": "Ring", "environment.CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert not [
        name
        for name in ENVIRONMENT_EFFECTS
        if any(word in name for word in ("KEY", "TOKEN_", "SECRET", "PASSWORD", "CREDENTIAL"))
    ]


@pytest.mark.parametrize("name", VARIABLES.split())
def test_one_variable_set_changed_and_unset(name: str) -> None:
    without = {key: value for key, value in os.environ.items() if key != name}
    one, two = without | {name: "1"}, without | {name: "2"}
    for before, after in ((without, one), (one, two), (two, without)):
        assert changed_facts(environment_facts(before), environment_facts(after)) == [f"environment.{name}"]


def ranks_of(*hosts: str, facts: dict[int, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return what the ranks on `hosts` tell. facts: those of single ranks that are not as the others'."""
    common = {"threads.torch": 8, "environment.NCCL_ALGO": "Ring"}
    return [
        {"host": host, "device": ["H100", f"GPU-{host}-{rank}"], "facts": common | (facts or {}).get(rank, {})}
        for rank, host in enumerate(hosts)
    ]


def facts_on(ranks: list[dict[str, Any]], differs: dict[str, Any] | None = None) -> dict[str, Any]:
    keys = list(dict.fromkeys(each["host"] for each in ranks))
    hosts = [{"host": {"name": key, "cpu": "x"}, "differs": {}} for key in keys]
    hosts[-1]["differs"] = differs or {}
    return facts_of_ranks(ranks, keys) | facts_of_hosts(hosts, ranks, keys)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (facts_on(ranks_of("a", "a", "b", "b")), []),
        (facts_on(ranks_of("a", "a", "c", "c")), ["host.1.name", "host.1.gpu_serials"]),  # a host swapped
        (facts_on(ranks_of("a", "b", "a", "b")), ["rank_hosts", "host.0.gpu_serials", "host.1.gpu_serials"]),
        (facts_on(ranks_of("a", "a", "b", "b", facts={3: {"threads.torch": 4}})), ["rank.3.threads.torch"]),
        (facts_on(ranks_of("a", "a", "b", "b", facts={2: {"environment.NCCL_ALGO": "Tree"}})), ["rank.2.environment.NCCL_ALGO"]),
        (
            facts_on(ranks_of("a", "a", "b", "b", facts={r: {"threads.torch": 4} for r in range(4)})),
            ["threads.torch"],
        ),
        (facts_on(ranks_of("a", "a", "b", "b"), {"package.torch.version": "2.1"}), ["host.1.package.torch.version"]),
        (facts_on(ranks_of("a", "a", "b", "b"), {"data.tokens.train_00007": "sha256:0"}), ["host.1.data.tokens.train_00007"]),
    ],
    ids=[
        "nothing",
        "host",
        "placement",
        "threads of a rank",
        "variable of a rank",
        "threads",
        "package of a host",
        "data of a host",
    ],
)
def test_hosts_and_ranks(after: dict[str, Any], expected: list[str]) -> None:
    assert sorted(changed_facts(facts_on(ranks_of("a", "a", "b", "b")), after)) == sorted(expected)


def test_this_host_is_the_same_twice() -> None:
    assert host_facts() == host_facts() and library_facts() == library_facts()
    assert host_facts()["cpu"] and library_facts()["library.torch_build"]


def test_what_cannot_be_found_out_is_a_fact_and_said() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("the driver\ndoes not answer")

    gathered = Gathered()
    gathered.add("libraries", broken)
    gathered.add("code", lambda: {"git.commit": "abc"})
    assert gathered.facts == {"record.failed.libraries": "RuntimeError: the driver does not answer", "git.commit": "abc"}
    assert gathered.failures() == ["the record does not hold libraries: RuntimeError: the driver does not answer"]
