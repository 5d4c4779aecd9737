"""Measures speed and memory of checkpoints, against plain writing and copying of the same bytes in the same run.

    python -m tests.bench.checkpoint [--layers 8] [--rounds 5] [--folder DIR] [--json]

Two forked ranks hold a llama of 512 wide layers and 32000 words (58M parameters with 8 layers) under ZeRO-1; every write is
synced to disk. Goals: save at least 70 % of plain writing, an asynchronous save's stall at most 15 % of a synchronous one, export
at least 60 % of plain copying, and at most 3x the largest tensor of memory at any model size. Medians over the rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="disabled", HF_HUB_OFFLINE="1")

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.saver import Saver
from recipes.common.engine import zero_state
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import ROOT, Layout
from tests.bench.export_memory import SHARD_BYTES
from tests.support.tiny import ds_config, tiny_recipe
from tools.checkpoint import hf_check
from tools.checkpoint.starting_checkpoint import collected, starting_state, whole_part, write_checkpoint
from tools.checkpoint.to_hf import export
from tools.common.console import GOOD, UsageError, exit_code
from tools.common.forked_ranks import run_ranks

RANKS = 2
CHUNK = 1 << 20  # the fastest here: page caches take 16 MB at a time at a third of the speed
DTYPES, DEPTHS = ("float32", "bfloat16"), (1, 4)  # of the exports whose memory is measured


def config_of(layers: int, hidden: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def save_rank(config: LlamaConfig, rounds: int, folder: Path) -> dict[str, Any]:
    """Save and write plainly by turns. Returns seconds, all ranks waited for."""
    recipe = tiny_recipe(folder, model=config, tokenizer=str(folder / "none"))
    options = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    engine_config = {**ds_config("zero1_fp32.json"), **options}
    trainer = build_trainer(config, Layout(), recipe.optimizer, engine_config, device_type="cpu", seq_len=16)
    rank = trainer.grid.rank
    zero_state.create_states(trainer, ["exp_avg", "exp_avg_sq"], 1)
    saver = Saver(folder / "run", trainer, recipe, None)
    partition = zero_state.partitions(trainer)
    blocks = [flat.numpy() for p in partition for flat in p.states.values()]
    found: dict[str, list[float]] = {"stall": [], "save": [], "write": []}
    for number in range(rounds + 1):  # the first save allocates its buffers
        for what in ("save", "write") if number % 2 else ("write", "save"):  # a disk may slow down for whoever comes second
            dist.barrier()
            started = time.perf_counter()
            if what == "save":
                saver.save(RunPosition(step=number + 1))
                found["stall"].append(time.perf_counter() - started)
                saver.finish()
            else:
                plain_write(folder / f"plain_{rank}_{number}", blocks)
            dist.barrier()
            found[what].append(time.perf_counter() - started)
        (folder / f"plain_{rank}_{number}").unlink()
        if rank == 0 and number:  # else what was written fills the memory that caches files
            shutil.rmtree(folder / "run" / "checkpoints" / f"step_{number:08d}")
    return {
        "bytes": sum(block.nbytes for block in blocks),
        "first_stall": found["stall"][0],
        **{k: v[1:] for k, v in found.items()},
    }


def plain_write(path: Path, blocks: list) -> None:
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            view = memoryview(block).cast("B")
            for start in range(0, len(view), CHUNK):
                file.write(view[start : start + CHUNK])
        os.fsync(file.fileno())


def bench_save(config: LlamaConfig, rounds: int, folder: Path) -> dict[str, Any]:
    ranks = run_ranks(save_rank, RANKS, config, rounds, folder, timeout_seconds=1800)
    size, first = sum(rank["bytes"] for rank in ranks), ranks[0]
    save, write, stall = (statistics.median(first[key]) for key in ("save", "write", "stall"))
    return {
        "megabytes": round(size / 1e6),
        "save_mb_s": round(size / 1e6 / save),
        "plain_write_mb_s": round(size / 1e6 / write),
        "save_share_of_plain_write": round(write / save, 3),
        "stall_seconds": round(stall, 3),
        "stall_share_of_synchronous": round(stall / save, 3),
        "first_stall_seconds": round(first["first_stall"], 3),
    }


def export_rank(checkpoint: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Export (alone, and with its verification) and copy the exported files plainly, by turns."""
    hf_check.LOGITS_LIMIT_BYTES = 0  # logits are computed, not copied
    seconds: dict[str, list[float]] = {"export": [], "verified": [], "copy": []}
    for _ in range(rounds + 1):
        for key in seconds:
            out = folder / key
            shutil.rmtree(out, ignore_errors=True)
            if key == "copy":
                started = time.perf_counter()
                for path in sorted((folder / "export").glob("*.safetensors")):
                    copy(path, out)
            else:
                started = time.perf_counter()
                export(checkpoint, out, dtype="float32", shard_bytes=SHARD_BYTES, verify=key == "verified")
            seconds[key].append(time.perf_counter() - started)
    size = sum(path.stat().st_size for path in (folder / "export").glob("*.safetensors"))
    exported, verified, plain = (statistics.median(values[1:]) for values in seconds.values())
    return {
        "megabytes": round(size / 1e6),
        "export_mb_s": round(size / 1e6 / exported),
        "export_and_verify_mb_s": round(size / 1e6 / verified),
        "plain_copy_mb_s": round(size / 1e6 / plain),
        "export_share_of_plain_copy": round(plain / exported, 3),
        "export_and_verify_share_of_plain_copy": round(plain / verified, 3),
    }


def copy(path: Path, folder: Path) -> None:
    """Copy in the chunks that the export uses, and sync."""
    folder.mkdir(exist_ok=True)
    with path.open("rb", buffering=0) as source, (folder / path.name).open("wb", buffering=0) as target:
        while chunk := source.read(CHUNK):
            target.write(chunk)
        os.fsync(target.fileno())


def write_random(config: LlamaConfig, folder: Path) -> Path:
    """Write a checkpoint that has weights only."""
    return run_ranks(_write_random, 1, config, folder)[0]


def _write_random(config: LlamaConfig, folder: Path) -> Path:
    shapes = {name: tuple(parameter.shape) for name, parameter in build_empty(config).named_parameters()}
    parts = (whole_part(name, "master", torch.randn(shape).numpy()) for name, shape in shapes.items())
    return write_checkpoint(folder, collected(parts), starting_state(tied=False), config, None)


def export_memory(checkpoint: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Export in a fresh process and return what that adds to its resident memory."""
    command = [sys.executable, "-u", "-m", "tests.bench.export_memory", str(checkpoint), str(out), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, largest, baseline = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {
        "exported_megabytes": round(size / 1e6),
        "largest_tensor_megabytes": round(largest / 1e6, 1),
        "peak_over_baseline_megabytes": round(peak / 1e6, 1),
        "peak_in_largest_tensors": round(peak / largest, 2),
        "baseline_megabytes": round(baseline / 1e6),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.checkpoint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="(default: %(default)s; export's memory: four times as many too)")
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 16 (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=32000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    if args.folder is not None and not args.folder.is_dir():
        raise UsageError(f"--folder={args.folder}: there is no such folder")
    config = config_of(args.layers, args.hidden, args.vocab)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        result: dict[str, Any] = {"save": bench_save(config, args.rounds, folder)}
        newest = folder / "run" / "checkpoints" / "latest"
        result["export"] = run_ranks(export_rank, 1, newest.resolve(), args.rounds, folder, timeout_seconds=1800)[0]
        shutil.rmtree(folder / "run")
        for times in DEPTHS:
            checkpoint = write_random(config_of(args.layers * times, args.hidden, args.vocab), folder / f"x{times}")
            for dtype in DTYPES:
                out = folder / f"x{times}_{dtype}"
                result[f"memory at {times}x, {dtype}"] = export_memory(checkpoint, out, dtype)
                shutil.rmtree(out)
    if args.json:
        print(json.dumps(result))
    else:
        for title, figures in result.items():
            print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    return GOOD


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
