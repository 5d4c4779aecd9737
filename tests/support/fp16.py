"""Allows fp16 on a CPU: DeepSpeed refuses it on most, and torch computes it on all."""

from typing import Any

import torch

from tests.support.tiny import ds_config


def fp16_config(**fields: Any) -> dict[str, Any]:
    """Return zero1_fp16.json with other fields of its fp16 block."""
    config = ds_config("zero1_fp16.json")
    return config | {"fp16": config["fp16"] | fields}


def allow_fp16() -> None:
    """Let DeepSpeed accept fp16 in this process; for a forked rank."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    supported = kind.supported_dtypes
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: list({*supported(self), torch.half})
