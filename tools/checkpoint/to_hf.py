"""Exports a checkpoint to a Hugging Face folder that plain transformers loads: safetensors, config, tokenizer.

    python -m tools.checkpoint to-hf runs/llama_8b/checkpoints/latest OUT --dtype bfloat16

Takes any checkpoint, saved in any layout, at any time; the run may continue meanwhile. Needs no GPU and no process group, and
never holds the whole model: tensors go from file to file in blocks. Tensors take the names under which transformers itself saves
the family (one matrix an expert, for example); a tied head is not written; buffers keep their own dtype. Verifies, unless
--no-verify is given, the checkpoint's files against their checksums, each exported tensor against what was read, and the logits
of OUT in plain transformers against a plain model set from the checkpoint by name. OUT appears when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recipes.common.checkpoint.files import CheckpointError, unsealed
from recipes.common.checkpoint.position import written_position
from recipes.common.checkpoint.reader import Reader
from recipes.common.config.json_files import read_json, write_json
from recipes.common.model.initial_weights import build_empty
from recipes.common.run_dir.checkpoint_folders import holder
from recipes.common.run_dir.lease import held
from tools.checkpoint import hf_check
from tools.checkpoint.contents import damaged_weights, missized_files, open_checkpoint, row_blocks
from tools.checkpoint.hf_names import TensorGroup, natural, publish, published_groups
from tools.checkpoint.safetensors_writer import ShardsWriter, Tensor, split_into_shards, write_index
from tools.common.console import GOOD, CheckError, UsageError, human_bytes, progress_bar, quiet_transformers
from tools.common.hf_config import load_config

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/latest, or one of its steps")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; it must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: %(default)s)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="size of the largest file (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="check file sizes only, and nothing of what was written")
    limit = human_bytes(hf_check.LOGITS_LIMIT_BYTES)
    parser.add_argument("--verify-logits", action="store_true", help=f"compare logits also over {limit} of fp32 weights")


def run(args: argparse.Namespace) -> int:
    quiet_transformers()
    summary = export(
        args.checkpoint,
        args.out,
        dtype=args.dtype,
        shard_bytes=parse_size(args.shard_size),
        verify=not args.no_verify,
        always_logits=args.verify_logits,
    )
    if args.json:
        print(json.dumps(summary))
        return GOOD
    size, seconds = human_bytes(summary["bytes"]), summary["seconds"]
    print(
        f"{args.out}: step {summary['step']}, {summary['tensors']} tensors, {size} in {summary['files']} files, {seconds:.1f} s"
    )
    for line in summary["checks"]:
        print(f"  {line}")
    return GOOD


def parse_size(text: str) -> int:
    """Return the bytes of text such as 5GB, 500MB or a plain number (decimal units, as in transformers)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if not match or (match[2] and not match[2].endswith("B")) or not float(match[1]):
        raise UsageError(f"--shard-size={text}: must be a size over 0, such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS["" if match[2] == "B" else match[2]])


def export(
    checkpoint: Path, out: Path, *, dtype: str, shard_bytes: int, verify: bool = True, always_logits: bool = False
) -> dict[str, Any]:
    """Write OUT and return a summary. Raises UsageError, CheckpointError, or CheckError (then OUT is not there)."""
    started = time.perf_counter()
    checkpoint = open_checkpoint(checkpoint)
    _refuse_existing(out)
    wrong = damaged_weights(checkpoint) if verify else missized_files(checkpoint)
    if wrong:
        raise CheckpointError("this checkpoint is damaged; export another one:\n  " + "\n  ".join(wrong))
    reader = Reader(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out, out.parent, f".{out.name}.lease", "an export") as lease, _unfinished(out) as hidden:
        _refuse_existing(out)
        config = write_model_files(reader, hidden, dtype)
        checksums, shards = write_weights(reader, config, hidden, dtype, shard_bytes)
        checks = _verify(reader, hidden, checksums, dtype, always_logits=always_logits) if verify else []
        lease.confirm()
        os.replace(hidden, out)
    return {
        "out": str(out),
        "checkpoint": str(checkpoint),
        "step": reader.state["step"],
        "dtype": dtype,
        "tensors": len(checksums),
        "bytes": sum(tensor.nbytes for tensors in shards.values() for tensor in tensors),
        "files": len(shards),
        "verified": verify,
        "checks": checks,
        "seconds": round(time.perf_counter() - started, 3),
    }


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """Make the folder that becomes OUT, beside it, without what an export that was killed has left there."""
    hidden = out.with_name(f".{out.name}.unfinished")
    if hidden.exists():
        shutil.rmtree(hidden)
    hidden.mkdir()
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _verify(reader: Reader, folder: Path, checksums: dict[str, str], dtype: str, *, always_logits: bool) -> list[str]:
    """Verify the export and list what was checked, a line each. Raises CheckError."""
    hf_check.check_checksums(folder, checksums)
    done = [f"{len(checksums)} tensors on disk are what was read from the checkpoint (xxh3_128)"]
    done += hf_check.check_logits(reader, folder, getattr(torch, dtype), always=always_logits)
    return done + hf_check.check_tokenizer(folder)


def write_model_files(reader: Reader, out: Path, dtype: str) -> PreTrainedConfig:
    """Write config.json, generation_config.json, the tokenizer's files, and trifold.json (the provenance)."""
    model = reader.folder / "model"
    if extra := [name for name in unsealed(reader.folder) if name.startswith("model/")]:
        raise CheckpointError(f"{reader.folder}: the seal does not name {', '.join(extra[:5])}; nothing was exported")
    config = load_config(model)
    for path in sorted(model.iterdir()):
        shutil.copyfile(path, out / path.name)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype
    config.save_pretrained(out)
    if not (out / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(out)
    write_json(out / "trifold.json", provenance(reader, dtype))
    return config


def provenance(reader: Reader, dtype: str) -> dict[str, Any]:
    """Return which step of which run this is, and how its validation loss was measured."""
    content = {"checkpoint": reader.folder.name, "step": reader.state["step"], "dtype": dtype}
    path = reader.folder / "recipe.json"
    if path.is_file():
        recipe = read_json(path)
        content |= {
            "recipe": recipe["name"],
            "seq_len": recipe["batch"]["seq_len"],
            "evaluation_seqs": recipe["evaluation"]["seqs"],
            "consumed_tokens": written_position(reader.state).consumed_tokens(recipe["batch"]["seq_len"]),
        }
    return content


def write_weights(
    reader: Reader, config: PreTrainedConfig, out: Path, dtype: str, shard_bytes: int
) -> tuple[dict[str, str], dict[str, list[Tensor]]]:
    """Stream every tensor into safetensors files. Returns ({published name: checksum}, {file: its tensors})."""
    causal = build_empty(config, attention="eager")
    kinds = tensor_kinds(reader)
    dtypes = {name: DTYPES[dtype] if kind == "master" else _buffer_dtype(reader, name) for name, kind in kinds.items()}
    order = sorted(kinds, key=lambda name: (_alignment(dtypes[name]), natural(name)))
    groups = published_groups(causal, {name: reader.shape(name) for name in order})
    tensors = [Tensor(name, dtypes[group.sources[0]], shape) for group in groups for name, shape in group.targets]
    shards = split_into_shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    with progress_bar("exporting", total) as bar, ShardsWriter(out, shards) as writer:
        for group in groups:
            read = functools.partial(read_blocks, reader, kinds=kinds, dtype=dtype)
            for name, block in _same(group, read) if group.same else _converted(group, read, causal, reader):
                writer.write(name, block)
                bar.update(block.nbytes)
    write_index(out, shards)
    return writer.checksums, shards


def tensor_kinds(reader: Reader) -> dict[str, str]:
    """Return {tensor of the model: the kind it is stored as}, without optimizer states."""
    return {name: kind for kind in ("master", "buffer") for name in reader.names(kind)}


def read_blocks(reader: Reader, name: str, *, kinds: dict[str, str], dtype: str) -> Any:
    """Yield a tensor in blocks of rows, in its exported dtype (as raw bits where numpy has no such dtype)."""
    for block in row_blocks(reader, name, kinds[name]):
        yield cast(block, name, dtype) if kinds[name] == "master" else block


def cast(block: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """Round fp32 to `dtype`, to nearest even. Raises CheckError for a finite number beyond float16's range."""
    if dtype == "float32":
        return block
    if dtype == "bfloat16":
        return torch.from_numpy(block).to(torch.bfloat16).view(torch.int16).numpy()
    with np.errstate(over="ignore"):
        half = block.astype(np.float16)
    if np.isinf(half).any() and (np.isinf(half) & np.isfinite(block)).any():
        raise CheckError(f"{name} has elements up to {np.abs(block).max():.3g}, float16 ends at 65504; use --dtype bfloat16")
    return half


def _same(group: TensorGroup, read: Any) -> Any:
    published = group.targets[0][0]
    return ((published, block) for block in read(group.sources[0]))


def _converted(group: TensorGroup, read: Any, causal: Any, reader: Reader) -> Any:
    """Yield the tensors of a group that transformers regroups on disk; the group (one bank of experts) is in memory whole."""
    whole = {}
    for name in group.sources:
        blocks = list(read(name))
        data = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        blocks.clear()
        whole[name] = torch.from_numpy(data.reshape(reader.shape(name)))
    found = publish(causal, whole)
    for name, shape in group.targets:
        tensor = found[name]
        assert tuple(tensor.shape) == shape, name
        yield name, tensor.contiguous().numpy()


def _buffer_dtype(reader: Reader, name: str) -> str:
    return reader.tensors[name]["kinds"]["buffer"]["dtype"]


def _alignment(dtype: str) -> int:
    """Return a sort key that puts wider elements first in a file, so that all of them are aligned."""
    return {"I64": 0, "F32": 1, "BF16": 2, "F16": 2, "BOOL": 3}[dtype]


def _refuse_existing(out: Path) -> None:
    if out.name in ("", ".."):
        raise UsageError(f"{out}: the folder that you are in, or above it; give the name of a new one")
    if (kept := holder(out)) is not None:
        raise UsageError(f"{out} lies in {kept}, where nothing but checkpoints may be; export to a folder outside")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already; delete it, or export to another folder")
