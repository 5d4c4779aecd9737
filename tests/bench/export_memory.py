"""Exports a checkpoint and prints what that adds to this process's resident memory; started by checkpoint.py.

    python -m tests.bench.export_memory CHECKPOINT OUT DTYPE

A process of its own, which has imported no more than the export needs, so that the baseline is the interpreter's.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from transformers import AutoConfig

from recipes.common.checkpoint.reader import Reader
from recipes.common.model.initial_weights import build_empty
from tools.checkpoint import hf_check
from tools.checkpoint.to_hf import export

SHARD_BYTES = 5 * 10**9


def main(checkpoint: Path, out: Path, dtype: str) -> None:
    """Print [bytes over the baseline at the peak, bytes of the largest tensor in fp32, baseline]."""
    hf_check.LOGITS_LIMIT_BYTES = 0  # comparing logits holds the whole model, by design
    reader = Reader(checkpoint.resolve())
    build_empty(AutoConfig.from_pretrained(reader.folder / "model"))  # transformers imports the family's code when first asked
    baseline = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    export(reader.folder, out, dtype=dtype, shard_bytes=SHARD_BYTES)
    largest = max(4 * math.prod(reader.shape(name)) for name in reader.tensors)
    print(json.dumps([resident_bytes("VmHWM") - baseline, largest, baseline]))


def resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
