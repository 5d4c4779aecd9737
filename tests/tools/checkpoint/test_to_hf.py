"""to-hf writes what plain transformers would have saved, and publishes nothing incomplete or damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes.common.checkpoint.reader import Reader
from recipes.common.recipe import ROOT, Evaluation, Layout
from recipes.common.run_dir.lease import held
from tests.support.small_runs import call, call_file, small_recipe, train_run, write_data
from tests.support.tiny import VOCAB, tiny_config
from tools.checkpoint import hf_check, to_hf
from tools.checkpoint.hf_folder import open_folder
from tools.checkpoint.safetensors_writer import ShardsWriter, Tensor
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks

FAMILIES = {
    "llama": (Layout(tensor=2, pipeline=2), "llama", {}),
    "tied": (Layout(pipeline=2), "llama", {"tie_word_embeddings": True}),
    "renamed head": (Layout(tensor=2), "gpt_neox", {}),
    "experts": (Layout(tensor=2), "mixtral", {}),
    "Conv1D": (Layout(tensor=2), "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": None}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Return one checkpoint a family, saved in its layout when first asked for."""
    made = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            layout, family, fields = FAMILIES[name]
            recipe = small_recipe(data, tiny_config(family, num_hidden_layers=2, **fields), evaluation=Evaluation())
            made[name] = train_run(recipe, tmp_path_factory.mktemp("run"), layout, layout.tensor * layout.pipeline)
        return made[name]

    return checkpoint


def _saved_by_transformers(checkpoint: Path, folder: Path, ours: Path) -> tuple[dict[str, torch.Tensor], ...]:
    """Save the oracle: a plain model with the checkpoint's weights, by transformers itself. Return its tensors and ours."""
    from transformers import AutoConfig

    reader = Reader(checkpoint)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint / "model"), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(reader.whole(name, "master")))
    model.save_pretrained(folder)
    return tuple(load_file(each / "model.safetensors") for each in (folder, ours))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_equals_what_transformers_saves(runs, tmp_path, name):
    done = call("checkpoint", "to-hf", runs(name), tmp_path / "hf", "--json")
    assert done.code == 0, done.err
    assert done.json["verified"] and any("bit for bit" in line for line in done.json["checks"])
    expected, found = run_ranks(_saved_by_transformers, 1, runs(name), tmp_path / "oracle", tmp_path / "hf")[0]
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key].numpy(), expected[key].numpy(), err_msg=key)
    config, oracle = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "oracle"))
    assert config == oracle
    assert (tmp_path / "hf" / "generation_config.json").is_file() and (tmp_path / "hf" / "tokenizer.json").is_file()
    assert ("lm_head.weight" in found) == (name in ("llama", "experts", "Conv1D"))
    embedding = next(tensor for key, tensor in found.items() if "embed" in key or "wte" in key)
    assert embedding.shape[0] == VOCAB, "padding was exported"


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 19).unsqueeze(0)).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_and_dtypes(runs, tmp_path, dtype):
    done = call("checkpoint", "to-hf", runs("experts"), tmp_path / "hf", "--dtype", dtype, "--shard-size", "60KB", "--json")
    assert done.code == 0, done.err
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) == done.json["files"] > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert largest < 66_000 and index["metadata"]["total_size"] == done.json["bytes"]
    logits = run_ranks(_logits, 1, tmp_path / "hf")[0]
    assert str(logits.dtype) == f"torch.{dtype}" and logits.isfinite().all()
    assert any("rounding" in line for line in done.json["checks"])


def test_optimizer_states_are_not_needed(runs, tmp_path):
    """Check that only weights are read: a verified export works with every optimizer state overwritten."""
    import shutil

    folder = tmp_path / "c"
    shutil.copytree(runs("llama").resolve(), folder)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["tensors"].values():
        for kind, of_kind in entry["kinds"].items():
            for file, offset, _, start, stop, _ in of_kind["parts"] if kind != "master" else ():
                with (folder / file).open("r+b") as stream:
                    stream.seek(offset)
                    stream.write(b"\xff" * 4 * (stop - start))
    assert call("checkpoint", "to-hf", folder, tmp_path / "a").code == 0
    assert call("checkpoint", "to-hf", runs("llama"), tmp_path / "b").code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_runs_as_a_script_from_anywhere(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call_file(ROOT / "tools" / "checkpoint", "to-hf", runs("tied"), "out", "--no-verify")
    assert done.code == 0, done.err
    assert done.out.startswith("out: step 2, 20 tensors") and (tmp_path / "out" / "model.safetensors").is_file()


def test_damage_is_refused_by_name(runs, tmp_path):
    import shutil

    shutil.copytree(runs("llama").resolve(), tmp_path / "c")
    victim = tmp_path / "c" / "rank_00001.safetensors"
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    weights = [part for entry in index["tensors"].values() for part in entry["kinds"]["master"]["parts"]]
    content = bytearray(victim.read_bytes())
    content[next(offset for file, offset, *_ in weights if file == victim.name)] ^= 1  # an export reads weights alone
    victim.write_bytes(content)
    done = call("checkpoint", "to-hf", tmp_path / "c", tmp_path / "hf")
    assert done.code == 1 and str(victim) in done.err and "checksum" in done.err and "Traceback" not in done.err
    victim.write_bytes(content[:-4])
    done = call("checkpoint", "to-hf", tmp_path / "c", tmp_path / "hf", "--no-verify")
    assert done.code == 1 and str(victim) in done.err
    (tmp_path / "c" / "checksums.json").unlink()
    done = call("checkpoint", "to-hf", tmp_path / "c", tmp_path / "hf")
    assert done.code == 1 and "not a finished checkpoint" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"], "something half-made was left"


def test_mistakes_are_one_message(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    checkpoint = runs("llama")
    cases = [
        ([checkpoint, tmp_path / "full"], "exists already; delete it"),
        ([checkpoint, tmp_path / "full" / "x"], "exists already; delete it"),
        ([checkpoint, checkpoint / "index.json"], "where nothing but checkpoints may be; export to a folder outside"),
        ([checkpoint, checkpoint / "hf" / "deeper"], "where nothing but checkpoints may be; export to a folder outside"),
        ([checkpoint, checkpoint.parent / "step_00000007"], "where nothing but checkpoints may be; export to a folder outside"),
        ([checkpoint, "."], ".: the folder that you are in, or above it; give the name of a new one"),
        ([tmp_path / "nothing", tmp_path / "o"], "no such folder"),
        ([checkpoint.parent.parent, tmp_path / "o"], "is a run directory; give one of its checkpoints"),
        ([checkpoint, tmp_path / "o", "--shard-size", "5 bananas"], "--shard-size=5 bananas"),
        ([checkpoint, tmp_path / "o", "--dtype", "int8"], "invalid choice: 'int8'"),
    ]
    for arguments, message in cases:
        done = call("checkpoint", "to-hf", *arguments)
        assert done.code == 2 and message in done.err and not done.out, done
    (tmp_path / "empty").mkdir()
    with held(tmp_path / "empty", tmp_path, ".empty.lease", "an export"):
        done = call("checkpoint", "to-hf", checkpoint, tmp_path / "empty")
        assert (done.code, done.out) == (
            2,
            "",
        ) and f"{tmp_path / 'empty'} is in use by an export (process {os.getpid()}" in done.err
    assert call("checkpoint", "to-hf", checkpoint, tmp_path / "empty", "--no-verify").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def _export_wrongly(checkpoint: Path, out: Path, mistake: str) -> str:
    """Export with a planted mistake, which verification must find."""
    if mistake == "bytes":
        write = ShardsWriter.write

        def off_by_a_bit(self: ShardsWriter, name: str, block: np.ndarray) -> None:
            write(self, name, block)
            if "layers.1.mlp.up_proj" in name:
                os.pwrite(self._file.fileno(), b"\1\2\3\4", os.fstat(self._file.fileno()).st_size - 64)

        ShardsWriter.write = off_by_a_bit
    else:
        blocks = to_hf.row_blocks

        def wrong_rows(reader: Reader, name: str, kind: str):
            return ((b[::-1] if "layers.1.self_attn.q_proj" in name else b) for b in blocks(reader, name, kind))

        to_hf.row_blocks = wrong_rows
    try:
        to_hf.export(checkpoint, out, dtype="float32", shard_bytes=10**9)
    except to_hf.CheckError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("mistake", "message"), [("bytes", "layers.1.mlp.up_proj"), ("rows", "logits of the exported model differ")]
)
def test_verification_finds_a_wrong_export(runs, tmp_path, mistake, message):
    found = run_ranks(_export_wrongly, 1, runs("llama"), tmp_path / "hf", mistake)[0]
    assert message in found and not (tmp_path / "hf").exists()


def _export_rounded(checkpoint: Path, out: Path) -> str:
    theirs = hf_check._exported_logits
    hf_check._exported_logits = lambda *args: theirs(*args) * (1.0 + 2.0**-23)
    try:
        to_hf.export(checkpoint, out, dtype="float32", shard_bytes=10**9)
    except to_hf.CheckError as error:
        return str(error)
    return "nothing"


def test_logits_are_compared_bit_for_bit(runs, tmp_path):
    assert "logits of the exported model differ" in run_ranks(_export_rounded, 1, runs("llama"), tmp_path / "hf")[0]


def _places(checkpoint: Path, out: Path) -> set[int]:
    """Where the weights lie with which logits are computed, in bytes past a multiple of 64."""
    theirs, places = hf_check._logits, set()

    def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        places.update(parameter.data_ptr() % 64 for parameter in model.parameters())
        return theirs(model, ids)

    hf_check._logits = logits
    to_hf.export(checkpoint, out, dtype="float32", shard_bytes=10**9)
    return places


def test_logits_are_computed_with_weights_that_lie_as_in_training(runs, tmp_path):
    """Mapped from a file at any byte, Inkling 2's gave logits that a kernel had rounded otherwise."""
    assert run_ranks(_places, 1, runs("llama"), tmp_path / "hf")[0] == {0}


def _casts() -> None:
    values = np.array([1.0, 1.00390625, -3.1415927, 65504.0, 1e-8, 3.4e38, np.inf], dtype=np.float32)
    bits = to_hf.cast(values, "w", "bfloat16")
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(values).to(torch.bfloat16))
    half = to_hf.cast(np.array([65504.0, np.inf, np.nan], dtype=np.float32), "w", "float16")
    assert half[0] == 65504 and np.isinf(half[1]) and np.isnan(half[2])
    with pytest.raises(to_hf.CheckError, match="w has elements up to 7e"):
        to_hf.cast(np.array([70000.0], dtype=np.float32), "w", "float16")


def test_casts():
    run_ranks(_casts, 1)


def test_sizes():
    assert [to_hf.parse_size(text) for text in ("5GB", "1.5 kb", "7", "3B")] == [5 * 10**9, 1500, 7, 3]
    for text in ("0", "GB", "-1GB", "5K", "1PB"):
        with pytest.raises(UsageError, match="--shard-size"):
            to_hf.parse_size(text)


def test_safetensors_cut_short_or_changed_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    shards = {path.name: [Tensor("a", "F32", (2, 3)), Tensor("b", "BOOL", (3,))]}
    with ShardsWriter(tmp_path, shards) as writer:
        for row in np.arange(6, dtype=np.float32).reshape(2, 3):
            writer.write("a", row)
        writer.write("b", np.array([True, False, True]))
    whole = path.read_bytes()
    assert open_folder(tmp_path)["a"].shape == (2, 3)
    for broken in (
        whole[:-1],
        whole[:20],
        b"",
        whole + b"x",
        whole.replace(b"[2,3]", b"[2,4]"),
        whole.replace(b'"F32"', b'"F33"'),
    ):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match=f"{path.name}: not a whole safetensors file"):
            open_folder(tmp_path)
    with pytest.raises(AssertionError, match="not every tensor"), ShardsWriter(tmp_path, shards) as writer:
        writer.write("a", np.zeros((2, 3), dtype=np.float32))
