"""`spikes batch RUN STEP`: shows what a step read, and the loss of each sequence under the checkpoint before.

The losses are computed in one process with plain transformers from the newest checkpoint before the step: the run's own model,
some steps younger.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from recipes.common.checkpoint.reader import Reader
from recipes.common.data.document_masking import document_positions
from recipes.common.data.shards import read_manifest
from recipes.common.run_dir.checkpoint_folders import newest_before
from tools.checkpoint.hf_check import plain_model, set_weights
from tools.common.console import GOOD, UsageError, printable, progress_bar, quiet_transformers, table
from tools.common.hf_config import load_config
from tools.common.recipe_io import read_recipe
from tools.data.lookup import DataOrder, describe, read_run, read_step
from tools.spikes.batch_stats import most_repeated, oddities, ordinary_sequences, sequence_stats, step_tokens

TEXT_SHOWN = 200  # characters of a document
STANDS_OUT = 6.0  # robust z of a sequence's tokens that is reported
NOTHING_BEFORE = "no checkpoint before this step, so no loss per sequence"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("step", type=int, metavar="STEP", help="counts from 1, as in metrics.jsonl")
    parser.add_argument("--top", type=int, default=8, help="sequences to print, the worst (default: %(default)s; --json has all)")


def run(flags: argparse.Namespace) -> int:
    quiet_transformers()
    found = examine(flags.run, flags.step)
    if flags.json:
        print(json.dumps(found))
    else:
        print(printable(_report(found, flags.top)))
    return GOOD


def examine(folder: Path, step: int) -> dict[str, Any]:
    """Return everything about the batch of one step, sequences worst first. Raises UsageError where the run cannot answer."""
    try:
        run, read = read_run(folder, step), read_step(folder, step)
        tokens = step_tokens(run, read)
        rows = describe(run, read.consumed + np.arange(read.seqs))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    checkpoint = newest_before(folder, step)
    losses = None if checkpoint is None else sequence_losses(checkpoint, tokens, document_end(folder, run))
    ordinary, reference = ordinary_sequences(run, read)
    stats = sequence_stats(tokens, ordinary)
    odd = oddities(stats, sequence_stats(reference, ordinary))
    sequences = []
    for index, row in enumerate(rows):
        mine = stats[index]
        sequences.append(
            {
                "index": index,
                "sequence": row["sequence"],
                "data_rank": index // read.micro_seqs % read.data_size,
                "micro_batch": index // (read.micro_seqs * read.data_size),
                "loss": None if losses is None else losses[index],
                "repeated": mine.repeated,
                "surprise": mine.surprise,
                "new_bigrams": mine.new_bigrams,
                "copy_of": mine.copy_of,
                "odd": [f"{o.what} (z {o.z:.0f})" for o in odd if o.index == index and o.z > STANDS_OUT],
                "documents": [_document(d) for d in row["documents"]],
            }
        )
    sequences.sort(key=lambda s: -(s["loss"] if s["loss"] is not None else s["surprise"]))
    return {
        "run": str(folder),
        "step": step,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "mean_loss": None if losses is None else float(np.mean(losses)),
        "most_repeated": _most_repeated(run, tokens),
        "sequences": sequences,
    }


def document_end(folder: Path, run: DataOrder) -> int | None:
    """Return the id that ends a document, if the run keeps attention inside documents."""
    return read_manifest(next(iter(run.data.values())))["eos_id"] if read_recipe(folder).mask_documents else None


@torch.no_grad()
def sequence_losses(checkpoint: Path, tokens: np.ndarray, end: int | None = None) -> list[float]:
    """Compute the mean cross-entropy of each sequence, in nats, by plain transformers in fp32. tokens: int64 [k, seq_len + 1]."""
    reader = Reader(checkpoint)
    model = plain_model(load_config(checkpoint / "model"))
    set_weights(model, reader)
    losses = []
    with progress_bar("scoring sequences", tokens.nbytes) as bar:
        for row in torch.from_numpy(tokens).split(1):
            positions = {} if end is None else {"position_ids": document_positions(row[:, :-1], end)}
            logits = model(input_ids=row[:, :-1], use_cache=False, **positions).logits
            losses.append(F.cross_entropy(logits[0].float(), row[0, 1:]).item())
            bar.update(row.numel() * row.element_size())
    return losses


def _document(found: dict[str, Any]) -> dict[str, Any]:
    text = found["text"]
    shown = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " ..."
    return {key: found[key] for key in ("source", "file", "offset", "offset_in", "tokens", "of", "from")} | {"text": shown}


def _most_repeated(run: DataOrder, tokens: np.ndarray) -> dict[str, Any] | None:
    """Return the n-gram that comes most often within one sequence of the step."""
    best = max(((*most_repeated(row), index) for index, row in enumerate(tokens)), key=lambda item: item[1])
    gram, times, index = best
    if times < 2:
        return None
    tokenizer = Tokenizer.from_file(str(next(iter(run.data.values())) / "tokenizer" / "tokenizer.json"))
    return {"index": index, "times": times, "text": tokenizer.decode(list(gram), skip_special_tokens=False)}


def _report(found: dict[str, Any], top: int) -> str:
    shown = found["sequences"][:top]
    rows = [
        [
            s["index"],
            s["sequence"],
            s["data_rank"],
            s["micro_batch"],
            "-" if s["loss"] is None else f"{s['loss']:.4f}",
            f"{s['repeated']:.1%}",
            f"{s['surprise']:.2f}",
            f"{s['new_bigrams']:.1%}",
            "" if s["copy_of"] is None else f"copies index {s['copy_of']}",
            "; ".join(s["odd"]),
        ]
        for s in shown
    ]
    header = ["index", "sequence", "data rank", "micro batch", "loss", "repeated", "rarity", "new bigrams", "", "odd"]
    count = len(found["sequences"])
    mean = NOTHING_BEFORE if found["checkpoint"] is None else f"mean loss {found['mean_loss']:.4f} under {found['checkpoint']}"
    lines = [f"step {found['step']}: {count} sequences, worst first; {mean}", table(rows, header)]
    if found["most_repeated"]:
        repeat = found["most_repeated"]
        lines.append(f"most repeated: {repeat['text']!r}, {repeat['times']} times in the sequence of index {repeat['index']}")
    for s in shown[:3]:
        lines.append(f"\nsequence {s['sequence']}:")
        for d in s["documents"]:
            start, stop = d["tokens"]
            where = f"{d['file']}, {d['offset_in']} {d['offset']}"
            lines.append(f"  tokens {start}..{stop} (from {d['from']} of {d['of']}): {where}, source {d['source']}")
            lines += ["    | " + line for line in d["text"].splitlines()]
    if count > len(shown):
        lines.append(f"\n{count - len(shown)} more with --top {count}")
    return "\n".join(lines)
