"""Finds the documents in a sequence: from the order, through document bounds and origins, to file and offset."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from recipes.common.config.json_files import laid_out, parse_json, read_json
from recipes.common.data.blend import BlendedStream, data_from_json, folders, open_blend
from recipes.common.data.order import kept_index
from recipes.common.data.reading import NOTHING_READ, UNCHANGED, Order, order_from_json
from recipes.common.data.shards import ORIGIN, TokenStream, open_split, read_manifest
from recipes.common.recipe import Blend, from_root
from recipes.common.run_dir.metrics import read_metrics
from tools.common.console import UsageError
from tools.data.compressed import compression


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The data folders of a run and the order in which their sequences are read."""

    data: dict[str, Path]  # folders as the recipe names them -> where they are
    blend: Blend | None
    seed: int
    seq_len: int
    skips: tuple[tuple[int, int], ...]
    order: Order = UNCHANGED  # where it begins


@dataclass(frozen=True, kw_only=True)
class StepRead:
    """The sequences that one step read."""

    consumed: int  # sequences before it
    seqs: int
    micro_seqs: int
    data_size: int  # data ranks that read different sequences


def read_run(folder: Path, step: int | None = None) -> DataOrder:
    """Read the data order of a run directory, as it is now or was at `step`. Raises UsageError when it has no recipe.json."""
    recipe = _recipe_at(folder, step)
    start = _start_at(folder, step)
    with laid_out(folder / "recipe.json"):
        data = data_from_json(recipe["data"])
        blend = data if isinstance(data, Blend) else None
        names = folders(blend) if blend else [recipe["data"]]
        seed, seq_len = operator.index(recipe["seed"]), operator.index(recipe["batch"]["seq_len"])
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}")
        places = {name: from_root(name) for name in names}
    with laid_out(folder / "run.json"):
        return DataOrder(
            data=places,
            blend=blend,
            seed=seed,
            seq_len=seq_len,
            skips=tuple((operator.index(first), operator.index(last)) for first, last in start.get("skips", ())),
            order=order_from_json(start["reading"]) if "reading" in start else UNCHANGED,
        )


def _recipe_at(folder: Path, step: int | None) -> dict[str, Any]:
    """Return the recipe of a run, or the one that its step `step` was trained by: a resume keeps what it replaces."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no recipe.json, so this is no run directory")
    return read_json(file_at(folder, "recipe", step))


def file_at(folder: Path, stem: str, step: int | None) -> Path:
    """Return recipe.json or deepspeed.json of a run, or the one under which its step `step` was trained.

    Of several that resumes from one step replaced, the first is that of the steps before.
    """
    kept = []
    for path in folder.glob(f"{stem}.before_step_*[0-9].json"):
        first, _, number = path.name.removeprefix(f"{stem}.before_step_").removesuffix(".json").partition(".")
        if first.isdigit() and step is not None and int(first) > step:
            kept.append((int(first), int(number) if number.isdigit() else 1, path))
    return min(kept)[2] if kept else folder / f"{stem}.json"


def _start_at(folder: Path, step: int | None) -> dict[str, Any]:
    """Return the start in run.json under whose order `step` was read: a skip changes nothing before itself, a change does."""
    path = folder / "run.json"
    with laid_out(path):
        starts = read_json(path)["starts"] if path.is_file() else []
        before = [start for start in starts if step is None or start.get("reading", {}).get("since_step", 0) < step]
        return dict(before[-1]) if before else {}


def read_step(folder: Path, step: int) -> StepRead:
    """Return what step `step` of a run read. Raises UsageError if the run has no such step."""
    recipe, last, found = _recipe_at(folder, step), 0, None
    for record in read_metrics(folder):
        if "consumed_seqs" in record:
            last = max(last, record["step"])
            found = record if record["step"] == step else found
    if found is None:
        raise UsageError(f"--step {step}: metrics.jsonl of {folder} has steps 1 to {last}")
    with laid_out(folder):
        start = [entry for entry in read_json(folder / "run.json")["starts"] if (entry["resumed_step"] or 0) < step][-1]
        seqs = operator.index(found["tokens"] // recipe["batch"]["seq_len"])
        consumed = operator.index(found["consumed_seqs"]) - seqs
        micro_seqs, data = operator.index(recipe["batch"]["micro_seqs"]), operator.index(start["sizes"]["data"])
        context = operator.index(start["sizes"].get("context", 1))  # an older run has none
        if min(micro_seqs, data, context) < 1:
            raise ValueError(f"sizes {micro_seqs}, {data}, {context}")
    return StepRead(consumed=consumed, seqs=seqs, micro_seqs=micro_seqs, data_size=data // context)


def open_run(run: DataOrder) -> TokenStream | BlendedStream:
    if run.blend is not None:
        return open_blend(run.blend, run.seq_len, run.order)
    (name, folder), *_ = run.data.items()
    reading = run.order.readings.get(name, NOTHING_READ)
    return open_split(folder, "train", run.seq_len, reading=reading, start_seqs=run.order.start_seqs)


def describe(run: DataOrder, consumed: np.ndarray) -> list[dict]:
    """Describe the consumed-th sequences of a run: index, data folder, position, and the documents in each."""
    stream = open_run(run)
    streams = stream.streams if isinstance(stream, BlendedStream) else [stream]
    names = list(run.data)
    index = kept_index(consumed, run.skips)
    sources, positions = stream.locate(run.seed, index)
    rows = []
    for order, number, source, position in zip(
        consumed.tolist(), index.tolist(), sources.tolist(), positions.tolist(), strict=True
    ):
        documents = documents_of(streams[source], position)
        rows.append({"consumed": order, "sequence": number, "data": names[source], "position": position, "documents": documents})
    for source, name in enumerate(names):
        mine = [row for row in rows if row["data"] == name]
        if mine:
            _name_and_decode(streams[source].folder, mine)
    return rows


def documents_of(stream: TokenStream, position: int) -> list[dict]:
    """List the documents, or parts of them, in one sequence: `tokens` [start, stop) of the sequence, and where from."""
    begin, end = position * stream.seq_len, position * stream.seq_len + stream.seq_len + 1
    tokens = stream.read(np.array([position]))[0]
    found = []
    shard = int(np.searchsorted(stream.starts, begin, side="right")) - 1
    while shard < len(stream.shards) and stream.starts[shard] < end:
        path = stream.folder / stream.shards[shard].file
        ends = np.memmap(path.with_suffix(".ends"), dtype="<u8", mode="r")
        origins = np.memmap(path.with_suffix(".origins"), dtype=ORIGIN, mode="r")
        offset = int(stream.starts[shard])
        first = int(np.searchsorted(ends, max(begin - offset, 0), side="right"))
        last = int(np.searchsorted(ends, min(end - offset, stream.shards[shard].tokens), side="left"))
        bounds = [int(ends[first - 1]) if first else 0, *(int(e) for e in ends[first : last + 1])]
        for number, (start, stop) in enumerate(pairwise(bounds), start=first):
            inside = (max(start + offset, begin) - begin, min(stop + offset, end) - begin)
            origin = origins[number]
            found.append(
                {
                    "tokens": list(inside),
                    "of": stop - start,
                    "from": inside[0] + begin - start - offset,
                    "file": int(origin["file"]),
                    "source": int(origin["source"]),
                    "offset": int(origin["offset"]),
                    "ids": tokens[inside[0] : inside[1]].tolist(),
                }
            )
        shard += 1
    return found


def _name_and_decode(folder: Path, rows: list[dict]) -> None:
    """Replace file and source numbers by their names, and ids by text."""
    sources = [source["name"] for source in read_manifest(folder)["sources"]]
    documents = [document for row in rows for document in row["documents"]]
    files = read_files(folder, {document["file"] for document in documents})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    for document in documents:
        file = files[document["file"]]
        document["file"] = file["path"]
        document["offset_in"] = offset_unit(file)
        document["source"] = sources[document["source"]]
        document["text"] = tokenizer.decode(document.pop("ids"), skip_special_tokens=False)


def read_files(folder: Path, wanted: set[int]) -> dict[int, dict]:
    """Read lines of files.jsonl by number, without holding the others."""
    with open(folder / "files.jsonl", encoding="utf-8") as file:
        return {n: parse_json(line, f"{folder / 'files.jsonl'}, line {n + 1}") for n, line in enumerate(file) if n in wanted}


def offset_unit(file: dict) -> str:
    if file["kind"] in ("parquet", "dataset"):
        return "row"
    if file["kind"] == "hub":
        return "shard << 40 | row"
    if file["kind"] == "json":
        return "document"
    return "line" if compression(file["path"]) else "byte"
