"""A resume names everything that it would go on with otherwise: refused, allowed by --accept, or noted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recipes.common.checkpoint.changes import check_resume, resume_changes, resume_flag_problems
from recipes.common.checkpoint.files import writing_problems
from recipes.common.config.field_effects import Effect
from recipes.common.data.batches import open_train
from recipes.common.data.order import sequence_position
from recipes.common.data.reading import order_from_json
from recipes.common.recipe import SGD, AdamW, Batch, Blend, Checkpoints, Cosine, Evaluation, Layout, RecipeError
from tests.support.small_runs import run
from tests.support.tiny import tiny_config, tiny_recipe, write_shards
from tools.data.lookup import read_run, read_step
from tools.spikes.batch_stats import step_tokens

TOKENS = 40_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 3 steps of 4 sequences of 16 tokens, and its recipe."""
    folder = tmp_path_factory.mktemp("saved")
    write_shards(folder / "data", tokens=TOKENS)
    recipe = tiny_recipe(folder / "data", steps=12, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=3))
    run(recipe, 1, folder / "run", max_steps=3)
    return recipe, folder / "run"


def checkpoint(out_dir):
    return out_dir / "checkpoints" / "step_00000003"


def found(saved, recipe):
    return {change.field: change.effect for change in resume_changes(recipe, checkpoint(saved[1]), saved[1])}


def test_the_same_recipe_has_no_changes(saved):
    assert resume_changes(saved[0], checkpoint(saved[1]), saved[1]) == []
    assert resume_flag_problems(saved[0], saved[1], None, ()) == []


def model(**fields):
    return {"model": tiny_config("llama", **fields)}


MEANINGLESS = {
    "optimizer.class": {"optimizer": SGD(lr=1e-3)},
    "model.hidden_size": model(hidden_size=32),
    "model.num_hidden_layers": model(num_hidden_layers=3),
    "model.tie_word_embeddings": model(tie_word_embeddings=True),
    "shape of model.layers.0.self_attn.q_proj.bias": model(attention_bias=True),
    "shape of model.layers.0.self_attn.k_proj.weight": model(num_key_value_heads=4),
}
CONSENT = {
    "model.rms_norm_eps": model(rms_norm_eps=1e-2),
    "model.hidden_act": model(hidden_act="gelu"),
    "model.num_attention_heads": model(num_attention_heads=2, head_dim=32, num_key_value_heads=1),
    "model.rope_parameters.rope_theta": model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "model.attention_dropout": model(attention_dropout=0.1),
    "optimizer.betas": {"optimizer": AdamW(lr=1e-3, eps=1e-6, clip=0.5, betas=(0.9, 0.99))},
    "optimizer.eps": {"optimizer": AdamW(lr=1e-3, eps=1e-7, clip=0.5)},
    "batch.seq_len": {"batch": Batch(seq_len=32, micro_seqs=1, global_seqs=4)},
    "seed": {"seed": 5},
    "mask_documents": {"mask_documents": True},
    "z_loss": {"z_loss": 1e-4},
}
FREE = {
    "batch.global_seqs": {"batch": Batch(seq_len=16, micro_seqs=1, global_seqs=8)},
    "batch.micro_seqs": {"batch": Batch(seq_len=16, micro_seqs=2, global_seqs=4)},
    "optimizer.lr": {"optimizer": AdamW(lr=2e-3, eps=1e-6, clip=0.5)},
    "schedule.class": {"schedule": Cosine(warmup_steps=2)},
    "checkpoints.keep_last": {"checkpoints": Checkpoints(every_steps=3, keep_last=9)},
    "steps": {"steps": 20},
    "name": {"name": "other"},
    "layouts": {"layouts": {2: Layout(tensor=2)}},
}


@pytest.mark.parametrize("field", MEANINGLESS)
def test_what_makes_the_state_meaningless_is_refused(saved, field):
    recipe = replace(saved[0], **MEANINGLESS[field])
    assert found(saved, recipe)[field] is Effect.STATE
    accepted = () if field.startswith("shape") else (field,)
    problems = resume_flag_problems(recipe, saved[1], None, accepted)  # accepting does not help
    assert any(problem.startswith(f"{field}=") and "mean nothing" in problem for problem in problems)


@pytest.mark.parametrize("field", CONSENT)
def test_what_changes_mathematics_or_order_needs_consent(saved, field):
    recipe = replace(saved[0], **CONSENT[field])
    assert found(saved, recipe)[field] in (Effect.MATHEMATICS, Effect.ORDER)
    problems = resume_flag_problems(recipe, saved[1], None, ())
    assert any(p.startswith(f"{field}=") and p.endswith(f"go on with --accept {field}") for p in problems)
    accepted = [change for change, effect in found(saved, recipe).items()]
    assert resume_flag_problems(recipe, saved[1], None, accepted) == []


@pytest.mark.parametrize("field", FREE)
def test_what_is_free_is_found_and_let_through(saved, field):
    recipe = replace(saved[0], **FREE[field])
    assert field in found(saved, recipe)
    assert resume_flag_problems(recipe, saved[1], None, ()) == []


def test_a_later_folder_without_a_seal_is_no_checkpoint(saved):
    later = saved[1] / "checkpoints" / "step_00000013"  # beyond the run's 12 steps
    later.mkdir()
    try:
        assert resume_flag_problems(saved[0], saved[1], None, ()) == []
        (later / "checksums.json").write_text("{")
        assert resume_flag_problems(saved[0], saved[1], None, ()) == []
    finally:
        shutil.rmtree(later)


def test_a_run_that_is_past_its_end_is_told(saved):
    recipe, out_dir = saved
    (problem,) = resume_flag_problems(recipe, out_dir, None, (), 2)
    assert problem.startswith("--max-steps=2: the run is past it, step_00000003 is its newest checkpoint; give more than 3")
    (problem,) = resume_flag_problems(replace(recipe, steps=2), out_dir, None, ())
    assert problem.startswith("steps=2: the run is past it")
    assert resume_flag_problems(recipe, out_dir, None, (), 3) == []  # nothing is left to do: it ends with 0


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    assert writing_problems(tmp_path / "runs" / "new") == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (problem,) = writing_problems(tmp_path / "file" / "run")
    assert "cannot be written to: Not a directory; it is a file, or choose another folder" in problem
    (problem,) = writing_problems(Path("/proc/nowhere"))
    assert problem.startswith("--out-dir=/proc/nowhere: /proc cannot be written to")


def test_all_problems_come_at_once_with_both_values(saved):
    optimizer = AdamW(lr=1e-3, eps=1e-7, clip=0.5)
    recipe = replace(saved[0], seed=5, optimizer=optimizer, **model(rms_norm_eps=1e-2, hidden_act="gelu"))
    problems = resume_flag_problems(recipe, saved[1], None, ("optimizer.eps", "modle.hidden_act"))
    assert [problem.split("=")[0] for problem in problems[1:]] == ["model.hidden_act", "model.rms_norm_eps", "seed"]
    assert problems[0] == "--accept modle.hidden_act: no field of the recipe; did you mean model.hidden_act?"
    assert problems[3].startswith("seed=5, 1234 in the checkpoint step_00000003: that changes the order of the data; set it back")


def test_a_group_of_fields_is_accepted_by_its_name(saved):
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    recipe = replace(saved[0], **model(rope_parameters=rope))
    assert len(resume_flag_problems(recipe, saved[1], None, ())) == 3
    assert resume_flag_problems(recipe, saved[1], None, ("model.rope_parameters",)) == []
    assert len(resume_flag_problems(recipe, saved[1], None, ("model",))) == 4


def test_data_are_compared_by_what_they_hold(saved, tmp_path):
    recipe, out_dir = saved
    shutil.copytree(recipe.data, tmp_path / "moved")
    moved = replace(recipe, data=str(tmp_path / "moved"))
    assert found(saved, moved) == {"data": Effect.NOTHING}
    manifest = tmp_path / "moved" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"documents": 1', '"documents": 2', 1))
    assert found(saved, moved) == {"data": Effect.ORDER}
    assert resume_flag_problems(moved, out_dir, None, ("data",)) == []
    one = Blend(weights={recipe.data: 2.0})
    assert found(saved, replace(recipe, data=one)) == {}  # as without a blend
    two = Blend(weights={recipe.data: 1.0, str(tmp_path / "moved"): 1.0})
    assert found(saved, replace(recipe, data=two)) == {"data": Effect.ORDER, "data.weights": Effect.ORDER}


def test_the_tokenizer_is_compared_by_its_content(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    assert found(saved, replace(saved[0], tokenizer=str(tmp_path)))["tokenizer"] is Effect.MATHEMATICS


def test_a_checkpoint_that_no_run_saved_says_which_model_it_holds(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "run", symlinks=True)
    (checkpoint(tmp_path / "run") / "recipe.json").unlink()
    same = check_resume(saved[0], tmp_path / "run", checkpoint(tmp_path / "run"), ())
    assert same == []
    with pytest.raises(RecipeError, match=r"model\.rms_norm_eps=0\.01"):
        check_resume(replace(saved[0], **CONSENT["model.rms_norm_eps"]), tmp_path / "run", checkpoint(tmp_path / "run"), ())


def test_an_accepted_seq_len_goes_on_in_tokens_without_repeats(saved, tmp_path, capfd):
    """3 steps of 4 x 16 tokens, then steps of 2 x 40; what is accepted is kept, and a restart needs no second consent."""
    recipe, out_dir = saved
    shutil.copytree(out_dir, tmp_path / "run", symlinks=True)
    longer = replace(recipe, batch=Batch(seq_len=40, micro_seqs=1, global_seqs=2))
    with pytest.raises(Exception, match=r"batch.seq_len=40, 16 in the checkpoint"):
        run(longer, 1, tmp_path / "run", resume=True, max_steps=5)
    records = run(longer, 1, tmp_path / "run", resume=True, max_steps=6, accept=("batch.seq_len",))
    assert [records[step]["consumed_tokens"] for step in (3, 4, 5, 6)] == [192, 272, 352, 432]
    assert "going on with batch.global_seqs=2, 4 in the checkpoint: changes the course of training" in capfd.readouterr().err
    start = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]
    assert start["accepted"] == [{"field": "batch.seq_len", "old": 16, "new": 40}]
    read = set()
    for position in sequence_position(1234, np.arange(12), TOKENS // 16).tolist():
        read |= set(range(position * 16, position * 16 + 16))
    order = order_from_json(start["reading"])
    assert (order.since_step, order.start_seqs, order.rest_tokens) == (3, 4, 32)
    stream = open_train(longer.data, 40, order)
    positions = stream.locate(1234, 4 + np.arange(stream.num_positions))[1]
    left = [p for p in range(stream.num_positions) if not read & set(range(40 * p, 40 * p + 40))]
    assert sorted(positions[: len(left)].tolist()) == left
    for step, seq_len in ((3, 16), (6, 40)):  # what tools say a step read
        shown, at = read_run(tmp_path / "run", step), read_step(tmp_path / "run", step)
        assert (shown.seq_len, at.consumed) == (seq_len, {3: 8, 6: 8}[step])
    assert step_tokens(shown, at)[0].tolist() == stream.read(positions[4:5])[0].tolist()
    # a restart by a supervisor, from the checkpoint before the change as well as from one after it
    again = run(longer, 1, tmp_path / "run", resume=True, resume_step=3, max_steps=6)
    assert [again[step]["loss"] for step in (4, 5, 6)] == [records[step]["loss"] for step in (4, 5, 6)]
    assert resume_flag_problems(longer, tmp_path / "run", None, ()) == []
