"""tools.sample measures the run's own loss in plain transformers, and generates text."""

from __future__ import annotations

import json
import shutil

import pytest

from recipes.common.recipe import Layout
from recipes.common.run_dir.metrics import read_metrics
from tests.support.small_runs import call, small_recipe, train_run, write_data
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Train a run of 4 steps at tensor 2 x data 2, and its export."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = train_run(small_recipe(data, tiny_config("llama")), folder, Layout(tensor=2), 4, steps=4)
    assert call("checkpoint", "to-hf", checkpoint, folder / "hf").code == 0
    return folder


def test_the_loss_is_the_runs_own(run, data):
    done = call("sample", run / "hf", "--data", data, "--json")
    assert done.code == 0, done.err
    last = [record["val_loss"] for record in read_metrics(run / "metrics.jsonl") if "val_loss" in record][-1]
    assert done.json["val_loss"] == pytest.approx(last, rel=1e-6)
    assert (done.json["seqs"], done.json["seq_len"]) == (8, 16), "an export remembers how the run measured"
    assert done.json["perplexity"] == pytest.approx(2.718281828459045 ** done.json["val_loss"])
    assert len(done.json["samples"]) == 3 and all(sample["continuation"] for sample in done.json["samples"])


def test_flags_decide_over_what_the_export_remembers(run, data):
    done = call("sample", run / "hf", "--data", data, "--seqs", 5, "--seq-len", 32, "--prompts", 0, "--json")
    assert (done.json["seqs"], done.json["seq_len"], done.json["samples"]) == (5, 32, [])


def test_prompts_and_seeds(run, data):
    arguments = ["sample", run / "hf", "--data", data, "--prompt", "w5 w6 w7", "--tokens", 12, "--json"]
    first, again, other = call(*arguments), call(*arguments), call(*arguments, "--seed", 9)
    greedy = [call(*arguments, "--temperature", 0, "--seed", seed).json["samples"] for seed in (1, 2)]
    texts = [done.json["samples"][0]["continuation"] for done in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert greedy[0] == greedy[1] and greedy[0][0]["prompt"] == "w5 w6 w7"
    assert len(greedy[0][0]["continuation"].split()) <= 12


def test_a_prompt_longer_than_the_context(run, data):
    """Check that with 64 positions a long prompt loses its start, and no 65th token is generated."""
    done = call("sample", run / "hf", "--data", data, "--prompt", "w5 " * 100, "--tokens", 30)
    assert done.code == 0, done.err
    assert call("sample", run / "hf", "--data", data, "--prompt", "w5", "--tokens", 500).code == 0
    assert call("sample", run / "hf", "--data", data, "--prompt", "", "--tokens", 3).code == 0


def test_for_people(run, data):
    done = call("sample", run / "hf", "--data", data, "--prompts", 1, "--tokens", 4)
    assert done.out.startswith("validation loss ") and "perplexity" in done.out and "--- continuation" in done.out


def test_mistakes_are_one_message(run, data, tmp_path):
    shutil.copytree(run / "hf", tmp_path / "hf")
    cases = [
        ([tmp_path, "--data", data], "no config.json"),
        ([run / "hf", "--data", tmp_path], "dataset.json: the preparation does not exist"),
        ([run / "hf", "--data", data, "--seqs", 10**6], "the validation split of"),
        ([run / "hf", "--data", data, "--seq-len", -3], "--seq-len=-3"),
        ([run / "hf", "--data", data, "--tokens", -1], "must not be negative"),
    ]
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    cases.append(([tmp_path / "hf", "--data", data], "transformers cannot load it"))
    for arguments, message in cases:
        done = call("sample", *arguments)
        assert done.code == 2 and message in done.err and not done.out, done
