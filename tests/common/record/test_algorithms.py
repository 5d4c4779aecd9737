"""The versions in a run's record stand for what the algorithms give: these outputs may change only with the version beside them.

When such a test fails, a resumed run would read or draw something else. If that is meant, raise the version in the module, and
write here what it stands for from now on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.common.data.batches import open_train
from recipes.common.data.blend import BLEND_VERSION
from recipes.common.data.order import ORDER_VERSION, sequence_position
from recipes.common.model.initial_weights import INITIAL_WEIGHTS_VERSION, SEED_VERSION, name_seed
from recipes.common.model.shard_draws import Call, draw_shard
from recipes.common.model.sharding import HeldTensor, RankShard
from recipes.common.parallel.dropout import dropout_seed
from recipes.common.parallel.grid import one_process
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Blend
from tests.support.tiny import tiny_config, write_shards


def test_the_order() -> None:
    digest = hashlib.sha256()
    for seed in (0, 1234, 2**64 - 1):
        for count in (1, 5, 1000, 2**33 + 7):
            digest.update(
                sequence_position(seed, np.arange(0, 3 * count, max(count // 50, 1))[:200], count).astype("<i8").tobytes()
            )
    assert (ORDER_VERSION, digest.hexdigest()[:16]) == (1, "5669fd0b7e092f41")


def test_the_blend(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for folder in (first, second):
        write_shards(Path(folder), tokens=4000)
    blend = Blend(weights={first: 0.7, second: 0.3}, changes=((160, {first: 1, second: 2}),))
    sources, positions = open_train(blend, 16).locate(1234, np.arange(40))
    digest = hashlib.sha256(np.stack([sources, positions]).astype("<i8").tobytes()).hexdigest()[:16]
    assert (BLEND_VERSION, digest) == (1, "d9c7b40335b046be")


def test_the_seeds() -> None:
    seeds = [name_seed(1234, "model.layers.0.mlp"), dropout_seed(1234, 7, data_rank=3, stage=1)]
    assert (SEED_VERSION, seeds) == (1, [6_172_843_833_792_371_523, 6_270_851_674_996_770_889])


def test_the_initial_weights() -> None:
    """By some of their values: the last bits depend on the processor's instructions."""
    stage = build_stage(plan_model(tiny_config("llama"), attention="sdpa"), one_process(), seq_len=16, seed=1234)
    weights = dict(stage.hf_named_parameters())
    names = ("model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight", "lm_head.weight")
    drawn = [round(value, 6) for name in names for value in weights[name].flatten()[[0, 17, -1]].tolist()]
    assert INITIAL_WEIGHTS_VERSION == 2
    name, whole = "model.layers.3.mlp.down_proj.weight", HeldTensor(RankShard())
    by_shards = draw_shard(1234, name, [Call("normal_", (0.0, 0.02))], (300, 520), whole)
    assert by_shards[[0, 17, 299], [0, 300, 519]].tolist() == pytest.approx([-0.007296, -0.002857, -0.017296], abs=2e-6)
    assert drawn == pytest.approx([0.0, 0.0, -0.012033, -0.021826, 0.024116, 0.004844, -0.03065, 0.019136, 0.032013], abs=2e-6)
    assert torch.equal(weights["model.norm.weight"], torch.ones(64))
