"""An error of a save, of any kind and on any rank, costs that save; without its last state on disk no run ends well."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import recipes.common.checkpoint.save_in_flight as save_in_flight
import recipes.common.checkpoint.saver as saver_module
from recipes.common.checkpoint.files import damage
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.saver import Saver
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.engine.build_trainer import build_recipe_trainer
from recipes.common.recipe import Checkpoints, Evaluation, derive_sizes
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from tests.support.small_runs import assert_same_state, run, train_on_rank
from tests.support.tiny import ds_config, tiny_recipe, write_shards
from tools.common.forked_ranks import RankError, run_ranks

# what is planted: (module, name, on rank, error)
FAULTS = {
    "a full disk on one rank": (save_in_flight, "write_rank_file", 1, OSError(28, "No space left on device")),
    "no memory in one rank's writer": (save_in_flight, "write_rank_file", 1, MemoryError("planted")),
    "an exit in a writer": (save_in_flight, "write_rank_file", 0, SystemExit(3)),
    "no memory for one rank's copy": (Saver, "_parts", 1, RuntimeError("can't allocate memory")),
    "a config that cannot be written": (save_in_flight, "write_model_folder", 0, ValueError("planted")),
    "an index that does not add up": (save_in_flight, "merge_index", 0, AssertionError("planted")),
    "no thread": (save_in_flight.threading.Thread, "start", 1, RuntimeError("can't start new thread")),
    "no thread to seal": (save_in_flight.threading.Thread, "start", 0, RuntimeError("can't start new thread")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_shards(folder)
    return folder


def test_an_error_of_any_kind_on_any_rank_fails_the_save_on_all_and_the_next_works(data, tmp_path, capfd):
    results = run_ranks(_fail_each_way, 2, tiny_recipe(data, evaluation=Evaluation()), str(tmp_path))
    assert results[0] == results[1]
    for (failure, saved), (_, _, rank, error) in zip(results[0], FAULTS.values(), strict=True):
        assert f"{type(error).__name__}: {error}" in failure
        assert f"rank {rank}: " in failure or failure.startswith("sealing: ")
        assert saved is None
    assert [folder.name for folder in sealed_checkpoints(tmp_path)] == ["step_00000099"]
    assert damage(sealed_checkpoints(tmp_path)[0]) == []
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


def _fail_each_way(recipe, out_dir):
    saver = _saver(recipe, out_dir)
    rank = int(os.environ["RANK"])
    results = []
    for step, (where, name, failing, error) in enumerate(FAULTS.values(), start=1):
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(where, name, lambda *args, error=error: _raise(error))
            saver.save(RunPosition(step=step))
            saver.finish()
        results.append((saver._failure, saver.last_saved))
    saver.save(RunPosition(step=99))
    saver.finish()
    assert saver.last_saved.name == "step_00000099"
    return results


def _saver(recipe, out_dir):
    sizes = derive_sizes(recipe, recipe.layouts[2], 2)
    config = merge_ds_config(ds_config(recipe.deepspeed), recipe, sizes, sizes.accumulation)
    trainer = build_recipe_trainer(recipe, recipe.layouts[2], config)
    return Saver(Path(out_dir), trainer, recipe, None)


def _raise(error):
    raise error


def test_a_failed_save_is_told_at_the_next_step_and_the_last_one_is_tried_again(data, tmp_path, capfd):
    """Rank 1 cannot write at steps 2 and 4, the last, where the second try works."""
    recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2), steps=4)
    run_ranks(_fail_at, 2, recipe, str(tmp_path / "run"))
    lines = capfd.readouterr().err.splitlines()
    told = [line for line in lines if "step_00000002 failed: rank 1: OSError: [Errno 30]" in line]
    assert len(told) == 1
    assert any("the last state, of step 4, is not on disk: trying again for 600 s" in line for line in lines)
    assert any("saved " in line and "step_00000004" in line for line in lines)
    run(recipe, 2, tmp_path / "straight")
    assert_same_state(tmp_path / "straight", tmp_path / "run", 0.0)


def _fail_at(recipe, out_dir):
    write, failed = save_in_flight.write_rank_file, []

    def refused(folder, rank, *rest):
        if rank == 1 and any(f"step_0000000{step}." in folder.name for step in (2, 4)) and folder.name[:14] not in failed:
            failed.append(folder.name[:14])
            raise OSError(30, "Read-only file system")
        return write(folder, rank, *rest)

    save_in_flight.write_rank_file = refused
    saver_module._FIRST_WAIT_SECONDS = 0.01
    _train(recipe, out_dir)


def _train(recipe, out_dir, ranks=2):
    train_on_rank(recipe, out_dir, recipe.layouts[ranks], ranks, False, recipe.steps)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_the_run_only_when_the_last_save_has_failed_for_long(data, tmp_path):
    """A real one, of 4 MB: it holds two checkpoints of 1.7 MB and not a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        checkpoints = Checkpoints(every_steps=1, keep_last=9, last_save_minutes=0.01)
        recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=checkpoints, steps=4)
        unsaved = r"UnsavedError: the last state, of step 4, is not on disk: \d saves failed .* No space left.*step_00000002"
        with pytest.raises(RankError, match=unsaved):
            run(recipe, 2, disk / "run")
        assert [int(folder.name[5:]) for folder in sealed_checkpoints(disk / "run")] == [1, 2]
        assert damage(disk / "run" / "checkpoints" / "latest") == []
        assert not list((disk / "run" / "checkpoints").glob(".*saving"))
        shutil.rmtree(sealed_checkpoints(disk / "run")[0])  # room for one more
        records = run(replace(recipe, checkpoints=replace(checkpoints, every_steps=4)), 2, disk / "run", resume=True)
        assert sorted(records) == [1, 2, 3, 4]
        assert [int(folder.name[5:]) for folder in sealed_checkpoints(disk / "run")] == [2, 4]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_run_that_lost_its_last_checkpoint_saves_it_again(data, tmp_path):
    """Another's `rm`, between the save and the end."""
    recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2, keep_last=9), steps=2)
    run_ranks(_lose_the_last, 2, recipe, str(tmp_path))
    assert [folder.name for folder in sealed_checkpoints(tmp_path)] == ["step_00000002"]


def _lose_the_last(recipe, out_dir):
    finish, lost = Saver.finish, []

    def losing(self):
        finish(self)
        if self.last_saved is not None and not lost and os.environ["RANK"] == "0":
            lost.append(shutil.rmtree(self.last_saved))

    Saver.finish = losing
    saver_module._FIRST_WAIT_SECONDS = 0.01
    _train(recipe, out_dir)


def test_what_the_run_did_not_write_is_not_deleted_and_what_cannot_be_deleted_is_told(data, tmp_path, capfd):
    recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=1, keep_last=1), steps=3)
    run(recipe, 1, tmp_path, max_steps=1)
    where = tmp_path / "checkpoints"
    kept = [where / name for name in (".best", "step_00000001.bak", "step_00000001 (copy)", "step_1")]
    for folder in kept:
        shutil.copytree(where / "step_00000001", folder)
    for name in (".step_00000007.saving", ".step_00000007.3.saving", ".step_00000000.deleting"):
        shutil.copytree(where / "step_00000001", where / name)
    os.rename(where / "step_00000001", where / ".step_00000001.replaced")  # killed between a replacement's two renames
    (where / "latest").unlink()
    shutil.copytree(where / ".best", where / "latest")  # a copy that followed the link
    saver_module.clear_interrupted(where)
    run(recipe, 1, tmp_path, resume=True)
    there = {path.name for path in where.iterdir()}
    assert there == {*(folder.name for folder in kept), "step_00000003", "latest", "latest.set_aside"}
    assert all(damage(folder) == [] for folder in [*kept, where / "latest", where / "latest.set_aside"])
    assert os.readlink(where / "latest") == "step_00000003"
    assert "was no link: it is latest.set_aside now" in capfd.readouterr().err


def test_checkpoints_that_stay_are_told_once_and_end_nothing(data, tmp_path, capfd):
    recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=1, keep_last=1), steps=4)
    run_ranks(_delete_nothing, 1, recipe, str(tmp_path))
    assert [int(folder.name[5:]) for folder in sealed_checkpoints(tmp_path)] == [4]
    told = capfd.readouterr().err
    assert told.count("step_00000001.deleting could not be deleted and stays: [Errno 16] Device or resource busy") == 1


def _delete_nothing(recipe, out_dir):
    from recipes.common.checkpoint import folders

    def busy(path, ignore_errors=False, onerror=None):
        if not ignore_errors:
            onerror(None, path, (OSError, OSError(16, "Device or resource busy"), None))

    folders.shutil.rmtree = busy
    _train(recipe, out_dir, 1)


def test_a_damaged_later_checkpoint_costs_no_good_one(data, tmp_path):
    """Going on from step 2 past a damaged 4 and 6: what is saved at 3 is kept, and the next start begins there."""
    recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2, keep_last=2), steps=6)
    run(replace(recipe, checkpoints=Checkpoints(every_steps=2)), 1, tmp_path)
    for step in (4, 6):
        (tmp_path / f"checkpoints/step_0000000{step}/state.json").write_text("{}")
    run(replace(recipe, checkpoints=Checkpoints(every_steps=1, keep_last=2)), 1, tmp_path, resume=True, max_steps=3)
    intact = [int(folder.name[5:]) for folder in sealed_checkpoints(tmp_path) if not damage(folder)]
    assert intact == [2, 3]
