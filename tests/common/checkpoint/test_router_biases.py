"""A mixture whose biases move, stopped, resumed in another layout and exported, has the biases of a run that went through."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from recipes.common.checkpoint.files import CheckpointError
from recipes.common.checkpoint.resume import load_state
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import AdamW, Layout, Router
from tests.support.small_runs import call, masters, small_recipe, train_run, write_data
from tests.support.tiny import VOCAB
from tools.common.forked_ranks import run_ranks

ROUTER = Router(loss="global_batch", coefficient=0.1, bias_rate=0.01, z_loss=1e-3)
CUT = Layout(pipeline=2, pipeline_schedule="zero_bubble")


def _records(out_dir):
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"]]


def test_stopped_resumed_elsewhere_and_exported(tmp_path):
    """Of laguna, whose biases are frozen parameters in transformers."""
    config = shrink(AutoConfig.for_model("laguna", vocab_size=VOCAB), Layout(pipeline=2))
    optimizer = AdamW(lr=1e-3, eps=1e-5, clip=0.5)
    recipe = small_recipe(write_data(tmp_path / "data"), config, router=ROUTER, optimizer=optimizer, steps=4)
    train_run(recipe, tmp_path / "straight", Layout(), 1, steps=4)
    train_run(recipe, tmp_path / "parts", Layout(), 2, steps=2)
    train_run(recipe, tmp_path / "parts", CUT, 2, resume=True, steps=4)
    straight, parts = masters(tmp_path / "straight", "buffer"), masters(tmp_path / "parts", "buffer")
    assert straight and straight.keys() == parts.keys()
    assert all(np.array_equal(straight[name], parts[name]) for name in straight)
    assert max(np.abs(bias).max() for bias in straight.values()) > 0.015
    for left, right in zip(_records(tmp_path / "straight"), _records(tmp_path / "parts"), strict=True):
        for field in ("router_loss", "router_log_z_squared", "load_evenness", "dead_experts"):
            assert right[field] == pytest.approx(left[field], rel=1e-5), (left["step"], field)
    done = call("checkpoint", "to-hf", tmp_path / "parts" / "checkpoints" / "latest", tmp_path / "hf", "--json")
    assert done.code == 0, done.err
    loaded = run_ranks(_loaded, 1, str(tmp_path / "hf"))[0]
    for name, bias in straight.items():
        assert loaded[name].equal(torch.from_numpy(bias)), name


def test_a_checkpoint_without_the_biases_is_of_another_model():
    stage = SimpleNamespace(whole_shapes={"gate.weight": (4, 8)}, persistent_buffers=lambda: [("gate.bias", torch.zeros(4))])
    reader = SimpleNamespace(tensors={"gate.weight"}, shape=lambda name: (4, 8), folder="step_00000002")
    with pytest.raises(CheckpointError, match=r"^step_00000002 holds another model: gate\.bias is not in it$"):
        load_state(reader, SimpleNamespace(stage=stage, grid=None))


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
