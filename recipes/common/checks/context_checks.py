"""Checks whether context ranks can share a model's sequences: by arithmetic, and by a trial with a tiny model of the family.

Families that mix tokens outside attention (linear attention, state spaces, convolutions, indexers) would train something else
without an error, and so would one whose attention does not go through transformers' tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from recipes.common.model.attention_tables import Attention, attach, attention_function
from recipes.common.model.decoder import PlanError
from recipes.common.parallel.context_parallel import (
    SHAREABLE,
    SPANNING,
    ContextAttention,
    attend_with_heads,
    divisors,
    head_ranks,
    local_heads,
    ranks_that_divide,
    shared_heads,
)
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import Stage, build_stage, plan_model
from recipes.common.recipe import Layout, Recipe

_SEQS, _SEQ_LEN = 2, 16
_ROUNDING = 1e-4  # half of a sequence, or of the heads, is another order of summation
_ON_CPU = ("sdpa", "eager")
_MOST_LISTED = 12


def context_option_problems(layout: Layout, seq_len: int, prefix: str = "") -> list[str]:
    """Check the context sizes of a layout whose other sizes are at least 1."""
    context, problems = layout.context, []
    if layout.context_heads < 0 or (layout.context_heads and context % layout.context_heads):
        problems.append(
            f"{prefix}context_heads={layout.context_heads} must be one of {_listed(divisors(context))} with context={context}, "
            "or 0, as many as the heads allow"
        )
    elif layout.context_heads and context == 1:
        problems.append(f"{prefix}context_heads={layout.context_heads} with context=1: nothing is shared; leave it out")
    ranks = layout.tensor if layout.sequence_parallel else 1
    if seq_len % context:
        fitting = _listed(divisors(seq_len, context))
        problems.append(
            f"{prefix}context={context}: seq_len={seq_len} is not a multiple of it; change seq_len, or use context={fitting}"
        )
    elif context > 1 and seq_len % (context * ranks):
        problems.append(
            f"{prefix}context={context}: seq_len={seq_len} is not a multiple of context={context} x tensor={ranks}, which "
            "sequence_parallel=True shares it between; change seq_len, or use sequence_parallel=False"
        )
    return problems


def context_size_problems(layout: Layout, data: int, prefix: str = "") -> list[str]:
    """Check that context ranks are whole groups of the data ranks."""
    if data % layout.context == 0:
        return []
    fitting = _listed(divisors(data, layout.context))
    return [f"{prefix}context={layout.context} does not divide {data} data ranks; use context={fitting}"]


def context_head_problems(config: PreTrainedConfig, layout: Layout, attention: str) -> list[str]:
    """Check that the context ranks can share the attention of a model whose heads the tensor ranks divide."""
    if layout.context == 1:
        return []
    if attention not in SHAREABLE:
        return [
            f"layout context={layout.context}: attention={attention!r} cannot be shared between context ranks; use attention="
            f"{_listed(map(repr, SHAREABLE))}"
        ]
    text = config.get_text_config()
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int) or not isinstance(kv_heads or heads, int) or min(heads, kv_heads or heads) < 1:
        return [
            f"layout context={layout.context}: model_type={config.model_type} has no attention heads, or another number in each "
            "layer; use context=1"
        ]
    heads, kv_heads = local_heads(config, layout.tensor)
    fitting = ranks_that_divide(layout.context, heads, kv_heads)
    if layout.context_heads and layout.context_heads not in fitting:
        return [
            f"layout context_heads={layout.context_heads}: a tensor rank's {heads} heads ({kv_heads} of keys and values) cannot "
            f"be divided so; use context_heads={_listed(fitting)}, or 0"
        ]
    spans = layout.context // head_ranks(config, layout)
    if spans > 1 and attention not in SPANNING:
        most = ranks_that_divide(heads, heads, kv_heads)[-1]
        return [
            f"layout context={layout.context}: only {layout.context // spans} of its ranks divide the heads, and attention="
            f"{attention!r} cannot begin at a later query; use context={most} at most, or attention="
            f"{_listed(map(repr, SPANNING))}"
        ]
    return []


def context_problems(recipe: Recipe, layout: Layout) -> list[str]:
    """Check that context ranks can share the attention of a recipe's model, by its heads and by a trial of its family."""
    found = context_head_problems(recipe.model, layout, recipe.attention)
    return found or context_trial_problems(recipe.model, layout, recipe.attention, mask_documents=recipe.mask_documents)


def context_trial_problems(config: PreTrainedConfig, layout: Layout, attention: str, *, mask_documents: bool) -> list[str]:
    """Check on a tiny model that only attention mixes tokens, by whole sequences, and that a part of its heads is enough.

    The second half of a sequence runs alone, with attention returning what it returned in the whole. Each attention of the whole
    also runs again, a part of its heads at a time.
    """
    family, advice = config.model_type, "use context=1"
    if layout.context == 1:
        return []
    heads = head_ranks(config, layout)
    try:
        tiny = shrink(config, Layout(tensor=layout.tensor, context=layout.context, context_heads=layout.context_heads))
        trial = _Trial(tiny, attention if attention in _ON_CPU else "sdpa", heads)
        difference = trial.run(mask_documents=mask_documents)
    except PlanError as error:
        return [f"layout context={layout.context}: {error}; {advice}"]
    except Exception as error:  # a family's own code may raise anything on half of a sequence
        return [
            f"layout context={layout.context}: a tiny {family} does not run with it ({type(error).__name__}: {error}); {advice}"
        ]
    if difference <= _ROUNDING:
        return []
    return [
        f"layout context={layout.context}: model_type={family} mixes tokens outside attention, or its attention needs all heads "
        f"or its own place in the sequence (a tiny model of it differs by {difference:.1e} on half of a sequence); {advice}"
    ]


class _Trial:
    """Runs a tiny model on whole sequences, then on their second half, and compares all that attention sees, and the output."""

    def __init__(self, config: PreTrainedConfig, attention: str, heads: int) -> None:
        self._family, self._attention, self._heads = config.model_type, attention, heads
        self._whole, self._half = (self._build(config) for _ in range(2))
        self._half.own_attention = ContextAttention(self._half.causal.config, attention, size=2, rank=1, heads=2)
        attach(self._half.causal, self._replay, self._half.own_attention.mask)
        attach(self._whole.causal, self._record, ALL_MASK_ATTENTION_FUNCTIONS[attention])
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any, torch.Tensor]] = []
        self._difference = 0.0

    def _build(self, config: PreTrainedConfig) -> Stage:
        planned = plan_model(config, Layout(context=2), attention=self._attention)  # a config of its own
        return build_stage(planned, one_process(), seq_len=_SEQ_LEN).eval()

    def run(self, *, mask_documents: bool) -> float:
        """Return the largest difference, as a part of the largest value compared."""
        ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (self._whole.vocab_size - 3) + 3
        if mask_documents:
            documents = torch.cat([torch.arange(length) for length in (5, 6, _SEQ_LEN - 11)]).expand(_SEQS, -1)
            self._whole.set_positions([documents])
            self._half.set_positions([documents])
        half = slice(_SEQ_LEN // 2, None)
        with torch.no_grad():
            whole = self._whole(ids)
            if not self._calls:
                raise PlanError(
                    f"model_type={self._family} does not call attention through transformers' table of attention functions"
                )
            self._note(self._half(ids[:, half]), whole[:, half])
        return self._difference if not self._calls else float("inf")

    def _record(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> Attention:
        scores = query.shape[1], query.shape[2], key.shape[2]
        if biases := [name for name, each in options.items() if torch.is_tensor(each) and each.shape[-3:] == scores]:
            raise PlanError(
                f"model_type={self._family}: its attention is given {', '.join(biases)} for each head, query and key, which "
                "context ranks do not share"
            )
        out = attention_function(module, self._attention)(module, query, key, value, attention_mask, **options)[0]
        heads = query.shape[1]
        parts = [t.chunk(self._heads, dim=1) for t in (query, *shared_heads(key, value, heads=heads, ranks=self._heads))]
        by_part = [
            attend_with_heads(
                self._attention,
                module,
                *part,
                attention_mask,
                options,
                heads=heads,
                first=rank * heads // self._heads,
                config=self._whole.causal.config,
            )
            for rank, part in enumerate(zip(*parts, strict=True))
        ]
        self._note(torch.cat(by_part, dim=2), out)
        self._calls.append((query, key, value, attention_mask, out))
        return out, None

    def _replay(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> Attention:
        *whole, whole_mask, out = self._calls.pop(0)
        half = slice(_SEQ_LEN // 2, None)
        for here, there in zip((query, key, value), whole, strict=True):
            self._note(here, there[:, :, half])
        both = torch.is_tensor(attention_mask) and torch.is_tensor(whole_mask)
        same = torch.equal(attention_mask, whole_mask) if both else attention_mask is whole_mask
        self._difference = max(self._difference, 0.0 if same else float("inf"))
        return out[:, half], None

    def _note(self, here: torch.Tensor, there: torch.Tensor) -> None:
        difference = (here - there).abs().max().item() / max(there.abs().max().item(), 1e-9)
        self._difference = max(self._difference, difference if difference == difference else float("inf"))


def _listed(values: Iterable[object]) -> str:
    *others, last = map(str, values)
    if len(others) > _MOST_LISTED:
        return f"{', '.join(others[:_MOST_LISTED])}, ... or {last}"
    return f"{', '.join(others)} or {last}" if others else last
