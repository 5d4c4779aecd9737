"""What transformers would load of a folder is what from-hf imports; what it would not load is told in one message."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from recipes.common.checkpoint.reader import Reader
from recipes.common.config.model_sizes import size_problem
from tests.support.small_runs import call
from tests.support.tiny import tiny_config
from tools.checkpoint.from_hf import import_folder
from tools.checkpoint.hf_folder import open_folder
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks
from tools.common.hf_config import build_model, read_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 499723\n"
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": None}


def _save(config: PreTrainedConfig, folder: Path, seed: int, options: dict) -> None:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, **options)


def save(folder: Path, config: PreTrainedConfig | None = None, seed: int = 0, **options: object) -> None:
    run_ranks(_save, 1, config or tiny_config("llama"), folder, seed, options)


def _edit(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def imported(folder: Path, out: Path, *flags: object) -> tuple[dict, dict[str, np.ndarray]]:
    done = call("checkpoint", "from-hf", folder, out, "--json", *flags)
    assert done.code == 0, done.err
    reader = Reader(out / "checkpoints" / "latest")
    return done.json, {name: reader.whole(name, "master") for name in reader.names("master")}


def refused(folder: Path, *flags: object) -> str:
    done = call("checkpoint", "from-hf", folder, folder.with_name("refused"), *flags)
    assert done.code == 2 and done.err.startswith("error: "), (done.code, done.out, done.err)
    assert not folder.with_name("refused").exists()
    return done.err


def test_a_stale_index_beside_newer_weights_is_not_read(tmp_path):
    """transformers takes model.safetensors first, then its index, then the .bin files."""
    save(tmp_path / "new", seed=1)
    save(tmp_path / "old", seed=2, max_shard_size="40KB")
    for path in (tmp_path / "old").glob("*.index.json"):
        shutil.copyfile(path, tmp_path / "new" / path.name)
    (tmp_path / "new" / "pytorch_model.bin").write_bytes(b"old")
    done, found = imported(tmp_path / "new", tmp_path / "run")
    assert done["unread"] == ["model.safetensors.index.json", "pytorch_model.bin"]
    for name, array in run_ranks(_arrays, 1, tmp_path / "new" / "model.safetensors")[0].items():
        np.testing.assert_array_equal(found[name], array)


def _add_masks(tensors: dict, prefix: str, module: str) -> dict:
    for layer in range(2):
        place = f"{prefix}.h.{layer}.{module}"
        tensors[f"{place}.bias"] = torch.ones(1, 1, 16, 16).tril().bool()
        tensors[f"{place}.masked_bias"] = torch.tensor(-1e9)
    return tensors


def _with_masks(folder: Path, prefix: str, module: str) -> None:
    _edit(folder, lambda tensors: _add_masks(tensors, prefix, module))


FAMILIES = {
    "gpt2": (GPT2, "attn"),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "rotary_dim": 4, "n_inner": None}, "attn"),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
        "attn.attention",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_masks_of_old_files_are_stepped_over_with_a_word(tmp_path, family):
    fields, module = FAMILIES[family]
    save(tmp_path / "hf", tiny_config(family, **fields))
    expected = run_ranks(_arrays, 1, tmp_path / "hf" / "model.safetensors")[0]
    run_ranks(_with_masks, 1, tmp_path / "hf", "transformer", module)
    done, found = imported(tmp_path / "hf", tmp_path / "run")
    assert sorted(done["dropped"]) == sorted(
        f"transformer.h.{layer}.{module}.{leaf}" for layer in range(2) for leaf in ("bias", "masked_bias")
    )
    assert found.keys() <= expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


WRAPPERS = {
    "_orig_mod.": ["_orig_mod"],
    "module.": ["module"],
    "module._orig_mod.": ["module", "_orig_mod"],
    "base_model.model.": ["base_model"],
    "inside": ["_orig_mod"],  # torchtitan compiles each layer
}


def _wrapped(folder: Path, out: Path) -> dict[str, tuple[str, bool]]:
    """Return what is said of each kind of names, and whether the import with the cure has the right weights."""
    _save(tiny_config("llama"), folder, 0, {})
    expected, found = load_file(folder / "model.safetensors"), {}
    for how, parts in WRAPPERS.items():
        renamed = {
            name.replace("layers.0.", "layers.0._orig_mod.") if how == "inside" else how + name: t for name, t in expected.items()
        }
        save_file(renamed, folder / "model.safetensors")
        try:
            import_folder(folder, out / how)
            said = "nothing"
        except UsageError as error:
            said = str(error)
        reader = Reader(Path(import_folder(folder, out / how, strip=parts)["checkpoint"]))
        found[how] = said, all(np.array_equal(reader.whole(name, "master"), tensor.numpy()) for name, tensor in expected.items())
    return found


def test_what_other_programs_put_into_names_is_one_line_with_the_cure(tmp_path):
    for how, (said, same) in run_ranks(_wrapped, 1, tmp_path / "hf", tmp_path / "out")[0].items():
        flags = " ".join(f"--strip {part}" for part in WRAPPERS[how])
        assert "\n" not in said and said.endswith(f"take it out with {flags}"), said
        assert same, how


def _spoil(folder: Path) -> None:
    def change(tensors: dict) -> dict:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
        tensors["lm_head.weight"][1, 2] = 1e300  # infinite in fp32
        return tensors

    _edit(folder, change)


def test_weights_that_are_not_finite_are_named_and_nothing_is_kept(tmp_path):
    save(tmp_path / "hf")
    run_ranks(_spoil, 1, tmp_path / "hf")
    said = refused(tmp_path / "hf")
    assert "NaN or infinite weights in" in said and "model.norm.weight" in said and "lm_head.weight" in said


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 64}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}


def _save_multimodal(folder: Path) -> torch.Tensor:
    text = TEXT | {"model_type": "mistral", "head_dim": 8, "num_key_value_heads": 2}
    config = AutoConfig.for_model(  # tied by the outer config alone, as transformers' default has it
        "mistral3", text_config=text, vision_config=VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model(input_ids=torch.arange(16)[None]).logits.detach()


def _logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=torch.arange(16)[None]).logits.detach()


def test_the_command_for_a_multimodal_model_gives_its_text_model(tmp_path):
    expected = run_ranks(_save_multimodal, 1, tmp_path / "hf")[0]
    said = refused(tmp_path / "hf")
    assert "a multimodal model (mistral3), whose text model is a mistral: save that on its own" in said
    program, flag, code = shlex.split(said[said.index("python -c") :].replace("NEW", str(tmp_path / "text")))
    assert (program, flag) == ("python", "-c")
    run_ranks(exec, 1, code, {})
    assert torch.equal(run_ranks(_logits, 1, tmp_path / "text")[0], expected)


def test_a_multimodal_model_without_a_text_model_of_its_own_is_refused_in_words(tmp_path):
    content = {"model_type": "qwen2_5_vl", "text_config": TEXT | {"num_key_value_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    said = refused(tmp_path)
    assert "whose text model is a qwen2_5_vl_text, and transformers has no causal model of its own for that" in said


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


CONFIGS = [
    (LLAMA | {"num_hidden_layers": 10**8}, "num_hidden_layers=100000000: must be from 0 to 10000"),
    (LLAMA | {"num_hidden_layers": -1}, "num_hidden_layers=-1: must be from 0 to 10000"),
    ({"model_type": "gpt2", "n_layer": 1e300}, r"n_layer=1e\+300: must be"),
    ({"model_type": "llava", "text_config": LLAMA | {"num_hidden_layers": 10**8}}, "num_hidden_layers=100000000"),
    (LLAMA | {"hidden_size": "sixty"}, "transformers cannot read it: .*expected int, got str"),
    (LLAMA | {"hidden_size": -64}, "cannot build a causal model of it: RuntimeError"),
    (LLAMA | {"num_attention_heads": 0}, "transformers cannot .*ZeroDivision|integer division"),
    (LLAMA | {"hidden_size": 10**15}, "cannot build a causal model of it"),
    (LLAMA | {"dtype": "float7"}, "transformers cannot read it: .*float7"),
    (LLAMA | {"hidden_act": "evil"}, "cannot build a causal model of it: KeyError: 'evil'"),
    (LLAMA | {"model_type": ["llama"]}, "transformers cannot read it"),
    ({"model_type": "none of these"}, "transformers cannot read it"),
    ({"model_type": "t5"}, "cannot build a causal model of it"),
    (LLAMA | {"auto_map": {"AutoConfig": "evil.Evil"}}, r"brings code of its own \(auto_map in config.json\)"),
    ([], "holds list where an object belongs"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a":' * 900 + "1" + "}" * 900, "config.json"),
    ("", "it is empty"),
    (POINTER, "no JSON"),
]


def _config_problems(folder: Path) -> list[str]:
    folder.mkdir()
    said = []
    for content, _ in CONFIGS:
        (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        try:
            build_model(read_config(folder), folder)
            said.append("nothing")
        except UsageError as error:
            said.append(str(error))
    return said


def test_a_config_that_is_none_is_one_message(tmp_path):
    for (_, problem), said in zip(CONFIGS, run_ranks(_config_problems, 1, tmp_path / "hf")[0], strict=True):
        assert said.startswith(str(tmp_path)) and "\n" not in said and len(said) < 700 and re.search(problem, said), said


def test_code_in_a_folder_is_refused_and_not_run(tmp_path):
    save(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "hf" / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "brings code of its own (modeling_evil.py), which is never run" in refused(tmp_path / "hf")
    done = call("sample", tmp_path / "hf", "--data", tmp_path)
    assert done.code == 2 and "brings code of its own" in done.err
    (tmp_path / "hf" / "modeling_evil.py").unlink()
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    assert "(auto_map in tokenizer_config.json)" in refused(tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model: merge it" in refused(tmp_path / "hf")


def test_shards_that_are_missing_cut_or_pointers_are_named_together(tmp_path):
    save(tmp_path / "hf", max_shard_size="40KB")
    a, b, c, *_ = sorted((tmp_path / "hf").glob("*.safetensors"))
    a.unlink()
    b.write_bytes(b.read_bytes()[:-100])
    c.write_text(POINTER)
    said = refused(tmp_path / "hf")
    assert f"{a}: named by the index, but not there; fetch it again" in said
    assert f"{b}: not a whole safetensors file" in said
    assert f"{c}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull" in said


@pytest.mark.parametrize("weight_map", [{"a": "/etc/passwd"}, {"a": "../b/model.safetensors"}, {"a": 5}, {}, [], None, "x"])
def test_an_index_leads_to_no_other_place(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UsageError, match=r"names files outside the folder|not an index of weights"):
        open_folder(tmp_path)


def test_links_out_of_a_folder_are_refused_and_those_of_the_hub_cache_are_not(tmp_path):
    """The hub's cache holds snapshots/REVISION/FILE as links to blobs/HASH."""
    save(tmp_path / "hf")
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "hf").iterdir())):
        shutil.copyfile(path, cache / "blobs" / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    (tmp_path / "linked").symlink_to(snapshot)
    imported(tmp_path / "linked", tmp_path / "run")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        folder = tmp_path / f"of {name}"
        shutil.copytree(tmp_path / "hf", folder)
        (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "elsewhere")
        assert f"'{name}' is a link to {tmp_path / 'elsewhere'}, out of the folder" in refused(folder)


def _resident_after_reading(path: Path) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in open_folder(path).values():
        for first in range(0, source.shape[0], 4096):
            source.rows(first, min(first + 4096, source.shape[0])).sum()
        for _ in range(2):
            source.rows(0, 4096).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_a_file_is_not_held_in_memory(tmp_path):
    """A mapped file counts as memory, page by page; this one has 400 MB, most of it holes."""
    rows = 100_000
    header = {"a": {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, rows * 4000]}}
    text = json.dumps(header).encode().ljust(96)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * 4000)
    assert run_ranks(_resident_after_reading, 1, tmp_path)[0] < 100_000  # kB


def test_counts_at_any_depth_are_judged_and_other_numbers_are_not():
    assert (
        size_problem({"vocab_size": 10**9, "layer_norm_eps": 1e-6, "max_position_embeddings": 10**8, "num_experts": 16384}) == ""
    )
    assert (
        size_problem({"a": [{"text_config": {"num_local_experts": 10**9}}]})
        == "num_local_experts=1000000000: must be from 0 to 1000000"
    )


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"is no Hugging Face model folder: it has no config.json"):
        read_config(tmp_path)
