"""Exports what a tiny model was trained to, and compares its logits in plain transformers, as `checkpoint to-hf` does."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from tools.checkpoint.starting_checkpoint import starting_state, whole_part, write_checkpoint
from tools.checkpoint.to_hf import export
from tools.common.parity import Outcome
from tools.verify.family_verdict import EXPORTED

_SHARD_BYTES = 1 << 20  # several files


def try_export(config: PreTrainedConfig, trained: Outcome, tied: bool) -> str:
    """Return EXPORTED, or why the exported folder is not the trained model. In a rank of its own: it computes logits."""
    kinds: tuple[tuple[str, dict[str, torch.Tensor]], ...] = (("master", trained.parameters), ("buffer", trained.buffers))
    parts = [whole_part(name, kind, tensor.numpy()) for kind, tensors in kinds for name, tensor in tensors.items()]
    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpoint = write_checkpoint(Path(folder, "run"), [parts], starting_state(tied=tied), config, None)
            export(checkpoint, Path(folder, "hf"), dtype="float32", shard_bytes=_SHARD_BYTES, always_logits=True)
        except Exception as error:  # transformers' conversions may raise anything
            return f"its export: {type(error).__name__}: {' '.join(str(error).split())}"
    return EXPORTED
