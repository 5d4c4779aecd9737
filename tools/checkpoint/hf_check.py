"""Verifies an exported folder before tools.checkpoint to-hf gives it its name: bytes, logits, tokenizer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.initialization import no_init_weights

from recipes.common.checkpoint.reader import Reader
from recipes.common.config.json_files import read_json
from tools.common.console import CheckError, human_bytes, progress_bar
from tools.common.hf_config import load_config

LOGITS_LIMIT_BYTES = 4_000_000_000  # fp32 weights; comparing logits takes that much memory, and a while
MAPPED_BYTES = 1 << 25
SEQS, TOKENS = 2, 24


def check_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Read every tensor again from the files, by their own headers. Raises CheckError naming what differs."""
    paths, stored = sorted(folder.glob("*.safetensors")), set()
    with progress_bar("verifying", sum(path.stat().st_size for path in paths)) as bar:
        for path in paths:
            for name, tensor in _tensors_of(path):
                data = tensor.reshape(-1).view(torch.uint8).numpy()
                if xxhash.xxh3_128(data).hexdigest() != checksums.get(name):
                    raise CheckError(f"{path}: {name} is not what was read from the checkpoint")
                stored.add(name)
                bar.update(data.nbytes)
    if missing := sorted(checksums.keys() - stored):
        raise CheckError(f"{folder} lacks tensors that were written: {missing[:5]}")


def _tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's tensors, mapped into memory. The mapping is renewed now and then, or the whole file would stay in it."""
    try:
        with safe_open(path, "pt") as file:
            names = deque(file.offset_keys())
        while names:
            with safe_open(path, "pt") as file:
                mapped = 0
                while names and mapped < MAPPED_BYTES:
                    tensor = file.get_tensor(names[0])
                    mapped += tensor.nbytes
                    yield names.popleft(), tensor
    except SafetensorError as error:
        raise CheckError(f"{path}: not a whole safetensors file ({error})") from None


def check_logits(reader: Reader, folder: Path, dtype: torch.dtype, *, always: bool) -> list[str]:
    """Compare the logits of `folder`, loaded by plain transformers, with those of a plain model set from the checkpoint by name.

    The latter's weights are rounded to `dtype`; both compute in fp32 and must be equal bit for bit. How far the rounding itself
    changes the logits is reported, not judged. One model is in memory at a time. Raises CheckError; returns lines for the user.
    """
    elements = sum(math.prod(reader.shape(name)) for name in reader.names("master"))
    if 4 * elements > LOGITS_LIMIT_BYTES and not always:
        size, limit = human_bytes(4 * elements), human_bytes(LOGITS_LIMIT_BYTES)
        return [f"logits not compared: {size} of fp32 weights exceed {limit}; --verify-logits compares them anyway"]
    config = load_config(reader.folder / "model")
    ids = _random_ids(config)
    exported = _exported_logits(folder, ids)
    model = plain_model(config)
    set_weights(model, reader, dtype)
    reference = _logits(model, ids)
    if not torch.equal(exported.nan_to_num(7.0), reference.nan_to_num(7.0)):
        difference = (exported - reference).abs().max().item()
        raise CheckError(f"logits of the exported model differ from the checkpoint's by up to {difference:.3g}")
    if not reference.isfinite().all():
        return ["logits equal the checkpoint's own, but are not finite: the run had diverged"]
    lines = ["logits in plain transformers equal those of the checkpoint's weights bit for bit (computed in fp32)"]
    if dtype != torch.float32:
        set_weights(model, reader, torch.float32)
        full = _logits(model, ids)
        change = ((full - reference).square().mean().sqrt() / full.std()).item()
        lines.append(f"rounding to {str(dtype).removeprefix('torch.')} changes logits by {change:.2%} of their spread")
    return lines


def check_tokenizer(folder: Path) -> list[str]:
    """Check that AutoTokenizer loads the tokenizer, with no more ids than the model has rows. Raises CheckError."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return ["no tokenizer in the checkpoint, so none in the export"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise CheckError(f"AutoTokenizer does not load the exported tokenizer: {error}") from error
    rows = read_json(folder / "config.json").get("vocab_size", len(tokenizer))
    if len(tokenizer) > rows:
        raise CheckError(f"the tokenizer has {len(tokenizer)} ids, the model's vocabulary {rows}")
    return [f"AutoTokenizer loads the tokenizer ({len(tokenizer)} ids)"]


def plain_model(config: PreTrainedConfig) -> nn.Module:
    """Return an AutoModelForCausalLM in fp32 with undefined weights: every one must be set."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    model.tie_weights()
    return model


@torch.no_grad()
def set_weights(model: nn.Module, reader: Reader, dtype: torch.dtype = torch.float32) -> None:
    """Set the weights by name, rounded to `dtype`. Raises CheckError when names or shapes do not match one to one."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    persistent = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    buffers |= {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    stored = {"master": set(reader.names("master")), "buffer": set(reader.names("buffer"))}
    for kind, tensors in (("master", wanted), ("buffer", buffers)):
        if stored[kind] != tensors.keys():
            names = sorted(stored[kind] ^ tensors.keys())
            raise CheckError(f"the checkpoint's tensors are not this model's: {', '.join(names[:5])}")
        for name, tensor in tensors.items():
            value = torch.from_numpy(reader.whole(name, kind))
            tensor.copy_(value.to(dtype) if kind == "master" else value)


def _exported_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    if wrong:
        raise CheckError(f"plain transformers does not load the export cleanly: {wrong}")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # mapped from the file it lies at any byte, where a kernel may round otherwise
    return _logits(model.eval(), ids)


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _random_ids(config: PreTrainedConfig) -> torch.Tensor:
    text = config.get_text_config()
    tokens = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
    return torch.from_numpy(np.random.default_rng(0).integers(0, text.vocab_size, (SEQS, tokens)))
