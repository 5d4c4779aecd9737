"""Says which sizes in a model's config no model can have, before anything is built of them."""

from __future__ import annotations

import re
from typing import Any

MOST_LAYERS, MOST_EXPERTS = 10_000, 1_000_000  # each layer is a module, or several; experts are rows of tensors
_COUNTS = re.compile(r"n_?layers?|n_?blocks?|(?:.*_)?(?:num_\w*)?(?:layers|blocks|experts)|(?:\w+_)?depth")


def size_problem(content: dict[str, Any]) -> str:
    """Return which count of layers, blocks or experts in a config, at any depth, is none that a model can have; "" if none."""
    todo: list[Any] = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            for key, count in value.items():
                if not isinstance(key, str) or not _COUNTS.fullmatch(key) or isinstance(count, bool):
                    continue
                most = MOST_EXPERTS if key.endswith("experts") else MOST_LAYERS
                if isinstance(count, int | float) and not 0 <= count <= most:
                    return f"{key}={count}: must be from 0 to {most}"
    return ""
