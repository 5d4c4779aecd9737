"""Maps a model's tensors to the names under which its family is published, where transformers renames or regroups them.

Mixture-of-experts families hold one bank of experts in memory and one matrix an expert on disk; GPT-NeoX's head has another
name on disk; a base model's file lacks the prefix. transformers (5.23) converts both ways, for a whole state dict; this module
asks it for the smallest groups of tensors that go together, so that they can be streamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are converted together. `same`: one tensor, unchanged (perhaps under another name)."""

    sources: tuple[str, ...]
    targets: tuple[tuple[str, Shape], ...]
    same: bool


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def published_groups(causal: PreTrainedModel, shapes: Mapping[str, Shape]) -> list[TensorGroup]:
    """Group the model's tensors as they are saved: sources are names in the model, targets those on disk.

    causal: on the meta device. shapes: every tensor's, by its name in the model, in the order wanted.
    """
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    saved = publish(causal, meta)
    # a conversion may keep name and shape and still move elements: only the very same tensor is untouched
    names = {id(tensor): name for name, tensor in meta.items()}
    same = {names[id(tensor)]: target for target, tensor in saved.items() if id(tensor) in names}
    rest = {name: tensor for name, tensor in meta.items() if name not in same}
    expected = {target: tuple(tensor.shape) for target, tensor in saved.items() if id(tensor) not in names}
    converted = [_converted_group(causal, {name: tensor}) for name, tensor in rest.items()]
    if _union(converted) != expected:  # some published tensors need several of the model's: take a layer at a time
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in rest.items():
            layer = re.match(r".*?\.\d+(?=\.)", name)
            layers.setdefault(layer[0] if layer else name, {})[name] = tensor
        converted = [_converted_group(causal, members) for members in layers.values()]
        assert _union(converted) == expected, "transformers joins tensors of several layers on disk"
    groups = {group.sources[0]: group for group in converted}
    groups |= {name: TensorGroup((name,), ((target, tuple(shapes[name])),), True) for name, target in same.items()}
    return [groups[name] for name in shapes if name in groups]


def publish(causal: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert one group's tensors to what is saved (perhaps views)."""
    return revert_weight_conversion(causal, dict(tensors))


def _converted_group(causal: PreTrainedModel, members: dict[str, torch.Tensor]) -> TensorGroup:
    return TensorGroup(tuple(members), tuple(_shapes(publish(causal, members)).items()), False)


def _union(groups: Iterable[TensorGroup]) -> dict[str, Shape]:
    return {name: shape for group in groups for name, shape in group.targets}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class Adopter:
    """Converts tensors on disk to those of the model."""

    def __init__(self, causal: PreTrainedModel) -> None:
        """causal: on the meta device."""
        mapping = get_model_conversion_mapping(causal)
        self._causal = causal
        self._inside = causal.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def groups(self, shapes: Mapping[str, Shape]) -> list[TensorGroup]:
        """Group tensors on disk: sources are names on disk, targets those in the model (or unknown to it)."""
        plain, joined = [], {}
        for name in sorted(shapes, key=natural):
            target, pattern = self._rename(name)
            if pattern is None:
                plain.append(TensorGroup((name,), ((target, tuple(shapes[name])),), True))
            else:
                joined.setdefault(target, []).append(name)
        for names in joined.values():
            found = self.adopt({name: torch.empty(shapes[name], device="meta") for name in names})
            plain.append(TensorGroup(tuple(names), tuple(_shapes(found).items()), False))
        return plain

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert one group's tensors to the model's. Raises ValueError where transformers cannot join them."""
        converter, target = None, ""
        for name, tensor in tensors.items():
            target, pattern = self._rename(name)
            converter = converter or deepcopy(self._by_pattern[pattern])
            converter.add_tensor(target, name, pattern, tensor)
        try:
            found = converter.convert(target, model=self._causal, config=self._causal.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{', '.join([*tensors][:3])}, ...: transformers cannot join them: {error}") from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}

    def _rename(self, name: str) -> tuple[str, str | None]:
        """Rename as transformers' convert_and_load_state_dict_in_model does; it adds a missing prefix of the base model."""
        prefix = self._causal.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._inside)
        if target not in self._inside and name in self._inside:
            target, pattern = rename_source_key(name, [], [], prefix, self._inside)
        return target, pattern


def parameter_aliases(causal: PreTrainedModel) -> dict[str, str]:
    """Return {other name of a tied parameter: its first name}."""
    first = {id(parameter): name for name, parameter in causal.named_parameters()}
    named = causal.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in named if first[id(parameter)] != name}


def model_shapes(causal: PreTrainedModel) -> tuple[dict[str, Shape], dict[str, torch.Tensor]]:
    """Return (shape of every parameter, persistent buffers), by name in the model, tied ones once."""
    persistent = set(causal.state_dict())
    parameters = {name: tuple(parameter.shape) for name, parameter in causal.named_parameters()}
    return parameters, {name: buffer for name, buffer in causal.named_buffers() if name in persistent}
