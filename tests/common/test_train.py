"""Whole runs: what is read, skipped, blended, masked and ramped, and what the run directory says about it afterwards."""

import json
import subprocess
import sys

import pytest

from recipes.common.recipe import AdamW, Batch, Blend, Checkpoints, Evaluation, Layout, Monitor
from tests.support.small_runs import assert_same_state, run
from tests.support.tiny import ROOT, tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import RankError

STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("first", "second")):
        write_shards(root / name, seed=seed, tokens=8_000)
    return root / "first", root / "second"


def losses(records):
    return [records[step]["loss"] for step in sorted(records)]


def test_every_layout_and_accumulation_reads_the_same(folders, tmp_path):
    recipe = tiny_recipe(folders[0], steps=STEPS, evaluation=Evaluation(every_steps=3, seqs=7))
    alone = run(recipe, 1, tmp_path / "alone")
    cut = run(recipe, 8, tmp_path / "cut")
    assert losses(cut) == pytest.approx(losses(alone), rel=1e-6)
    # 7 validation sequences fill no whole number of micro batches: each still counts once
    assert cut[STEPS]["val_loss"] == pytest.approx(alone[STEPS]["val_loss"], rel=1e-6)
    assert [alone[s]["consumed_seqs"] for s in (1, STEPS)] == [4, 4 * STEPS]


def test_context_ranks_read_the_same_and_go_on_in_another_layout(folders, tmp_path):
    """Ranks that share sequences: the same order, losses and validation loss, with a ramp, masked documents and two resumes."""
    batch = Batch(seq_len=16, micro_seqs=1, global_seqs=4, ramp=((4, 2),))
    recipe = tiny_recipe(
        folders[0],
        layouts={1: Layout(), 4: Layout(context=4), 8: Layout(pipeline=2, context=2)},
        batch=batch,
        steps=STEPS,
        mask_documents=True,
        evaluation=Evaluation(every_steps=2, seqs=7),
        checkpoints=Checkpoints(every_steps=2),
        monitor=Monitor(activations_every_steps=2, drift_every_steps=2),
    )
    alone = run(recipe, 1, tmp_path / "alone")
    for world, until in ((4, 2), (1, 4), (8, STEPS)):
        parts = run(recipe, world, tmp_path / "parts", resume=until > 2, max_steps=until)
    assert losses(parts) == pytest.approx(losses(alone), rel=1e-6)
    for step in (2, 4, STEPS):
        for name in ("val_loss", "activation_rms/max", "max_attention_logit/max"):
            assert parts[step][name] == pytest.approx(alone[step][name], rel=1e-5), (step, name)
        assert parts[step]["consumed_seqs"] == alone[step]["consumed_seqs"]
    assert_same_state(tmp_path / "alone", tmp_path / "parts", 1e-5)


def test_batch_ramp_in_two_layouts_and_over_a_resume(folders, tmp_path):
    batch = Batch(seq_len=16, micro_seqs=1, global_seqs=8, ramp=((8, 2), (20, 4)))
    recipe = tiny_recipe(folders[0], steps=10, batch=batch, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=5))
    alone = run(recipe, 1, tmp_path / "alone")
    assert [alone[step]["tokens"] // 16 for step in sorted(alone)] == [2, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    run(recipe, 4, tmp_path / "cut", max_steps=5)
    cut = run(recipe, 2, tmp_path / "cut", resume=True)
    assert losses(cut) == pytest.approx(losses(alone), rel=1e-6)


def test_a_blend_with_masked_documents_in_two_layouts(folders, tmp_path):
    first, second = map(str, folders)
    recipe = tiny_recipe(
        folders[0],
        data=Blend(weights={first: 3, second: 1}),
        steps=STEPS,
        mask_documents=True,
        evaluation=Evaluation(every_steps=STEPS, seqs=4),
    )
    alone = run(recipe, 1, tmp_path / "alone")
    cut = run(recipe, 4, tmp_path / "cut")
    assert losses(cut) == pytest.approx(losses(alone), rel=1e-6)
    assert {"val_loss", "val_loss/first", "val_loss/second"} <= cut[STEPS].keys()


def test_skipped_sequences_are_left_out_and_remembered(folders, tmp_path):
    recipe = tiny_recipe(folders[0], steps=STEPS, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2))
    straight = run(recipe, 2, tmp_path / "straight")
    run(recipe, 2, tmp_path / "run", max_steps=2)
    skipped = run(recipe, 2, tmp_path / "run", resume=True, max_steps=4, skips=((8, 12),))
    # step 3 would have read sequences 8 to 11: it reads step 4's
    assert skipped[3]["loss"] != straight[3]["loss"]
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["starts"][-1]["skips"] == [[8, 12]]
    later = run(recipe, 4, tmp_path / "run", resume=True)
    assert later[5]["consumed_seqs"] == 20
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]["skips"] == [[8, 12]]


def test_a_skip_of_what_was_read_is_refused(folders, tmp_path):
    recipe = tiny_recipe(folders[0], steps=STEPS, evaluation=Evaluation())
    run(recipe, 1, tmp_path, max_steps=2)
    with pytest.raises(RankError, match=r"--skip 3:5: step 2 has read up to sequence 8"):
        run(recipe, 1, tmp_path, resume=True, skips=((3, 5),))


@pytest.mark.parametrize(("ranks", "config"), [(1, "zero1_fp32.json"), (2, "zero1_bf16.json")])
def test_steps_that_never_apply_end_the_run(folders, tmp_path, ranks, config):
    """Weights that a mad rate has thrown out of range: gradients overflow. Under bf16 DeepSpeed would die of an assertion."""
    recipe = tiny_recipe(
        folders[0],
        steps=60,
        evaluation=Evaluation(),
        optimizer=AdamW(lr=1e25, clip=0.0),
        deepspeed=config,
        layouts={1: Layout(), 2: Layout(tensor=2)},
    )
    with pytest.raises(RankError, match=r"TrainingError: step 4: 3 steps in a row were not finite: (NaN|Infinity) .* first in"):
        run(recipe, ranks, tmp_path)


def test_data_show_names_the_documents_of_a_step(tmp_path):
    """On prepared text: the text that `show` prints for a step is text of the files it names."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / f"{name}.txt").write_text("".join(f"{name} line {i} of the file {name}\n" for i in range(300)))
    data = tmp_path / "data"
    prepare = [sys.executable, "-m", "tools.data", "prepare", str(text), "--train-tokenizer", "300", "--out", str(data)]
    subprocess.run([*prepare, "--validation-fraction", "0.4"], cwd=ROOT, check=True, capture_output=True)
    vocab = json.loads((data / "dataset.json").read_text())["vocab_size"]
    model = tiny_config("llama", vocab_size=vocab)
    num_params = 140_224 + 2 * 64 * (vocab - 131)
    recipe = tiny_recipe(data, model=model, num_params=num_params, steps=2, evaluation=Evaluation())
    run(recipe, 2, tmp_path / "run")
    shown = subprocess.run(
        [sys.executable, "-m", "tools.data", "show", str(tmp_path / "run"), "--step", "2", "--json"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "line" in shown.stdout
    assert any(f"{name}.txt" in shown.stdout for name in ("a", "b", "c"))


def test_a_start_steps_over_what_is_damaged(folders, tmp_path, capfd):
    """Every file that a start reads beside the checkpoints, zeroed or cut: each is set aside by name, and the run is the same."""
    recipe = tiny_recipe(folders[0], steps=STEPS, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2))
    straight = run(recipe, 1, tmp_path / "straight")
    out_dir = tmp_path / "run"
    run(recipe, 1, out_dir, max_steps=4)
    metrics = out_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(lines[0] + b"\0" * len(lines[1]) + b"\n" + b"".join(lines[2:]) + b'{"step": 5, "lo')
    for name in ("run.json", "recipe.json", "deepspeed.json"):
        (out_dir / name).write_bytes((out_dir / name).read_bytes()[:20])
    (out_dir / "timing/rank_00000.jsonl").open("ab").write(b"[5, 1")
    (out_dir / "events/step_00000001_spike").mkdir(parents=True)
    (out_dir / "events/step_00000001_spike/event.json").write_bytes(b"\0\0")
    resumed = run(recipe, 1, out_dir, resume=True)
    assert [resumed[step]["loss"] for step in (1, 3, 4, 5, 6)] == [straight[step]["loss"] for step in (1, 3, 4, 5, 6)]
    told = capfd.readouterr().err
    for name in ("run.json is damaged", "recipe.json is damaged", "deepspeed.json is damaged", "damaged lines are now in"):
        assert name in told
