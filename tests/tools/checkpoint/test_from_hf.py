"""Any Hugging Face folder becomes a checkpoint from which any layout resumes, or all errors are reported together."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from recipes.common.checkpoint.files import damage
from recipes.common.checkpoint.reader import Reader
from recipes.common.recipe import Evaluation, Layout
from recipes.common.run_dir.metrics import read_metrics
from tests.support.small_runs import call, small_recipe, train_run, write_data
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks

FAMILIES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "renamed head": ("gpt_neox", {}),
    "experts": ("mixtral", {}),
    "Conv1D": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": None}),
    "buffers": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 4,
            "head_dim": 4,
        },
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


def config_of(name: str) -> PreTrainedConfig:
    family, fields = FAMILIES[name]
    return tiny_config(family, num_hidden_layers=3, **fields)


def _make(name: str, folder: Path, options: dict) -> dict[str, torch.Tensor]:
    """Save a folder by transformers; return the model's own tensors by name."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def make(name: str, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    return run_ranks(_make, 1, name, folder, options)[0]


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def check(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    assert damage(checkpoint) == []
    reader = Reader(checkpoint)
    assert reader.state["step"] == 0 and reader.kinds() <= {"master", "buffer"}
    assert set(reader.tensors) == set(expected) - ({"lm_head.weight"} if reader.state["tied"] else set())
    for name in reader.tensors:
        kind = "master" if "master" in reader.tensors[name]["kinds"] else "buffer"
        np.testing.assert_array_equal(reader.whole(name, kind), expected[name].numpy(), err_msg=name)


def _make_each(base: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: _make(name, base / name, {"max_shard_size": "40KB" if name != "llama" else "5GB"}) for name in FAMILIES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(name -> the model's own tensors, where the folders are, which no test changes)"""
    base = tmp_path_factory.mktemp("folders")
    return run_ranks(_make_each, 1, base)[0], base


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_kind_of_folder(folders, tmp_path, name):
    expected, source = folders[0][name], folders[1] / name
    done = call("checkpoint", "from-hf", source, tmp_path / "run", "--json")
    assert done.code == 0, done.err
    checkpoint = tmp_path / "run" / "checkpoints" / "latest"
    check(checkpoint, expected)
    assert done.json["tied"] == (name == "tied")
    assert ("buffer" in Reader(checkpoint).kinds()) == (name == "buffers")
    assert done.json["num_params"] == sum(
        np.prod(Reader(checkpoint).shape(n), dtype=int) for n in Reader(checkpoint).names("master")
    )
    back = call("checkpoint", "to-hf", checkpoint, tmp_path / "back", "--json")
    assert back.code == 0, back.err
    whole, found = run_ranks(lambda: [load_folder(folder) for folder in (source, tmp_path / "back")], 1)[0]
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[key].numpy(), whole[key].numpy()) for key in whole)


def _rewrite(source: Path, target: Path, how: str) -> None:
    """Write the same weights as other programs do."""
    tensors = load_file(source / "model.safetensors")
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    if how == "pytorch .bin":
        torch.save(tensors, target / "pytorch_model.bin")
    elif how == "two .bin files":
        names = sorted(tensors)
        halves = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, chosen in halves.items():
            torch.save({name: tensors[name] for name in chosen}, target / file)
        weight_map = {name: file for file, chosen in halves.items() for name in chosen}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif how == "no prefix":
        save_file({name.removeprefix("model."): t for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    elif how == "head stored too":
        head = tensors["model.embed_tokens.weight"].clone()
        old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
        save_file(tensors | {"lm_head.weight": head} | old, target / "model.safetensors")
    elif how == "only the head":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, target / "model.safetensors")
    elif how == "float64":
        save_file({name: tensor.double() for name, tensor in tensors.items()}, target / "model.safetensors")
    else:
        raise AssertionError(how)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """(the tensors of a tied model, its folder, which no test changes)"""
    folder = tmp_path_factory.mktemp("tied") / "hf"
    return make("tied", folder), folder


@pytest.mark.parametrize("how", ["pytorch .bin", "two .bin files", "no prefix", "head stored too", "only the head", "float64"])
def test_other_programs_folders(tied, tmp_path, how):
    expected, folder = tied
    run_ranks(_rewrite, 1, folder, tmp_path / "other", how)
    done = call("checkpoint", "from-hf", tmp_path / "other", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    check(tmp_path / "run" / "checkpoints" / "step_00000000", expected)
    assert len(done.json["dropped"]) == (3 if how == "head stored too" else 0)


def _names_of_the_model(folder: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_of("experts"), dtype=torch.float32)
    model.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def test_banks_of_experts_may_be_stored_as_the_model_holds_them(tmp_path):
    run_ranks(_names_of_the_model, 1, tmp_path / "hf")
    assert call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run").code == 0
    check(tmp_path / "run" / "checkpoints" / "latest", run_ranks(load_file, 1, tmp_path / "hf" / "model.safetensors")[0])


def test_bfloat16_becomes_fp32(tmp_path):
    expected = make("llama", tmp_path / "hf", dtype=torch.bfloat16)
    assert call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run").code == 0
    check(tmp_path / "run" / "checkpoints" / "latest", expected)


def _spoil(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 6)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].to(torch.int64)
    save_file(tensors, folder / "model.safetensors")


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    make("llama", tmp_path / "hf")
    run_ranks(_spoil, 1, tmp_path / "hf")
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run")
    assert done.code == 2 and "LlamaForCausalLM" in done.err
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight [96, 64]",
        "missing: model.norm.weight [64]",
        "wrong shape: model.layers.0.mlp.up_proj.weight is [5, 6], the config's model has [96, 64]",
        "unexpected: model.layers.9.mlp.up_proj.weight [2]",
        "not a float: model.layers.2.mlp.up_proj.weight",
    ):
        assert line in done.err
    assert not (tmp_path / "run").exists()


def _another_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1e-3
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    make("tied", tmp_path / "hf")
    run_ranks(_another_head, 1, tmp_path / "hf")
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run")
    assert done.code == 2 and "tied: lm_head.weight differs from model.embed_tokens.weight" in done.err


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_that_runs_code_does_not(tmp_path):
    make("llama", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": _Evil(str(tmp_path / "ran"))}))
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run")
    assert done.code == 2 and "not a file of plain tensors" in done.err and not (tmp_path / "ran").exists()


def test_mistakes_are_one_message(tmp_path):
    make("llama", tmp_path / "hf")
    assert "it has no config.json" in call("checkpoint", "from-hf", tmp_path, tmp_path / "run").err
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run", "--tokenizer", tmp_path)
    assert done.code == 2 and "no tokenizer files there" in done.err
    assert call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run").code == 0
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run")
    assert done.code == 2 and "is already a run, with 1 checkpoints" in done.err
    whole = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(whole[:-9])
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run2")
    assert done.code == 2 and "not a whole safetensors file" in done.err
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "no model.safetensors" in call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run2").err


def _stored_as(folder, change):
    """Store the weights of a model folder in a .bin file, changed."""
    path = folder / "model.safetensors"
    torch.save(change(load_file(path)), folder / "pytorch_model.bin")
    path.unlink()


def _with_first(weights, change):
    name = next(iter(weights))
    return weights | {name: change(weights[name])}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: _with_first(w, torch.Tensor.to_sparse), "is torch.sparse_coo; store it whole, with .to_dense()"),
        (lambda w: _with_first(w, lambda t: t.to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn; quantised weights cannot be"),
        (lambda w: w | {7: torch.ones(1)}, "holds no tensors by name"),
        (lambda w: {name: torch.nn.Parameter(tensor) for name, tensor in w.items()}, None),
    ],
)
def test_what_a_bin_file_may_hold(tmp_path, change, said):
    make("llama", tmp_path / "hf")
    _stored_as(tmp_path / "hf", change)
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run")
    assert done.code == (2 if said else 0), done.err
    assert (said or "") in done.err


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors' names other"),
        ("config.json", {"quantization_config": {}}, "quantization_config={} says how, but not what is quantised; take it out"),
        ("generation_config.json", [1], "cannot read generation_config.json: "),
        ("tokenizer.json", "{", "cannot read its tokenizer: "),
    ],
)
def test_a_folder_of_which_no_export_could_be_used_is_refused(tmp_path, file, content, said):
    make("llama", tmp_path / "hf")
    path = tmp_path / "hf" / file
    if isinstance(content, dict):
        content = json.loads(path.read_text()) | content
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    done = call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("name", "layout", "world"), [("tied", Layout(pipeline=2), 2), ("experts", Layout(tensor=2), 2)])
def test_training_goes_on_from_it(data, tmp_path, name, layout, world):
    """Check that the run's first loss is the folder's own in plain transformers, in a layout that nothing was saved in."""
    make(name, tmp_path / "hf")
    assert call("checkpoint", "from-hf", tmp_path / "hf", tmp_path / "run", "--tokenizer", data / "tokenizer").code == 0
    recipe = small_recipe(data, config_of(name), evaluation=Evaluation(every_steps=9, seqs=4))
    checkpoint = train_run(recipe, tmp_path / "run", layout, world, resume=True, steps=2)
    assert Reader(checkpoint).state["step"] == 2 and (checkpoint / "model" / "tokenizer.json").is_file()
    first = next(record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in record)
    assert first["step"] == 0
    shutil.copytree(data / "tokenizer", tmp_path / "hf", dirs_exist_ok=True)
    arguments = ["--data", data, "--seqs", 4, "--seq-len", 16, "--prompts", 0, "--json"]
    plain = call("sample", tmp_path / "hf", *arguments)
    assert plain.code == 0, plain.err
    assert first["val_loss"] == pytest.approx(plain.json["val_loss"], rel=1e-6)
