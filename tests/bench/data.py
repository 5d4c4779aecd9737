"""Measures speed and memory of the data engine, with its peers in the same run; for a quiet machine.

    python -m tests.bench.data [--megabytes 60] [--json]

Preparation is the whole command (start, tokenizer check, every process); of the peers only the work is counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import subprocess
import sysconfig
import tempfile
import time
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.common.data.shards import FORMAT, SPLITS, VERSION, open_split, read_manifest, split_shards
from recipes.common.recipe import ROOT
from tools.common.console import GOOD, CheckError, exit_code

PROCESSES = 2
EOS = "<|endoftext|>"
OPEN = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from recipes.common.data.shards import open_split
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
stream = open_split(Path(sys.argv[1]), "train", 4096)
stream.read_sequences(7, np.array([123_456_789]))
seconds = time.perf_counter() - start
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([seconds * 1e3, grown / 1024, stream.num_tokens]))
"""


def make_corpus(path: Path, megabytes: int) -> list[str]:
    """Write Python sources in documents of about 3 kB, as JSON lines; repeated if there are not enough."""
    texts, size = [], 0
    while size < megabytes * 1_000_000:
        before = size
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            try:
                text = source.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            for start in range(0, len(text), 3000):
                texts.append(text[start : start + 3000])
                size += len(texts[-1])
            if size >= megabytes * 1_000_000:
                break
        assert size > before
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def make_tokenizer(folder: Path, texts: list[str], vocab: int = 32_000) -> Tokenizer:
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def run_ours(corpus: Path, tokenizer: Path, out: Path, encoder: str) -> float:
    command = [sys.executable, "-u", str(ROOT / "tools" / "data"), "prepare", str(corpus), "--out", str(out)]
    command += ["--tokenizer", str(tokenizer), "--workers", str(PROCESSES), "--encoder", encoder]
    start = time.perf_counter()
    subprocess.run([*command, "--validation-fraction", "0"], check=True, capture_output=True)
    return time.perf_counter() - start


def run_datasets(corpus: Path, tokenizer: Path, out: Path) -> float:
    """Time a peer: datasets.map over batches with the same fast tokenizer, then save_to_disk."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    fast = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.Dataset.from_json(str(corpus), cache_dir=str(out / "cache"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start = time.perf_counter()
    rows.map(
        lambda batch: {"ids": fast(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True, num_proc=PROCESSES, remove_columns=["text"],
    ).save_to_disk(out / "rows")  # fmt: skip
    return time.perf_counter() - start


def run_loop(texts: list[str], tokenizer: Tokenizer, out: Path) -> float:
    """Time a peer: one document at a time in one process, as Megatron's preprocess_data does in each of its workers."""
    start = time.perf_counter()
    with open(out, "wb") as file:
        for text in texts:
            file.write(np.array([*tokenizer.encode(text, add_special_tokens=False).ids, 0], dtype="uint16").tobytes())
    return time.perf_counter() - start


def same_ids(out: Path, loop: Path) -> bool:
    """Check that the shards, one after another, hold exactly what the loop wrote: every document, in order."""
    shards = split_shards(read_manifest(out), "train")
    return b"".join((out / shard.file).read_bytes() for shard in shards) == loop.read_bytes()


def bench_preparation(folder: Path, megabytes: int) -> dict[str, Any]:
    texts = make_corpus(folder / "corpus.jsonl", megabytes)
    tokenizer = make_tokenizer(folder / "tokenizer", texts[: 20_000_000 // 3000])
    found = {"documents": len(texts)}
    tokenizer.encode_special_tokens = True
    found["loop_seconds"] = run_loop(texts, tokenizer, folder / "loop.bin")
    for encoder in ("tokenizers", "fastokens"):
        try:
            found[f"ours_{encoder}_seconds"] = run_ours(folder / "corpus.jsonl", folder / "tokenizer", folder / encoder, encoder)
        except subprocess.CalledProcessError as error:
            print(f"{encoder}: {error.stderr.decode().strip()}", file=sys.stderr)
            continue
        if not same_ids(folder / encoder, folder / "loop.bin"):
            raise CheckError(f"tools.data prepare --encoder {encoder} writes other ids than one encode() a document")
    found["datasets_seconds"] = run_datasets(folder / "corpus.jsonl", folder / "tokenizer", folder)
    return found


def write_sparse(folder: Path, tokens: int, shards: int) -> None:
    """Write a prepared folder of zeros that take no disk."""
    each = tokens // shards
    entries = []
    for number in range(shards):
        with open(folder / f"train_{number:05d}.bin", "wb") as file:
            file.truncate(each * 2)
        entries.append({"file": f"train_{number:05d}.bin", "tokens": each, "documents": 1, "checksums": {}})
    split = {"tokens": each * shards, "documents": shards, "shards": entries}
    kind = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "vocab_size": 2**16, "eos_id": 0, "tokenizer_hash": ""}
    none = {"tokens": 0, "documents": 0, "shards": []}
    (folder / "dataset.json").write_text(json.dumps(kind | {"splits": dict.fromkeys(SPLITS, none) | {"train": split}}))


def bench_reading(folder: Path, megabytes: int) -> dict[str, Any]:
    sparse = folder / "sparse"
    sparse.mkdir()
    write_sparse(sparse, 10**12, 4000)
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, str(sparse)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    milliseconds, grown, tokens = json.loads(opened.stdout)
    dense = folder / "dense"
    dense.mkdir()
    write_sparse(dense, megabytes * 2**19, 8)
    for path in dense.glob("*.bin"):
        path.write_bytes(np.random.default_rng(0).integers(0, 2**16, megabytes * 2**16, dtype=np.uint16).tobytes())
    stream = open_split(dense, "train", 4096)
    positions = [np.random.default_rng(n).integers(0, stream.num_positions, 64) for n in range(400)]
    for batch in positions:
        stream.read(batch)
    start = time.process_time()
    for batch in positions:
        stream.read(batch)
    seconds = time.process_time() - start
    sequences = sum(len(batch) for batch in positions)
    return {
        "open_tokens": tokens,
        "open_and_seek_ms": milliseconds,
        "open_and_seek_mib": grown,
        "read_stored_gb_per_second": sequences * 4097 * 2 / seconds / 1e9,
        "read_int64_gb_per_second": sequences * 4097 * 8 / seconds / 1e9,
        "read_tokens_per_second": sequences * 4097 / seconds,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=60, help="of text to prepare (default: %(default)s)")
    parser.add_argument("--read-megabytes", type=int, default=512, help="of tokens to read from (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        found = bench_reading(Path(name), args.read_megabytes) | bench_preparation(Path(name), args.megabytes)
    if args.json:
        print(json.dumps(found))
        return GOOD
    for key, value in found.items():
        rate = f"  {found['documents'] / value:,.0f} documents/s" if key.endswith("_seconds") else ""
        print(f"{key:<28}{value:>20,.2f}{rate}" if isinstance(value, float) else f"{key:<28}{value:>20,}")
    return GOOD


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
