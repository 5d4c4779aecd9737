"""All that a resume or an export reads of a checkpoint is named in its seal, lies in it, and is what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.common.checkpoint.files import (
    CheckpointError,
    Part,
    damage,
    merge_index,
    read_seal,
    seal,
    unsealed,
    write_model_folder,
    write_rank_file,
)
from recipes.common.checkpoint.reader import Reader
from recipes.common.model.sharding import RankShard
from tests.support.hostile_json import one_message, variants

STATE = {
    "step": 3,
    "consumed_seqs": 12,
    "skipped_steps": 0,
    "optimizer_steps": 3,
    "loss_scaler": {},
    "world_size": 1,
    "skips": [],
}


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    data = np.arange(12, dtype=np.float32)
    report = write_rank_file(folder, 0, [Part("w", "master", (4, 3), RankShard(), 0, 12, data)])
    (folder / "index.json").write_text(json.dumps(merge_index([report])))
    (folder / "state.json").write_text(json.dumps(STATE))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    seal(folder, {report["file"]: report})
    return folder


def reseal(folder: Path) -> None:
    """As an attacker would: the seal is a checksum, not a signature."""
    (folder / "checksums.json").unlink()
    seal(folder, {})


@pytest.mark.parametrize("file", ["../out.safetensors", "/etc/passwd", "other.safetensors", "", 5])
def test_an_index_leads_to_sealed_files_alone(tmp_path, file):
    folder = write(tmp_path / "c")
    (tmp_path / "out.safetensors").write_bytes(bytes(1000))
    index = json.loads((folder / "index.json").read_text())
    index["tensors"]["w"]["kinds"]["master"]["parts"][0][0] = file
    (folder / "index.json").write_text(json.dumps(index))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"w is not described as a tensor is .*the seal does not name"):
        Reader(folder)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "linked"])
def test_a_seal_leads_to_files_in_its_folder_alone(tmp_path, name):
    folder = write(tmp_path / "c")
    (tmp_path / "out").write_text("")
    (folder / "linked").symlink_to("../out")
    content = json.loads((folder / "checksums.json").read_text())
    content["files"][name] = {"bytes": 0, "checksum": "xxh3_128:99aa06d3014798d86001c324468d497f"}
    (folder / "checksums.json").write_text(json.dumps(content))
    for act in (read_seal, Reader):
        with pytest.raises(CheckpointError, match=f"'{name}' (leads out of|is a link to .*, out of) the folder"):
            act(folder)
    assert len(damage(folder)) == 1


@pytest.mark.parametrize("name", ["index.json", "state.json"])
def test_the_seal_covers_what_is_read(tmp_path, name):
    folder = write(tmp_path / "c")
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(CheckpointError, match=rf"{name}: its content changed since it was written"):
        Reader(folder)
    content = json.loads((folder / "checksums.json").read_text())
    del content["files"][name]
    (folder / "checksums.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{name}: the seal does not name it"):
        Reader(folder)


def test_files_that_no_seal_names_are_reported_and_no_damage(tmp_path):
    folder = write(tmp_path / "c")
    assert unsealed(folder) == []
    (folder / "model" / "tokenizer.json").write_text("{}")
    (folder / "model" / ".nfs000001").write_text("")
    (folder / "evil.py").symlink_to("/etc/passwd")
    assert unsealed(folder) == ["evil.py", "model/tokenizer.json"]
    assert damage(folder) == []  # a resume reads none of them


def test_a_tokenizer_is_copied_as_files_and_alone(tmp_path):
    class Config:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "config.json").write_text("{}")

    (tmp_path / "hf").mkdir()
    for name in ("tokenizer_config.json", "model.safetensors", "modeling_evil.py", "config.json", "generation_config.json"):
        (tmp_path / "hf" / name).write_text(name)
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "hf" / "tokenizer.json").symlink_to("../blob")
    write_model_folder(tmp_path / "model", Config(), tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (tmp_path / "model" / "tokenizer.json").is_symlink()
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["checksums.json", "index.json", "state.json"])
def test_whatever_the_json_holds_there_is_one_message(tmp_path, name):
    folder = write(tmp_path / "c")
    whole = json.loads((folder / name).read_text())
    for raw in variants(whole, 150):
        (folder / name).write_bytes(raw)
        if name != "checksums.json":
            reseal(folder)
        assert all(len(line) < 2000 for line in damage(folder))
        try:
            reader = Reader(folder)
            for tensor in reader.names("master"):
                reader.shape(tensor)
        except CheckpointError as error:
            assert str(folder) in one_message(error)
