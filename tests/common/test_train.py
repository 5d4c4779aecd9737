"""Whole runs: what is read, skipped, blended, masked and ramped, and what the run directory says about it afterwards."""

import json
import shutil
from dataclasses import replace

import pytest

from recipes.common.recipe import AdamW, Batch, Blend, Checkpoints, Evaluation, Layout, Monitor
from tests.support.small_runs import assert_same_state, call, run, small_recipe
from tests.support.tiny import tiny_config, write_shards
from tools.common.forked_ranks import RankError

STEPS = 6
SMALL = tiny_config("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("first", "second")):
        write_shards(root / name, seed=seed, tokens=8_000)
    return root / "first", root / "second"


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """(recipe, run directory, records) of a run that nothing disturbed, on one rank."""
    recipe = small_recipe(
        folders[0],
        SMALL,
        layouts={1: Layout(), 2: Layout(pipeline=2), 4: Layout(pipeline=2)},
        steps=STEPS,
        evaluation=Evaluation(every_steps=3, seqs=7),
        checkpoints=Checkpoints(every_steps=2, keep_last=9),
    )
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return recipe, run_dir, run(recipe, 1, run_dir)


def losses(records):
    return [records[step]["loss"] for step in sorted(records)]


def test_every_layout_and_accumulation_reads_the_same(alone, tmp_path):
    recipe, _, whole = alone
    cut = run(recipe, 4, tmp_path / "cut")
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-6)
    # 7 validation sequences fill no whole number of micro batches: each still counts once
    assert cut[STEPS]["val_loss"] == pytest.approx(whole[STEPS]["val_loss"], rel=1e-6)
    assert [whole[s]["consumed_seqs"] for s in (1, STEPS)] == [4, 4 * STEPS]


def test_context_ranks_read_the_same_and_go_on_in_another_layout(folders, tmp_path):
    """Ranks that share sequences: the same order, losses and validation loss, with a ramp, masked documents and two resumes."""
    layouts = (Layout(context=4), Layout(context=2), Layout(pipeline=2, context=2))
    recipe = small_recipe(
        folders[0],
        SMALL,
        batch=Batch(seq_len=16, micro_seqs=1, global_seqs=4, ramp=((2, 2),)),
        steps=len(layouts),
        mask_documents=True,
        evaluation=Evaluation(every_steps=1, seqs=7),
        monitor=Monitor(activations_every_steps=1, drift_every_steps=1),
    )
    whole = run(recipe, 1, tmp_path / "alone")
    for step, layout in enumerate(layouts, 1):
        parts = run(replace(recipe, layouts={4: layout}), 4, tmp_path / "parts", resume=step > 1, max_steps=step)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    for step in whole:
        for name in ("val_loss", "activation_rms/max", "max_attention_logit/max"):
            assert parts[step][name] == pytest.approx(whole[step][name], rel=1e-5), (step, name)
        assert parts[step]["consumed_seqs"] == whole[step]["consumed_seqs"]
    assert_same_state(tmp_path / "alone", tmp_path / "parts", 1e-5)


def test_batch_ramp_in_two_layouts_and_over_a_resume(folders, tmp_path):
    batch = Batch(seq_len=16, micro_seqs=1, global_seqs=8, ramp=((4, 2), (12, 4)))
    recipe = small_recipe(folders[0], SMALL, steps=5, batch=batch, evaluation=Evaluation())
    whole = run(recipe, 1, tmp_path / "alone")
    assert [whole[step]["tokens"] // 16 for step in sorted(whole)] == [2, 2, 4, 4, 8]
    run(replace(recipe, layouts={2: Layout(pipeline=2)}), 2, tmp_path / "cut", max_steps=3)
    cut = run(replace(recipe, layouts={2: Layout()}), 2, tmp_path / "cut", resume=True)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-6)


def test_a_blend_with_masked_documents_in_two_layouts(folders, tmp_path):
    first, second = map(str, folders)
    recipe = small_recipe(
        folders[0],
        SMALL,
        layouts={1: Layout(), 2: Layout()},
        steps=3,
        mask_documents=True,
        evaluation=Evaluation(every_steps=3, seqs=4),
    )
    recipe = replace(recipe, data=Blend(weights={first: 3, second: 1}))
    whole = run(recipe, 1, tmp_path / "alone")
    cut = run(recipe, 2, tmp_path / "cut")
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-6)
    assert {"val_loss", "val_loss/first", "val_loss/second"} <= cut[3].keys()


def test_skipped_sequences_are_left_out_and_remembered(alone, tmp_path):
    recipe, run_dir, whole = alone
    out_dir = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    skipped = run(recipe, 1, out_dir, resume=True, resume_step=2, max_steps=4, skips=((8, 12),))
    # step 3 would have read sequences 8 to 11: it reads step 4's
    assert skipped[3]["loss"] != whole[3]["loss"]
    manifest = json.loads((out_dir / "run.json").read_text())
    assert manifest["starts"][-1]["skips"] == [[8, 12]]
    later = run(recipe, 2, out_dir, resume=True, max_steps=5)
    assert later[5]["consumed_seqs"] == 20
    assert json.loads((out_dir / "run.json").read_text())["starts"][-1]["skips"] == [[8, 12]]


def test_a_skip_of_what_was_read_is_refused(alone, tmp_path):
    recipe, run_dir, _ = alone
    out_dir = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    with pytest.raises(RankError, match=r"--skip 3:5: step 2 has read up to sequence 8"):
        run(recipe, 1, out_dir, resume=True, resume_step=2, skips=((3, 5),))


def test_steps_that_never_apply_end_the_run(folders, tmp_path):
    """Weights that a mad rate has thrown out of range: gradients overflow. Under bf16 DeepSpeed would die of an assertion."""
    recipe = small_recipe(
        folders[0],
        SMALL,
        steps=60,
        evaluation=Evaluation(),
        optimizer=AdamW(lr=1e25, clip=0.0),
        deepspeed="zero1_bf16.json",
        layouts={2: Layout(tensor=2)},
    )
    with pytest.raises(RankError, match=r"TrainingError: step 4: 3 steps in a row were not finite: (NaN|Infinity) .* first in"):
        run(recipe, 2, tmp_path)


def test_data_show_names_the_documents_of_a_step(tmp_path):
    """On prepared text: the text that `show` prints for a step is text of the files it names."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / f"{name}.txt").write_text("".join(f"{name} line {i} of the file {name}\n" for i in range(300)))
    data = tmp_path / "data"
    prepared = call("data", "prepare", text, "--train-tokenizer", 300, "--out", data, "--validation-fraction", 0.4)
    assert prepared.code == 0, prepared.err
    vocab = json.loads((data / "dataset.json").read_text())["vocab_size"]
    model = tiny_config("llama", num_hidden_layers=2, vocab_size=vocab)
    run(small_recipe(data, model, steps=2, evaluation=Evaluation()), 1, tmp_path / "run")
    shown = call("data", "show", tmp_path / "run", "--step", 2, "--json")
    assert shown.code == 0
    assert "line" in shown.out
    assert any(f"{name}.txt" in shown.out for name in ("a", "b", "c"))


def test_a_start_steps_over_what_is_damaged(alone, tmp_path, capfd):
    """Every file that a start reads beside the checkpoints, zeroed or cut: each is set aside by name, and the run is the same."""
    recipe, run_dir, straight = alone
    out_dir = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    metrics = out_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * len(lines[2]) + b"\n"  # of step 2: the first is of step 0
    metrics.write_bytes(b"".join(lines[:5]) + b'{"step": 5, "lo')
    for name in ("run.json", "recipe.json", "deepspeed.json"):
        (out_dir / name).write_bytes((out_dir / name).read_bytes()[:20])
    (out_dir / "timing/rank_00000.jsonl").open("ab").write(b"[5, 1")
    (out_dir / "events/step_00000001_spike").mkdir(parents=True)
    (out_dir / "events/step_00000001_spike/event.json").write_bytes(b"\0\0")
    resumed = run(recipe, 1, out_dir, resume=True, resume_step=4)
    assert [resumed[step]["loss"] for step in (1, 3, 4, 5, 6)] == [straight[step]["loss"] for step in (1, 3, 4, 5, 6)]
    told = capfd.readouterr().err
    for name in ("run.json is damaged", "recipe.json is damaged", "deepspeed.json is damaged", "damaged lines are now in"):
        assert name in told
