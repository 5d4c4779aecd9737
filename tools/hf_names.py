"""The names under which a family is published, where transformers renames or regroups tensors on loading.

Mixture-of-experts families hold one bank of experts in memory and one matrix an expert on disk; GPT-NeoX's head has another
name on disk. transformers knows how to turn the one into the other, in both directions; this asks it, a few tensors at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class Group:
    """Tensors of the model that become tensors on disk together. `same`: one tensor, as it is."""

    inside: tuple[str, ...]  # names in the model and in our checkpoints
    outside: tuple[tuple[str, tuple[int, ...]], ...]  # (published name, shape)
    same: bool


def published_groups(causal: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """The smallest groups that transformers turns into published tensors independently of one another.

    causal: on the meta device. shapes: of every tensor by its name in the model, in the order wanted.
    """
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(causal, dict(meta)).items()}
    groups = [_group(causal, {name: tensor}) for name, tensor in meta.items()]
    if _union(groups) != expected:  # some published tensors need several of the model's: take a layer at a time
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in meta.items():
            layer = re.match(r".*?\.\d+(?=\.)", name)
            layers.setdefault(layer[0] if layer else name, {})[name] = tensor
        groups = [_group(causal, members) for members in layers.values()]
        assert _union(groups) == expected, "transformers joins tensors of several layers on disk"
    return groups


def publish(causal: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One group's tensors as they are published (maybe views)."""
    return revert_weight_conversion(causal, dict(tensors))


def _group(causal: PreTrainedModel, members: dict[str, torch.Tensor]) -> Group:
    found = revert_weight_conversion(causal, dict(members))
    outside = tuple((name, tuple(tensor.shape)) for name, tensor in found.items())
    only = next(iter(members))
    # a conversion may keep name and shape and still move elements: only the very same tensor is untouched
    same = len(members) == 1 and len(found) == 1 and next(iter(found.values())) is members[only]
    return Group(tuple(members), outside, same)


def _union(groups: list[Group]) -> dict[str, tuple[int, ...]]:
    return {name: shape for group in groups for name, shape in group.outside}
