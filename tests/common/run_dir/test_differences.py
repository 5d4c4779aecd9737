"""Two records are compared fact by fact: each change once, with what it can change, and none where nothing changed."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config, LlamaConfig

from recipes.common.config.field_effects import Effect, flat_fields
from recipes.common.run_dir.difference import ABSENT, short_value
from recipes.common.run_dir.differences import counted, find_differences, not_recorded, verdict
from recipes.common.run_dir.patch_differences import patch_files
from tests.support.recorded_runs import example_facts

FACTS = example_facts()
OTHER = "sha256:" + 64 * "e"


def found(facts, before=FACTS, **more):
    return [(d.name, d.effect) for d in find_differences(before, facts, **more) if not d.follows]


def model(config):
    return {f"recipe.model.{k}": v for k, v in flat_fields(json.loads(json.dumps(config.to_dict(), default=str))).items()}


@pytest.mark.parametrize(
    ("before", "old", "new", "value"),
    [
        (
            model(LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
            "rope_parameters.rope_theta",
            "rope_theta",
            5e5,
        ),
        (model(LlamaConfig()), "rope_parameters.rope_theta", "rope_theta", 10000.0),
        (model(GPT2Config()), "n_embd", "hidden_size", 768),
        (model(GPT2Config(n_layer=3)), "n_layer", "num_hidden_layers", 3),
    ],
)
def test_a_field_that_transformers_renamed_is_equal_where_its_value_is(before, old, new, value):
    after = {
        name: v for name, v in before.items() if name not in (f"recipe.model.{old}", "recipe.model.rope_parameters.rope_type")
    }
    differences = find_differences(before, after | {f"recipe.model.{new}": value})
    difference = next(d for d in differences if d.name == f"recipe.model.{new}")
    assert {d.effect for d in differences} == {Effect.NOTHING}
    assert (difference.name, difference.effect) == (f"recipe.model.{new}", Effect.NOTHING)
    assert difference.note == f"renamed, equal; before, {old}"
    difference = find_differences(before, after | {f"recipe.model.{new}": value * 2})[0]
    assert difference.name == f"recipe.model.{new}" and difference.can_change_loss and difference.note.startswith("renamed")


def test_a_default_that_is_stated_is_equal():
    before = model(GPT2Config())
    assert found({n: v for n, v in before.items() if n != "recipe.model.layer_norm_epsilon"}, before) == [
        ("recipe.model.layer_norm_epsilon", Effect.NOTHING)
    ]
    after = before | {"recipe.model.layer_norm_epsilon": 1e-6}
    assert found({n: v for n, v in before.items() if n != "recipe.model.layer_norm_epsilon"}, after)[0][1] is Effect.MATHEMATICS
    for name, other in (
        ("recipe.z_loss", 1e-4),
        ("recipe.optimizer.decay_embeddings", False),
        ("recipe.monitor.on_drift", "log"),
    ):
        without = {n: v for n, v in FACTS.items() if n != name}
        assert found(without) == [(name, Effect.NOTHING)]
        assert found(without, FACTS | {name: other}) != [(name, Effect.NOTHING)]


def test_what_follows_from_another_is_not_counted():
    after = FACTS | {"recipe.optimizer.clip": 2.0, "deepspeed.gradient_clipping": 2.0}
    differences = find_differences(FACTS, after)
    assert [(d.name, d.follows) for d in differences] == [
        ("recipe.optimizer.clip", ""),
        ("deepspeed.gradient_clipping", "recipe.optimizer.clip"),
    ]
    assert counted(differences) == (1, 0) and verdict(differences) == "this 1 can change the loss; these 0 cannot"
    alone = find_differences(FACTS, FACTS | {"deepspeed.gradient_clipping": 2.0})
    assert counted(alone) == (1, 0)
    assert verdict([]) == "no differences"


def test_a_folder_of_data_that_moved_is_the_same_data():
    moved = {name.replace("data.tokens.", "data.elsewhere."): value for name, value in FACTS.items()}
    assert found(moved | {"recipe.data": "/mnt/elsewhere"}) == [("recipe.data", Effect.NOTHING)]
    other = moved | {"recipe.data": "/mnt/elsewhere", "data.elsewhere.contents": OTHER, "data.elsewhere.train_00000": OTHER}
    assert {effect for _, effect in found(other)} == {Effect.ORDER}
    (shard,) = find_differences(FACTS, FACTS | {"data.tokens.contents": OTHER, "data.tokens.train_00000": OTHER})
    assert shard.name == "data.tokens" and shard.effect is Effect.ORDER and shard.note == "1 of 1 shards differ: train_00000"
    (anew,) = find_differences(FACTS, FACTS | {"data.tokens.inputs": OTHER, "data.tokens.hash": OTHER})
    assert anew.effect is Effect.NOTHING and "the tokens are equal" in anew.note


PATCH = b"""diff --git a/recipes/common/x.py b/recipes/common/x.py
index 1..2 100644
--- a/recipes/common/x.py
+++ b/recipes/common/x.py
@@ -1,2 +1,2 @@
 a
-b
+c
--- a removed line of dashes
diff --git a/tests/y.py b/tests/y.py
new file mode 100644
--- /dev/null
+++ b/tests/y.py
@@ -0,0 +1 @@
+1
"""


def test_uncommitted_lines_are_judged_by_their_file():
    assert patch_files(PATCH) == {"recipes/common/x.py": 3, "tests/y.py": 1}
    after = FACTS | {"git.patch": OTHER, "code.hash": OTHER}
    differences = find_differences(FACTS, after, (None, PATCH))
    told = [(d.name, d.new, d.effect, d.follows) for d in differences]
    assert told == [
        ("git.patch", "recipes/common/x.py (3 lines)", Effect.MATHEMATICS, ""),
        ("code.hash", OTHER, Effect.MATHEMATICS, "git.patch"),
        ("git.patch", "tests/y.py (1 line)", Effect.NOTHING, ""),
    ]
    moved = PATCH.replace(b"@@ -1,2 +1,2 @@", b"@@ -11,2 +11,2 @@").replace(b"index 1..2", b"index 3..4")
    one = FACTS | {"git.patch": "sha256:" + 64 * "d"}
    assert {d.effect for d in find_differences(one, FACTS | {"git.patch": OTHER}, (PATCH, moved))} == {Effect.NOTHING}
    (unknown,) = find_differences(FACTS, FACTS | {"git.patch": OTHER, "code.hash": OTHER} | {}, (None, None))[:1]
    assert unknown.effect is Effect.MATHEMATICS


def test_another_build_and_edited_files_of_one_version():
    (build,) = find_differences(FACTS, FACTS | {"package.torch.files": OTHER})
    assert (build.name, build.effect) == (
        "package.torch",
        Effect.MATHEMATICS,
    ) and "another build of the same version" in build.note
    (edited,) = find_differences(FACTS, FACTS | {"package.torch.edited": {"torch/nn/init.py": OTHER}})
    assert edited.new == "edited: torch/nn/init.py" and edited.effect is Effect.MATHEMATICS
    assert found(FACTS | {"package.torch.version": "2.10.0", "package.torch.files": OTHER, "library.cuda": "13.1"}) == [
        ("package.torch", Effect.MATHEMATICS)
    ]


def test_another_host_of_the_same_kind_changes_nothing_and_of_another_rounds():
    assert found(FACTS | {"host.0.name": "node-b"}) == [("host.0.name", Effect.NOTHING)]
    assert found(FACTS | {"host.0.name": "node-b", "host.0.cpu": "Xeon"}) == [
        ("host.0.cpu", Effect.ROUNDING),
        ("host.0.name", Effect.NOTHING),
    ]
    two = FACTS | {"rank_hosts": [0, 0, 1, 1]}
    assert found(FACTS | {"rank_hosts": [0, 1, 0, 1]}, two) == [("rank_hosts", Effect.ROUNDING)]


def test_a_layout_draws_other_dropout_masks():
    after = {"sizes.world": 2, "sizes.data": 2}
    assert {effect for _, effect in found(FACTS | after)} == {Effect.ROUNDING}
    dropping = FACTS | {"recipe.model.attention_dropout": 0.1}
    assert found(dropping | after, dropping)[0][1] is Effect.MATHEMATICS


def test_what_one_of_two_records_does_not_hold_is_no_difference():
    old = {name: value for name, value in FACTS.items() if not name.startswith(("package.", "host."))}
    assert not_recorded(FACTS, old) == {"host": 3, "package": 5} and found(old) == []
    assert found({n: v for n, v in FACTS.items() if n != "package.tqdm.version"}) == [("package.tqdm", Effect.NOTHING)]
    assert not_recorded(FACTS, FACTS | {"environment.NCCL_ALGO": "Ring"}) == {}
    (unset,) = find_differences(FACTS | {"environment.NCCL_ALGO": "Ring"}, FACTS)
    assert (unset.old, unset.new) == ("Ring", ABSENT)


def test_hashes_are_shown_by_their_first_digits():
    assert short_value("sha256:" + "0123456789abcdef" * 4) == "0123456789ab"
    assert short_value({"a": "x" * 90}).endswith("...") and short_value(1e-3) == "0.001"
