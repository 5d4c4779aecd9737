"""A converted DeepSpeed checkpoint equals, bit for bit, the checkpoint that our run would have saved at that moment."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.common.checkpoint.files import damage
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.reader import Reader
from recipes.common.checkpoint.saver import Saver
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.data.batches import step_micro_batches
from recipes.common.data.shards import open_split
from recipes.common.recipe import Evaluation, Layout, Recipe, derive_sizes
from recipes.common.run_dir.metrics import read_metrics
from tests.support.small_runs import call, call_each, small_recipe, train_run, write_data
from tests.support.tiny import ds_config, tiny_config
from tools.checkpoint import deepspeed_files
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks

# layout, world size, ds_config, family, fields
CASES = {
    "pipeline 2, tensor 2": (Layout(tensor=2, pipeline=2), 4, "zero1_fp32.json", "llama", {}),
    "two stages in bf16, tied": (Layout(pipeline=2), 2, "zero1_bf16.json", "llama", {"tie_word_embeddings": True}),
    "pipeline 3": (Layout(pipeline=3), 3, "zero1_fp32.json", "llama", {"num_hidden_layers": 4}),
    "tensor 4 over 2 key heads": (Layout(tensor=4), 4, "zero1_fp32.json", "llama", {}),
    "packed q, k, v; ZeRO 2": (Layout(tensor=2), 4, "zero2_fp32.json", "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "experts": (Layout(tensor=2), 2, "zero1_fp32.json", "mixtral", {}),
    "ZeRO 3": (Layout(tensor=2), 2, "zero3_fp32.json", "llama", {}),
    "ZeRO 3 in bf16, tied": (Layout(), 3, "zero3_bf16.json", "llama", {"tie_word_embeddings": True, "hidden_size": 60}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


def _both(recipe: Recipe, out: Path, layout: Layout, world: int) -> None:
    """Train two steps, save DeepSpeed's checkpoint and ours, and train on: our run is the oracle."""
    from recipes.common.engine.build_trainer import build_recipe_trainer

    sizes = derive_sizes(recipe, layout, world)
    merged = merge_ds_config(ds_config(recipe.deepspeed), recipe, sizes, sizes.accumulation)
    trainer = build_recipe_trainer(recipe, layout, merged)
    grid = trainer.grid
    stream, seqs = open_split(Path(recipe.data), "train", recipe.batch.seq_len), recipe.batch.global_seqs
    place = {"micro_seqs": recipe.batch.micro_seqs, "data_rank": grid.data_rank, "data_size": grid.data}
    for step in range(2):
        batch = step_micro_batches(stream, seed=0, consumed=seqs * step, global_seqs=seqs, **place)
        trainer.train_step(batch, 1e-3, seqs * recipe.batch.seq_len)
    trainer.engine.save_checkpoint(str(out / "theirs"), tag="global_step2")
    saver = Saver(out / "ours", trainer, recipe, None)
    saver.save(RunPosition(step=2, consumed_seqs=2 * seqs))
    saver.finish()


def _both_of_each(cases: list[tuple[Recipe, Path, Layout, int]]) -> None:
    for case in cases:
        _both(*case)


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Path]]:
    """Case -> (recipe, folder of both checkpoints); those of as many ranks are trained in one start. No test writes there."""
    made = {name: (_recipe_of(data, name), tmp_path_factory.mktemp("saved")) for name in CASES}
    for size in {world for _, world, *_ in CASES.values()}:
        some = [name for name in CASES if CASES[name][1] == size]
        run_ranks(_both_of_each, size, [(*made[name], CASES[name][0], size) for name in some])
    return made


def _recipe_of(data: Path, name: str) -> Recipe:
    _, world, config, family, fields = CASES[name]
    model = tiny_config(family, **{"num_hidden_layers": 2, **fields})
    recipe = small_recipe(data, model, deepspeed=config, evaluation=Evaluation())
    return replace(recipe, batch=replace(recipe.batch, global_seqs=6)) if world == 3 else recipe


def assert_equal(ours: Path, converted: Path) -> None:
    a, b = Reader(ours), Reader(converted)
    assert damage(converted) == []
    assert set(a.tensors) == set(b.tensors)
    for name in a.tensors:
        assert a.tensors[name]["kinds"].keys() == b.tensors[name]["kinds"].keys() and a.shape(name) == b.shape(name)
        for kind in a.tensors[name]["kinds"]:
            np.testing.assert_array_equal(a.whole(name, kind), b.whole(name, kind), err_msg=f"{kind} {name}")
    for key in ("step", "consumed_seqs", "optimizer_steps", "skipped_steps", "tied", "loss_scaler"):
        assert a.state[key] == b.state[key], key


@pytest.mark.parametrize("name", list(CASES))
def test_equals_our_own_checkpoint_bit_for_bit(saved, tmp_path, name):
    _, folder = saved[name]
    ours = folder / "ours" / "checkpoints" / "latest"
    done = call("checkpoint", "from-deepspeed", folder / "theirs", tmp_path / "run", "--model", ours / "model", "--json")
    assert done.code == 0, done.err
    assert_equal(ours, tmp_path / "run" / "checkpoints" / "latest")
    layout, world, *_ = CASES[name]
    data_size = world // (layout.tensor * layout.pipeline)
    assert (done.json["pipeline"], done.json["tensor"], done.json["data"]) == (layout.pipeline, layout.tensor, data_size)
    assert (tmp_path / "run" / "checkpoints" / "latest" / "model" / "tokenizer.json").is_file()


def test_training_goes_on_from_it_as_from_ours(saved, tmp_path):
    recipe, folder = saved["pipeline 2, tensor 2"]
    shutil.copytree(folder / "ours", tmp_path / "ours", symlinks=True)
    theirs, model = folder / "theirs" / "global_step2", folder / "ours" / "checkpoints" / "latest" / "model"
    assert call("checkpoint", "from-deepspeed", theirs, tmp_path / "run", "--model", model).code == 0
    losses = []
    for out in (tmp_path / "ours", tmp_path / "run"):
        train_run(recipe, out, Layout(tensor=2), 2, resume=True, steps=4)
        losses.append([(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(out / "metrics.jsonl") if "loss" in r])
    assert losses[0] == losses[1] and [step for step, *_ in losses[0]] == [3, 4]


def _plain_hf(out: Path) -> dict[str, torch.Tensor]:
    """Save as a user of plain DeepSpeed would: a Hugging Face model, ZeRO 1; also converted to a universal checkpoint."""
    import deepspeed
    from deepspeed.checkpoint import ds_to_universal

    from recipes.common.engine.startup import start_distributed

    start_distributed("cpu")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32)
    model.config.save_pretrained(out / "hf")
    model.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}
    config = {**ds_config("zero1_fp32.json"), "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    ids = torch.arange(3, 19).unsqueeze(0)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(out / "plain"), tag="global_step2")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _to_universal(ds_to_universal, out / "plain" / "global_step2", out / "universal" / "global_step2_universal")
        (out / "universal" / "latest_universal").write_text("global_step2_universal")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _to_universal(module, source: Path, target: Path) -> None:
    from argparse import Namespace

    options = {"keep_temp_folder": False, "strict": True, "inject_missing_state": False}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    module.main(Namespace(input_folder=str(source), output_folder=str(target), **options, **workers))


@pytest.fixture(scope="module")
def plain_hf(tmp_path_factory):
    """(the model's tensors, the folder of what was saved)"""
    folder = tmp_path_factory.mktemp("plain_hf")
    return run_ranks(_plain_hf, 2, folder)[0], folder


def test_a_plain_hugging_face_model_and_its_universal_checkpoint(plain_hf, tmp_path):
    expected, folder = plain_hf
    for kind in ("plain", "universal"):
        done = call("checkpoint", "from-deepspeed", folder / kind, tmp_path / f"run_{kind}", "--model", folder / "hf", "--json")
        assert done.code == 0, done.err
        reader = Reader(tmp_path / f"run_{kind}" / "checkpoints" / "latest")
        assert set(reader.names("master")) == set(expected) and reader.state["optimizer_steps"] == 2
        for name, tensor in expected.items():
            np.testing.assert_array_equal(reader.whole(name, "master"), tensor.numpy())
        assert reader.kinds() == {"master", "exp_avg", "exp_avg_sq"}
    assert done.json["universal"]
    both = [tmp_path / f"run_{kind}" / "checkpoints" / "latest" for kind in ("plain", "universal")]
    assert_equal(*both)


def test_padded_vocabularies_of_universal_checkpoints_lose_their_padding(plain_hf, tmp_path):
    shutil.copytree(plain_hf[1], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "universal" / "global_step2_universal" / "zero" / "lm_head.weight"
    run_ranks(_pad, 1, folder)
    assert call("checkpoint", "from-deepspeed", tmp_path / "universal", tmp_path / "run", "--model", tmp_path / "hf").code == 0
    assert call("checkpoint", "from-deepspeed", tmp_path / "plain", tmp_path / "run2", "--model", tmp_path / "hf").code == 0
    assert_equal(tmp_path / "run2" / "checkpoints" / "latest", tmp_path / "run" / "checkpoints" / "latest")


def _pad(folder: Path) -> None:
    for path in folder.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        if path.stem != "step":
            content["param"] = torch.cat([content["param"].detach(), torch.full((5, 64), 9.0)])
            torch.save(content, path)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _save_evil(path: Path, ran: Path) -> None:
    content = torch.load(path, weights_only=False)
    torch.save(content | {"client_state": _Evil(ran)}, path)


def _scaler(path: Path) -> dict:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    torch.save({"s": DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False)}, path)
    return dict(vars(deepspeed_files.load(path)["s"]))


def test_nothing_of_a_pickle_runs(saved, tmp_path):
    _, folder = saved["pipeline 3"]
    source = folder / "theirs" / "global_step2"
    ours = folder / "ours" / "checkpoints" / "latest"
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_02_optim_states.pt"):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(source, tmp_path / "bad")
        run_ranks(_save_evil, 1, tmp_path / "bad" / name, tmp_path / "ran")
        done = call("checkpoint", "from-deepspeed", tmp_path / "bad", tmp_path / "run", "--model", ours / "model")
        assert done.code == 2 and name in done.err and "not loaded" in done.err and "mkdir" in done.err, done
        assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    (tmp_path / "bad" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    assert call("checkpoint", "from-deepspeed", tmp_path / "bad", tmp_path / "run", "--model", ours / "model").code == 2
    assert not (tmp_path / "ran").exists()
    values = run_ranks(_scaler, 1, tmp_path / "scaler.pt")[0]
    assert values["cur_scale"] == 2.0**16 and values["dynamic"] is True


def test_what_is_not_known_is_refused_with_what_was_found(saved, tmp_path):
    _, folder = saved["pipeline 3"]
    source, model = folder / "theirs" / "global_step2", folder / "ours" / "checkpoints" / "latest" / "model"

    def refused(*arguments: object) -> str:
        done = call("checkpoint", "from-deepspeed", *arguments)
        assert done.code == 2 and not done.out and not (tmp_path / "run").exists(), done
        return done.err

    assert "Hugging Face folder with --model" in refused(source, tmp_path / "run")
    assert "no such folder" in refused(tmp_path / "nothing", tmp_path / "run", "--model", model)
    assert "found config.json" in refused(model, tmp_path / "run", "--model", model)
    shutil.copytree(source, tmp_path / "part")
    (tmp_path / "part" / "zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    assert "no file of data rank 0 of mp_rank 1" in refused(tmp_path / "part", tmp_path / "run", "--model", model)
    other = tiny_config("llama", num_hidden_layers=5, intermediate_size=80)
    other.save_pretrained(tmp_path / "other")
    text = refused(source, tmp_path / "run", "--model", tmp_path / "other")
    assert "missing: model.layers.4.mlp.up_proj.weight [80, 64]" in text and "... and" in text
    assert "wrong shape: 0.causal.model.layers.0.mlp.gate_proj.weight is [96, 64], the config's model has [80, 64]" in text
    tiny_config("gpt2", n_embd=64, n_layer=4, n_head=4).save_pretrained(tmp_path / "gpt2")
    assert "unexpected: 0.causal.model.embed_tokens.weight [131, 64]" in refused(
        source, tmp_path / "run", "--model", tmp_path / "gpt2"
    )


def test_a_file_cut_short_is_named(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK\3\4 not really")
    with pytest.raises(UsageError, match=r"x\.pt: not a file of tensors that is safe to load"):
        deepspeed_files.load(tmp_path / "x.pt")


def _damage(folder: Path, name: str) -> None:
    """Change a checkpoint of four optimizer files as `name` says."""
    optimizer, model = folder / "zero_pp_rank_0_mp_rank_02_optim_states.pt", folder / "mp_rank_01_model_states.pt"
    content = {path: torch.load(path, weights_only=False) for path in (optimizer, model)}
    zero = content[optimizer]["optimizer_state_dict"]
    adam = zero["base_optimizer_state"]["state"][0]
    flats, addresses = zero["single_partition_of_fp32_groups"], zero["param_slice_mappings"][0]
    match name:
        case "another save's model file":
            content[model] |= {"global_steps": 7, "dp_world_size": 2}
        case "counts of another kind":
            content[model] |= {"global_steps": None, "skipped_steps": -1, "dp_world_size": "1", "param_shapes": [{"a": "xy"}]}
        case "another save's optimizer file":
            for entry in zero["base_optimizer_state"]["state"].values():
                entry["step"] = torch.tensor(7.0)
        case "a step that is no number":
            adam["step"] = torch.tensor(float("nan"))
        case "a moment cut short":
            adam["exp_avg"] = adam["exp_avg"][:-3]
        case "a parameter under another name":
            addresses["bogus.weight"] = addresses.pop("1.causal.lm_head.weight")
        case "whole numbers":
            flats[0], adam["exp_avg"] = flats[0].long(), adam["exp_avg"].long()
        case "infinite weights":
            flats[0] = flats[0].detach() / 0
        case "frozen parameters":
            content[model]["frozen_param_shapes"] = {"x": (1,)}
    for path, value in content.items():
        torch.save(value, path)
    if name == "two files of a rank":
        shutil.copy(optimizer, folder / f"bf16_{optimizer.name}")
    if name == "flipped bits":
        raw = bytearray(optimizer.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        optimizer.write_bytes(raw)
    if name == "zeros":
        optimizer.write_bytes(bytes(optimizer.stat().st_size))


def _damage_all(folders: list[Path]) -> None:
    for folder in folders:
        _damage(folder, folder.name)


_MODEL, _OPTIMIZER = "{folder}/mp_rank_01_model_states.pt", "{folder}/zero_pp_rank_0_mp_rank_02_optim_states.pt"
_LAID_OUT = f"{_OPTIMIZER}: not laid out as DeepSpeed's ZeRO stage 1 "
_DAMAGED = "{folder} is damaged, or holds files of two saves:\n  "
DAMAGES = {
    "another save's model file": "{folder} holds files of two saves: mp_rank_00_model_states.pt of dp_world_size=1, "
    "global_steps=2 and mp_rank_01_model_states.pt of dp_world_size=2, global_steps=7; give a folder that one save wrote whole",
    "counts of another kind": f"{_MODEL}: DeepSpeed did not write it so, or it is damaged: dp_world_size='1' must be a whole "
    "number from 1; global_steps=None must be a whole number from 0; skipped_steps=-1 must be a whole number from 0; "
    "param_shapes must be a list of a shape for each name",
    "another save's optimizer file": f"{_DAMAGED}{_OPTIMIZER} is of optimizer step 7, "
    "zero_pp_rank_0_mp_rank_00_optim_states.pt of 2\n",
    "a step that is no number": f"{_LAID_OUT}(ValueError('step=nan must be a whole number from 0'))",
    "a moment cut short": f"{_LAID_OUT}(ValueError('exp_avg is [19581], the weights beside it [19584]'))",
    "a parameter under another name": f"{_DAMAGED}the optimizer files of mp_rank 2 hold 0 elements of 1.causal.lm_head.weight, "
    "its model file has 4224\n  the optimizer files of mp_rank 2 hold 4224 elements of bogus.weight, its model file has 0",
    "whole numbers": f"{_DAMAGED}{_OPTIMIZER}: master of 1.causal.model.layers.1.self_attn.q_proj.weight is torch.int64, "
    "no floating-point numbers\n  ",
    "infinite weights": "{folder}: NaN or infinite numbers in master lm_head.weight",
    "frozen parameters": "{folder}: 1 frozen parameters; only fully trained models can be converted",
    "two files of a rank": "{folder} holds files of two saves: bf16_zero_pp_rank_0_mp_rank_02_optim_states.pt and "
    "zero_pp_rank_0_mp_rank_02_optim_states.pt are of one rank; remove the other save's",
    "flipped bits": f"{_OPTIMIZER}: damaged, ",
    "zeros": f"{_OPTIMIZER}: not a file of tensors that is safe to load (no zip as torch.save writes it: empty, cut short or "
    "damaged); it was not loaded",
}


def test_what_one_save_did_not_write_whole_is_refused_before_anything_is_kept(saved, tmp_path):
    _, folder = saved["pipeline 2, tensor 2"]
    model = folder / "ours" / "checkpoints" / "latest" / "model"
    folders = [shutil.copytree(folder / "theirs" / "global_step2", tmp_path / name) for name in DAMAGES]
    run_ranks(_damage_all, 1, folders)
    done = call_each("checkpoint", [["from-deepspeed", each, tmp_path / "run", "--model", model] for each in folders])
    for (name, message), each in zip(DAMAGES.items(), done, strict=True):
        wanted = "error: " + message.replace("{folder}", str(tmp_path / name))
        assert (each.code, each.out, each.err[: len(wanted)]) == (2, "", wanted), name
        assert not (tmp_path / "run" / "checkpoints").exists(), name


def _damage_universal(folders: list[Path]) -> None:
    for folder in folders:
        head = folder / "zero" / "lm_head.weight"
        match folder.name:
            case "no moment":
                (head / "exp_avg.pt").unlink()
            case "no step":
                (head / "step.pt").unlink()
            case "no steps at all":
                for path in folder.glob("zero/*/step.pt"):
                    path.unlink()
            case "steps":
                torch.save([1, 2], head / "step.pt")
            case "a scalar":
                torch.save({"param": torch.tensor(1.0)}, head / "fp32.pt")


DAMAGES_OF_UNIVERSAL = {
    "no moment": "/zero/model.embed_tokens.weight: model.embed_tokens.weight has exp_avg, exp_avg_sq, master, another parameter "
    "exp_avg_sq, master\n",
    "no step": "/zero/lm_head.weight: it has Adam's moments and no step\n",
    "no steps at all": "/zero/lm_head.weight: it has Adam's moments and no step\n",
    "steps": "/zero/lm_head.weight/step.pt: step=[1, 2] must be a whole number from 0\n",
    "a scalar": "/zero/lm_head.weight: master is [], the config's model has [131, 64]\n",
}


def test_universal_checkpoints_of_unequal_parameters_are_refused(plain_hf, tmp_path):
    source = plain_hf[1] / "universal" / "global_step2_universal"
    folders = [shutil.copytree(source, tmp_path / name) for name in DAMAGES_OF_UNIVERSAL]
    run_ranks(_damage_universal, 1, folders)
    calls = [["from-deepspeed", each, tmp_path / "run", "--model", plain_hf[1] / "hf"] for each in folders]
    for (name, message), each in zip(DAMAGES_OF_UNIVERSAL.items(), call_each("checkpoint", calls), strict=True):
        assert (each.code, each.out) == (2, ""), name
        assert f"{tmp_path / name}{message}" in each.err, each.err
        assert not (tmp_path / "run").exists()


def test_a_tokenizer_folder_without_one_is_refused(plain_hf, tmp_path):
    calls = [
        "from-deepspeed",
        plain_hf[1] / "plain",
        tmp_path / "run",
        "--model",
        plain_hf[1] / "hf",
        "--tokenizer",
        tmp_path / "x",
    ]
    done = call("checkpoint", *calls)
    assert (done.code, done.err) == (2, f"error: --tokenizer={tmp_path / 'x'}: no tokenizer files there\n")
    assert not (tmp_path / "run").exists()
