"""Every form of input gives the same documents; what is left out, cut or not what its name says is named."""

import bz2
import gzip
import json
import lzma
import os
import random
import socket

import pyarrow
import pytest

from tools.common.console import UsageError
from tools.data.inputs import Choice, list_files, plan_units
from tools.data.readers import read_range

TEXTS = [f"Document {number}.\nIt has a second line, an é and a 漢." for number in range(300)]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record, ensure_ascii=number % 2 == 0) + "\n" for number, record in enumerate(RECORDS)).encode()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
LAYOUTS = {
    "lines.json": LINES,
    "lines.jsonl": LINES,
    "LINES.NDJSON": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + LINES,
    "array.json": json.dumps(RECORDS).encode(),
    "array.jsonl": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "objects.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
}


def read(*names, **choice):
    """Return (texts, problems with their places, lines about what is left out)."""
    files, left_out = list_files([str(name) for name in names], Choice(**choice))
    texts, problems = [], []
    for unit in plan_units(files):
        for part in unit:
            for document in read_range(files[part.file], part, choice.get("text_key", "text")):
                if document.text is None:
                    problems.append((os.path.basename(files[part.file].path), document.offset, document.problem))
                else:
                    texts.append(document.text)
    return texts, problems, left_out


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_compression_holds_the_same_documents(tmp_path, name):
    for ending, pack in PACK.items():
        for there in (ending, ending.upper()):
            path = tmp_path / f"{name}{there}"
            path.write_bytes(pack(LAYOUTS[name]))
            assert read(path) == (TEXTS, [], []), path.name
            assert read(tmp_path) == (TEXTS, [], []), path.name  # also found in a folder
            path.unlink()


def test_one_object_over_several_lines_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "one"\n}\n')
    assert read(tmp_path) == (["one"], [], [])


def test_text_loses_its_byte_order_mark_and_utf_16_is_named(tmp_path):
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "b.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "c.jsonl").write_bytes(LINES.decode().encode("utf-16"))
    texts, problems, _ = read(tmp_path)
    assert texts == ["plain"]
    why = "UTF-16, not UTF-8 (by its byte order mark); convert it with: iconv -f UTF-16 -t UTF-8"
    assert problems == [("b.txt", 0, why), ("c.jsonl", 0, why)]


@pytest.mark.parametrize("ending", [ending for ending in PACK if ending])
def test_a_cut_file_is_named_and_its_documents_before_the_cut_are_kept(tmp_path, ending):
    texts = [random.Random(number).randbytes(100).hex() for number in range(6000)]
    whole = PACK[ending]("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole[: len(whole) * 9 // 10])
    (tmp_path / "b.jsonl").write_bytes(LINES)
    found, [(name, line, problem)], _ = read(tmp_path)
    assert found == texts[:line] + TEXTS
    assert name == f"a.jsonl{ending}" and "cut short or damaged" in problem
    assert line > 3000
    (tmp_path / f"c.txt{ending}").write_bytes(whole[: len(whole) // 2])
    assert read(tmp_path / f"c.txt{ending}")[1][0][:2] == (f"c.txt{ending}", 0)


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.jsonl", gzip.compress(LINES), ".gz data, whatever its name says; rename it to end in a.jsonl.gz"),
        ("a.txt", zstd(LINES), ".zst data, whatever its name says; rename it to end in a.txt.zst"),
        ("a.jsonl.gz", LINES, "not compressed, whatever its name says; rename it to end in a.jsonl"),
        ("a.jsonl.xz", gzip.compress(LINES), ".gz data, whatever its name says; rename it to end in a.jsonl.gz"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == ([], [(name, 0, problem)], [])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 499723\n"


@pytest.mark.parametrize(
    "name, content", [("p.parquet", POINTER), ("p.jsonl.gz", POINTER), ("p.txt", POINTER), ("e.jsonl.xz", b"")]
)
def test_pointers_and_empty_archives_are_told_before_work_starts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    cure = "git lfs pull" if content else "fetch it again"
    with pytest.raises(UsageError, match=f"{name}: .*{cure}"):
        read(tmp_path)
    texts, [(bad, _, problem)], _ = read(tmp_path, skip_bad=True)
    assert (texts, bad) == (TEXTS, name) and cure in problem


def test_a_cut_parquet_is_named_and_skipped_and_a_wrong_column_never_is(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(raw[: len(raw) // 2])
    pyarrow.parquet.write_table(table[:0], tmp_path / "c.parquet")
    with pytest.raises(UsageError, match=r"b.parquet: not a Parquet file"):
        read(tmp_path)
    texts, [(name, _, _)], _ = read(tmp_path, skip_bad=True)
    assert (texts, name) == (TEXTS, "b.parquet")
    with pytest.raises(UsageError, match=r"a.parquet: no column 'body' among \['text'\]; choose with --text-key"):
        read(tmp_path, skip_bad=True, text_key="body")


@pytest.mark.parametrize("string", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("kind", ["rows.parquet", "dataset", "hub"])
def test_a_row_that_is_not_utf_8_is_named_and_the_others_are_read(tmp_path, kind, string):
    import datasets
    import pyarrow.parquet

    raw = [b"one", b"tw\xff", b"three", b"\xe9"] + [b"more"] * 2000
    texts = pyarrow.array(raw, pyarrow.large_binary()).view("large_string")
    if string != "large_string":
        texts = pyarrow.array(raw, pyarrow.binary()).view("string")
    table = pyarrow.table({"text": texts.dictionary_encode() if string == "dictionary" else texts})
    path = tmp_path / kind
    if kind == "dataset":
        datasets.Dataset(table).save_to_disk(path)
    else:
        path = tmp_path / "hub" / "rows.parquet" if kind == "hub" else path
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, path, row_group_size=500)
    found, problems, _ = read(f"hub:{path.parent}" if kind == "hub" else path, skip_bad=True)
    first = "'text' of this row is not UTF-8 at its byte 2"
    if kind == "hub":  # its library reads no further
        assert found == ["one"]
        assert problems == [("hub", 1, f"{first}; nothing of shard 0 after row 0 is read")]
    else:
        assert found == ["one", "three"] + ["more"] * 2000
        assert problems == [(path.name, 1, first), (path.name, 3, "'text' of this row is not UTF-8 at its byte 0")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("gap", ["\n", "", " , ", " " * (1 << 21)])
def test_every_array_and_object_of_a_file_is_read(tmp_path, name, gap):
    values = ['[{"text": "a"}, {"text": "b"}]', "[]", '[{"text": "c"}]', '{"text": "d"}', '[{"text": "e"}]']
    path = tmp_path / name
    path.write_bytes((gzip.compress if name.endswith(".gz") else bytes)(gap.join(values).encode()))
    assert read(path) == read(tmp_path) == (list("abcde"), [], [])


@pytest.mark.parametrize(
    "content, number, reason",
    [
        (b'[{"text": "a"}, {"text": "b"', 2, "Expecting"),
        (b'[{"text": "a"}, {"text": "b"} ', 3, "the array has no end"),
        (b'[{"text": "a"}, {"text" "b"}, ' + b'{"text": "c"},' * 100, 2, "Expecting ':' delimiter"),
        (b'[{"text": "a"}, {"text": "\xff"}]', 1, "not UTF-8"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b'{\n"text": "a"\n}\n{\n"text": "b"', 2, "Expecting"),
        (b'[{"text": "a"}]\n[{"text": "b"}', 3, "the array has no end"),
        (b'[{"text": "a"}]]', 2, "Expecting value"),
        (b'[{"text": "a"}] and more', 2, "Expecting value"),
    ],
)
def test_broken_arrays_are_named_by_document(tmp_path, content, number, reason):
    (tmp_path / "a.json").write_bytes(content)
    _, [(_, offset, problem)], _ = read(tmp_path / "a.json")
    assert offset == number and reason in problem


def test_folders_linked_once_and_in_a_circle_are_read_once(tmp_path):
    real, folder = tmp_path / "disk", tmp_path / "in"
    (real / "shard").mkdir(parents=True)
    folder.mkdir()
    (real / "shard" / "x.jsonl").write_bytes(LINES)
    (folder / "a.txt").write_text("own")
    (folder / "disk1").symlink_to(real / "shard")
    (folder / "disk2").symlink_to(real / "shard")
    (folder / "up").symlink_to("..")
    (folder / "z.txt").symlink_to("a.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    texts, problems, [line] = read(folder)
    assert texts == ["own", *TEXTS] and not problems
    assert "linked folders that were read already" in line and "1 broken links" in line and "1 linked files" in line


def test_what_is_left_out_is_counted_by_ending(tmp_path):
    for name in ("a.jsonl", "b.csv", "c.csv", "d.tar.gz", "noending", ".hidden"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "package.json").write_text('{"name": "x"}')
    texts, _, [line] = read(tmp_path)
    assert texts == TEXTS
    for words in ("2 .csv", "1 .tar.gz", "1 without an ending", "1 hidden", "1 .json without a field 'text'"):
        assert words in line
    with pytest.raises(UsageError, match=r"holds no file ending in .*; there is 1 .json without a field 'text'"):
        (tmp_path / "only").mkdir()
        (tmp_path / "package.json").rename(tmp_path / "only" / "package.json")
        read(tmp_path / "only")


@pytest.mark.parametrize(
    "name, cure", [("a.csv", "write the table as Parquet"), ("a.tar.gz", "unpack it"), ("A.ARROW", "save_to_disk")]
)
def test_what_is_no_text_is_refused_with_the_cure(tmp_path, name, cure):
    (tmp_path / name).write_bytes(b"a,b\n1,2\n")
    with pytest.raises(UsageError, match=cure):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "socket", "open pipe", "open file", "device"])
def test_an_input_that_is_read_once_only_is_refused(tmp_path, kind):
    (tmp_path / "b.jsonl").write_bytes(LINES)
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "link.jsonl").symlink_to("fifo.jsonl")
    ends, opened = os.pipe(), os.open(tmp_path / "b.jsonl", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        names = {"fifo": tmp_path / "fifo.jsonl", "link to a fifo": tmp_path / "link.jsonl", "socket": tmp_path / "socket"}
        names |= {"open pipe": f"/dev/fd/{ends[0]}", "open file": f"/proc/self/fd/{opened}", "device": "/dev/null"}
        with pytest.raises(UsageError) as refused:
            read(tmp_path / "b.jsonl", names[kind])
    for descriptor in (*ends, opened):
        os.close(descriptor)
    reason = "a stream (a pipe, device, socket or open file), no file or folder; write it to a file first"
    assert str(refused.value) == f"{names[kind]}: {reason}"
    assert read(tmp_path)[0] == TEXTS  # in a folder they are left out


def test_suffixes_and_json_as_text(tmp_path):
    (tmp_path / "a.CSV").write_text("a,b\n")
    (tmp_path / "b.json").write_text('{"name": 1}')
    assert read(tmp_path, suffixes=(".csv",))[0] == ["a,b\n"]
    assert read(tmp_path / "a.CSV", suffixes=(".csv",))[0] == ["a,b\n"]
    assert read(tmp_path, suffixes=(".json",))[1] == [("b.json", 0, "no field 'text' (there is 'name'); choose with --text-key")]
    assert read(tmp_path, suffixes=(".json",), json_as_text=True)[0] == ['{"name": 1}']


def test_an_unreadable_disk_is_no_bad_document(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tools.data.readers.open_bytes", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*a.jsonl.gz"):
        read(tmp_path / "a.jsonl.gz", skip_bad=True)
