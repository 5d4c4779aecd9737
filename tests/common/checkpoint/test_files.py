"""The format on disk: any sharding, written in any fragments, is read back as any other; damage is found; nothing is a pickle."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from recipes.common.checkpoint.files import CheckpointError, Part, damage, merge_index, seal, write_rank_file
from recipes.common.checkpoint.reader import Reader
from recipes.common.model.sharding import RankShard, ShardSpec, rank_shard

STATE = {"step": 3, "consumed_seqs": 12, "skipped_steps": 0, "optimizer_steps": 3, "loss_scaler": {}, "tied": False}


def take(whole: np.ndarray, spec: ShardSpec | None, rank: int, size: int) -> np.ndarray:
    """A tensor rank's shard, padded with zeros: what ShardSpec.take gives, in numpy."""
    if spec is None:
        return whole
    shape = list(whole.shape)
    shape[spec.dim] = spec.local_length(whole.shape[spec.dim], size)
    shard = np.zeros(shape, dtype=whole.dtype)
    for local_start, global_start, count in spec.ranges(whole.shape[spec.dim], rank, size):
        into = (slice(None),) * spec.dim + (slice(local_start, local_start + count),)
        source = (slice(None),) * spec.dim + (slice(global_start, global_start + count),)
        shard[into] = whole[source]
    return shard


def random_spec(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> ShardSpec | None:
    """A sharding that a plan may ask for: only whole rows of one pack may need padding."""
    options: list[ShardSpec | None] = [None]
    if shape:
        options.append(ShardSpec(0))
    for dim, length in enumerate(shape):
        options += [ShardSpec(dim, packs) for packs in (1, 2, 3) if length % (packs * size) == 0]
    return options[rng.integers(len(options))]


def random_fragments(rng: np.random.Generator, total: int, ranks: int) -> list[tuple[int, int, int]]:
    """(data rank, start, stop) that tile [0, total); some ranks have nothing."""
    bounds = sorted({0, total, *rng.integers(0, total + 1, ranks - 1).tolist()})
    return [(int(rng.integers(ranks)), a, b) for a, b in pairwise(bounds)]


def write(folder: Path, tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """A sealed checkpoint of `tensors` (name -> whole), each as master and exp_avg, under random shardings and data splits."""
    folder.mkdir(parents=True)
    size, data = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    parts: list[list[Part]] = [[] for _ in range(size * data)]
    for name, whole in tensors.items():
        spec = random_spec(rng, whole.shape, size) if size > 1 else None
        for kind, values in (("master", whole), ("exp_avg", -whole)):
            for tensor_rank in range(size if spec else 1):
                shard = rank_shard(spec, tensor_rank, size)
                flat = take(values, spec, tensor_rank, size).reshape(-1)
                for data_rank, start, stop in random_fragments(rng, shard.stored_elements(whole.shape), data):
                    part = Part(name, kind, whole.shape, shard, start, stop, flat[start:stop])
                    owner = parts[data_rank * size + tensor_rank]
                    if not any((p.name, p.kind) == (name, kind) for p in owner):
                        owner.append(part)
                    else:  # a rank has one fragment of a parameter: give this one to a rank of its own
                        parts.append([part])
    reports = [write_rank_file(folder, rank, mine) for rank, mine in enumerate(parts)]
    (folder / "index.json").write_text(json.dumps(merge_index(reports)))
    (folder / "state.json").write_text(json.dumps(STATE))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    seal(folder, {report["file"]: report for report in reports})


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = [(), (1,), (7,), (24,), (131, 5), (24, 12), (12, 24), (4, 12, 24), (13, 2, 3)]
    return {f"layers.{i}.w": rng.standard_normal(shape, dtype=np.float32) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("seed", range(12))
def test_every_part_reads_back_whatever_the_sharding(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = random_tensors(rng)
    write(tmp_path / "c", tensors, rng)
    assert damage(tmp_path / "c") == []
    reader = Reader(tmp_path / "c")
    assert set(reader.names("master")) == set(tensors) and reader.kinds() == {"master", "exp_avg"}
    for name, whole in tensors.items():
        assert reader.shape(name) == whole.shape
        for kind, values in (("master", whole), ("exp_avg", -whole)):
            np.testing.assert_array_equal(reader.whole(name, kind), values)
            if not whole.shape:
                continue
            first, last = sorted(rng.integers(0, whole.shape[0] + 1, 2).tolist())
            np.testing.assert_array_equal(reader.rows(name, kind, first, last), values[first:last])
            size = int(rng.integers(1, 6))
            spec = random_spec(rng, whole.shape, size)
            for rank in range(size):
                flat = take(values, spec if size > 1 else None, rank, size).reshape(-1)
                start, stop = sorted(rng.integers(0, flat.size + 1, 2).tolist())
                found = reader.shard(name, kind, rank_shard(spec, rank, size), start, stop)
                np.testing.assert_array_equal(found, flat[start:stop], err_msg=f"{name} {spec} {rank}/{size}")


def test_one_flipped_bit_in_the_seal_cannot_hide_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for rank in range(2):
        write_rank_file(folder, rank, [])
    seal(folder, {})
    text = (folder / "checksums.json").read_text()
    (folder / "checksums.json").write_text(text.replace("rank_00000", "rank_00001"))
    assert "key given twice" in damage(folder)[0]


def test_every_byte_of_a_small_file_and_some_of_each_large_one_is_guarded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "c"
    write(folder, random_tensors(rng), rng)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert {"checksums.json", "index.json", "state.json", "model/config.json", "rank_00000.safetensors"} <= set(names)
    for name in names:
        content = (folder / name).read_bytes()
        every = name == "checksums.json" or len(content) < 100
        for place in range(len(content)) if every else [0, len(content) - 1, *rng.integers(0, len(content), 20).tolist()]:
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(flipped)
            assert damage(folder), f"a flipped bit at byte {place} of {name} went unseen"
        (folder / name).write_bytes(content[:-2])
        assert any(name in line for line in damage(folder))
        (folder / name).unlink()
        assert any(name in line for line in damage(folder))
        (folder / name).write_bytes(content)
        assert damage(folder) == []


def test_ranks_that_share_the_reading_find_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    write(tmp_path / "c", random_tensors(rng), rng)
    (tmp_path / "c" / "rank_00000.safetensors").write_bytes(b"")
    alone = damage(tmp_path / "c")
    shared = [line for k in range(3) for line in damage(tmp_path / "c", stride=(k, 3))]
    assert len(alone) == 1 and shared == alone


def test_what_was_never_sealed_is_not_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    write(tmp_path / "c", random_tensors(rng), rng)
    seal_text = (tmp_path / "c" / "checksums.json").read_text()
    (tmp_path / "c" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checksums\.json, so it is not a finished checkpoint"):
        Reader(tmp_path / "c")
    for text, message in (
        ("{", "damaged"),
        ("[]", "not a trifold"),
        (seal_text.replace('"version": 1', '"version": 2'), "not a"),
    ):
        (tmp_path / "c" / "checksums.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Reader(tmp_path / "c")


def test_a_tensor_with_a_hole_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    data = np.arange(6, dtype=np.float32)
    report = write_rank_file(folder, 0, [Part("w", "master", (4, 3), RankShard(), 0, 6, data)])
    (folder / "index.json").write_text(json.dumps(merge_index([report])))
    (folder / "state.json").write_text(json.dumps(STATE))
    seal(folder, {report["file"]: report})
    reader = Reader(folder)
    np.testing.assert_array_equal(reader.rows("w", "master", 0, 2), data.reshape(2, 3))
    with pytest.raises(CheckpointError, match="3 elements of master w are in no file"):
        reader.rows("w", "master", 1, 3)


def test_rank_files_are_plain_safetensors_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rng = np.random.default_rng(3)
    folder = tmp_path / "c"
    write(folder, random_tensors(rng), rng)
    total = 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, IndexError, AttributeError, EOFError)):
            pickle.loads(path.read_bytes())
        if path.suffix == ".safetensors":
            total += sum(tensor.size for tensor in load_file(path).values())
        else:
            json.loads(path.read_text())
    assert total == 2 * sum(tensor.size for tensor in random_tensors(np.random.default_rng(3)).values())


def test_files_of_two_attempts_are_neither_sealed_nor_taken_for_whole(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    reports = [write_rank_file(folder, rank, [], token) for rank, token in enumerate(("1-a", "2-b"))]
    known = {report["file"]: report for report in reports}
    with pytest.raises(CheckpointError, match=r"not sealed in attempt 1-a: rank_00001.safetensors is of attempt 2-b"):
        seal(folder, known, "1-a")
    seal(folder, {}, "1-a")  # with the checksums of what is there
    assert damage(folder) == [f"{folder}/rank_00001.safetensors: was written by attempt 2-b, the checkpoint was sealed by 1-a"]
    write_rank_file(folder, 1, [], "1-a")
    seal(folder, {}, "1-a")
    assert damage(folder) == []
    content = json.loads((folder / "checksums.json").read_text())
    del content["attempt"]  # as earlier versions sealed
    (folder / "checksums.json").write_text(json.dumps(content))
    assert damage(folder) == []
