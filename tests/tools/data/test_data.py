"""tools.data show, check and stats agree with what was written: every token comes from the document that is named."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece

from recipes.common.data.batches import step_micro_batches
from recipes.common.data.order import sequence_position
from recipes.common.data.shards import open_split, read_manifest
from tools.data.__main__ import main

SEQ_LEN = 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare two sources, one of JSON lines and one of text files: (folder, {(file, offset): text})."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(300)]
    texts = [" ".join(rng.choice(words, rng.integers(1, 200))) for _ in range(120)]
    texts[50] = texts[10]
    documents, at = {}, 0
    with open(folder / "lines.jsonl", "w") as file:
        for text in texts[:100]:
            documents[str(folder / "lines.jsonl"), at] = text
            at += file.write(json.dumps({"text": text}) + "\n")
    (folder / "texts").mkdir()
    for number, text in enumerate(texts[100:]):
        path = folder / "texts" / f"{number:02d}.txt"
        path.write_text(text)
        documents[str(path), 0] = text
    arguments = [str(folder / "lines.jsonl"), str(folder / "texts"), "--train-tokenizer", "300", "--workers", "1"]
    assert main(["prepare", *arguments, "--out", str(folder / "out")]) == 0
    return folder / "out", documents


@pytest.fixture
def run_folder(prepared, tmp_path):
    """Write a run of three steps of 8 sequences, the last on two data ranks after a resume."""
    recipe = {"data": str(prepared[0]), "seed": 77, "batch": {"seq_len": SEQ_LEN, "micro_seqs": 2}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    starts = [{"resumed_step": None, "sizes": {"data": 1}}, {"resumed_step": 2, "sizes": {"data": 2}}]
    (tmp_path / "run.json").write_text(json.dumps({"starts": starts}))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write(json.dumps({"step": 0, "val_loss": 1.0}) + "\n")
        for step in (1, 2, 3):
            file.write(json.dumps({"step": step, "tokens": 8 * SEQ_LEN, "consumed_seqs": 8 * step}) + "\n")
    return tmp_path


def show(capsys, *arguments):
    assert main(["show", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["sequences"]


def test_every_token_comes_from_the_document_it_names(prepared, run_folder, capsys):
    folder, documents = prepared
    stream = open_split(folder, "train", SEQ_LEN)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    ids_of = {key: [*processor.encode(text), processor.eos_id()] for key, text in documents.items()}
    rows = show(capsys, run_folder, "--sequences", f"0:{stream.num_positions}")
    assert sorted(row["position"] for row in rows) == list(range(stream.num_positions))
    for row in rows:
        tokens = stream.read(np.array([row["position"]]))[0].tolist()
        at = 0
        for found in row["documents"]:
            start, stop = found["tokens"]
            assert start == at and stop > start
            whole = ids_of[found["file"], found["offset"]]
            assert tokens[start:stop] == whole[found["from"] : found["from"] + stop - start]
            closed = tokens[stop - 1] == processor.eos_id()
            assert found["of"] == len(whole)
            assert found["text"] == processor.decode(tokens[start : stop - closed]) + "</s>" * closed
            assert found["source"] == str(folder.parent / ("texts" if "texts" in found["file"] else "lines.jsonl"))
            at = stop
        assert at == SEQ_LEN + 1


def test_show_names_what_each_rank_read(prepared, run_folder, capsys):
    """Check that `show` and the reader agree on every data rank of step 3."""
    stream = open_split(prepared[0], "train", SEQ_LEN)
    rows = show(capsys, run_folder, "--step", 3)
    assert [row["position"] for row in rows] == sequence_position(77, np.arange(16, 24), stream.num_positions).tolist()
    for rank in (0, 1):
        mine = show(capsys, run_folder, "--step", 3, "--rank", rank)
        assert mine == [row for row in rows if row["rank"] == rank]
        read = step_micro_batches(
            stream, seed=77, consumed=16, global_seqs=8, micro_seqs=2, data_rank=rank, data_size=2
        )  # fmt: skip
        positions = np.array([row["position"] for row in mine])
        assert np.array_equal(np.concatenate(read), stream.read(positions))
    assert {row["rank"] for row in show(capsys, run_folder, "--step", 2)} == {0}


def test_show_leaves_out_the_sequences_that_the_run_skipped(run_folder, capsys):
    starts = json.loads((run_folder / "run.json").read_text())["starts"]
    (run_folder / "run.json").write_text(json.dumps({"starts": [*starts[:-1], starts[-1] | {"skips": [[2, 5]]}]}))
    assert [row["sequence"] for row in show(capsys, run_folder, "--sequences", "0:4")] == [0, 1, 5, 6]


def test_show_for_people_and_its_mistakes(prepared, run_folder, capsys):
    assert main(["show", str(run_folder), "--step", "1"]) == 0
    out = capsys.readouterr().out
    assert "data rank 0  position" in out and "byte" in out and "    | " in out
    for arguments, message in (
        ([str(run_folder), "--step", "9"], "has steps 1 to 3"),
        ([str(run_folder), "--step", "3", "--rank", "2"], "ran on 2 data ranks"),
        ([str(run_folder), "--sequences", "4"], "write two numbers"),
        ([str(prepared[0]), "--step", "1"], "no recipe.json"),
    ):
        assert main(["show", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_check_names_what_is_broken(prepared, tmp_path, capsys):
    assert main(["check", str(prepared[0])]) == 0
    assert "intact" in capsys.readouterr().out
    folder = tmp_path / "broken"
    shutil.copytree(prepared[0], folder)
    shard = next(iter(read_manifest(folder)["splits"]["train"]["shards"]))
    tokens = np.memmap(folder / shard["file"], dtype="uint16", mode="r+")
    tokens[5] = 60_000
    tokens.flush()
    ends = np.memmap((folder / shard["file"]).with_suffix(".ends"), dtype="<u8", mode="r+")
    ends[1] -= 1
    ends.flush()
    assert main(["check", str(folder), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem.split(":")[0] for problem in problems] == [
        "train_00000.bin", "train_00000.ends", "train_00000.bin", "train_00000.bin",
    ]  # fmt: skip
    assert "checksum" in problems[0] and "checksum" in problems[1]
    assert "holds id 60000, the vocabulary has 300" in problems[2] and "1 documents do not end with" in problems[3]
    (folder / shard["file"]).unlink()
    assert main(["check", str(folder)]) == 1
    assert "no bytes, the manifest says" in capsys.readouterr().out
    (folder / "dataset.json").unlink()
    assert main(["check", str(folder)]) == 2


def test_stats_count_lengths_sources_and_repeats(prepared, tmp_path, capsys):
    folder, documents = prepared
    picture = tmp_path / "lengths.svg"
    assert main(["stats", str(folder), "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = read_manifest(folder)
    assert found["documents"] == manifest["splits"]["train"]["documents"] == sum(found["lengths"].values())
    assert sum(source["documents"] for source in found["sources"]) == len(documents)
    assert [source["documents"] for source in found["sources"]] == [100, 20]
    assert round(found["repeated_documents"] * found["documents"]) == 1
    assert picture.read_text().startswith("<svg")
    assert main(["stats", str(folder), "--picture", str(picture)]) == 0
    assert "repeats: 0." in capsys.readouterr().out
