"""Trains a tiny model of the recipe's own proportions for one step, before a run: what would end the run later is told here.

The same model shows whether it is causal. A model that reads later tokens learns to copy them: its loss falls, and it is
worth nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import field_of, shallow, shrink
from recipes.common.pipeline.stage import Stage, build_stage, plan_model
from recipes.common.recipe import Layout

_SEQS, _SEQ_LEN = 2, 16
_ROUNDING = 1e-5  # of the largest logit: experts that get other tokens sum in another order
_MOST_PARAMETERS = 200_000_000  # of a model that is tried at its own widths
# fields that make a family's attention causal, and the values that do; which one helps is tried
_DIRECTIONS = {
    "is_decoder": True,
    "is_causal": True,
    "causal": True,
    "use_bidirectional_attention": None,
    "bidirectional": False,
    "attn_type": "uni",
    "prefix_lm": False,
}


def trial_problems(config: PreTrainedConfig, attention: str) -> list[str]:
    """Return why the family cannot be trained with this config: its forward or backward pass fails, or it sees the future."""
    kind, failed, shown = type(config).__name__, "", False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        for small, faithful in _candidates(config, attention):
            try:
                return _problems_of(small, kind, attention)
            except Exception as failure:  # a family's own code may raise anything
                failed, shown = _failure(kind, failure), shown or faithful
    hint = _misfit(config)
    return [failed + hint] if failed and (shown or hint) else []


def _candidates(config: PreTrainedConfig, attention: str) -> Iterator[tuple[PreTrainedConfig, bool]]:
    """Yield small models of a config, the smallest first, and whether they have its own widths: then a failure is its own."""
    for make, faithful in ((lambda: shrink(config, Layout()), False), (lambda: shallow(config), True), (lambda: config, True)):
        try:
            small = make()
            count = sum(p.numel() for p in build_empty(small, _on_cpu(small, attention)).parameters())
        except Exception:  # cut down so, the family's parts do not fit together; whole, they do, or the check would have said so
            continue
        if not faithful or count <= _MOST_PARAMETERS:
            yield small, faithful


def _failure(kind: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"model={kind}: a small model of it does not train a step ({type(error).__name__}: {text})"


def _misfit(config: PreTrainedConfig) -> str:
    """Name fields of the config that do not fit together, with the cure."""
    heads, kv_heads = field_of(config, "num_attention_heads"), field_of(config, "num_key_value_heads")
    width, pad = field_of(config, "head_dim"), field_of(config, "pad_token_id")
    found = []
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
        found.append(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: use one that does")
    if isinstance(width, int) and width % 2:
        found.append(f"head_dim={width} is odd: rotations need pairs; use an even one")
    if isinstance(pad, int) and not -config.vocab_size <= pad < config.vocab_size:
        found.append(f"pad_token_id={pad} is beyond vocab_size={config.vocab_size}: use None, or an id of the tokenizer")
    return "".join(f"; model.{each}" for each in found)


def _problems_of(tiny: PreTrainedConfig, kind: str, attention: str) -> list[str]:
    """Train one step and probe; raises whatever the family's code raises."""
    stage = _stage_of(tiny, attention)
    problems = _causality_problems(stage, tiny, kind, attention)
    named = dict(stage.hf_named_parameters())
    if apart := sorted(named.keys() - stage.whole_shapes.keys()):
        problems.append(
            f"model={kind}: transformers gives {apart[0]} a second name, and only a head that is tied to the embedding may share "
            "its weight here: the two would be trained apart; use another family"
        )
    if frozen := [name for name, parameter in named.items() if not parameter.requires_grad]:
        problems.append(
            f"model={kind}: {_some(frozen)} never trained (transformers freezes them, or updates them by a rule of its own), "
            "which a run's optimizer and checkpoints do not provide for; use another family"
        )
    ids = _ids(stage)
    loss = stage.train()(ids, labels=(ids.roll(-1, dims=1), torch.tensor(1.0 / ids.numel())))
    loss.backward()
    if not math.isfinite(loss.item()):
        numbers = {name: value for name, value in tiny.to_dict().items() if isinstance(value, float)}
        default = type(tiny)().to_dict()
        odd = ", ".join(f"{name}={value}" for name, value in numbers.items() if default.get(name) != value) or "its numbers"
        problems.append(f"model={kind}: the first loss of a small model of it is {loss.item()}; correct {odd}")
    return problems


def untrained_parameters(config: PreTrainedConfig, attention: str) -> list[str]:
    """Return the parameters of a tiny model that get no gradient from the loss; none where it cannot be tried."""
    try:
        stage = _stage_of(shrink(config, Layout()), attention).train()
        ids = _ids(stage)
        stage(ids, labels=(ids, torch.tensor(1.0))).backward()
    except Exception:  # as in trial_problems
        return []
    return [name for name, parameter in stage.hf_named_parameters() if parameter.grad is None]


def _causality_problems(stage: Stage, tiny: PreTrainedConfig, kind: str, attention: str) -> list[str]:
    share = _seen_ahead(stage, attention)
    if not share > _ROUNDING:
        return []
    cures = [f"set {name}={value!r}" for name, value in _directions(tiny) if _is_causal(tiny, {name: value}, attention)]
    seen = f"by {share:.2g} times the largest" if math.isfinite(share) else f"with attention={attention!r}"
    return [
        f"model={kind} sees the future: in a small model of it, a later token changes an earlier token's logits {seen}, so it "
        "would learn to copy what it should predict; " + (" or ".join(cures) or "use a causal family")
    ]


def _seen_ahead(stage: Stage, attention: str) -> float:
    """Return `sees_ahead`, or infinity where only the GPU's kernels would: they ask the module, and are given no mask."""
    bidirectional = any(getattr(module, "is_causal", True) is False for module in stage.modules())
    return math.inf if attention.startswith("flash") and bidirectional else sees_ahead(stage)


def sees_ahead(stage: Stage) -> float:
    """Return by how much later tokens change earlier ones' logits, as a share of the largest logit."""
    stage.eval()
    ids, vocab = _ids(stage), stage.vocab_size
    worst = 0.0
    with torch.no_grad():
        before = stage.logits(stage(ids))
        for start in (1, _SEQ_LEN // 2, _SEQ_LEN - 1):
            changed = ids.clone()
            changed[:, start:] = (changed[:, start:] + vocab // 2) % vocab
            after = stage.logits(stage(changed))
            worst = max(worst, ((after - before)[:, :start].abs().max() / before.abs().max()).item())
    return worst


def _directions(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    fields = config.to_dict()
    return ((name, value) for name, value in _DIRECTIONS.items() if name in fields and fields[name] != value)


def _is_causal(tiny: PreTrainedConfig, change: dict[str, Any], attention: str) -> bool:
    fields = {
        name: value for name, value in tiny.to_dict().items() if name not in ("model_type", "transformers_version", "dtype")
    }
    try:
        stage = _stage_of(type(tiny)(**fields | change), attention)
        return _seen_ahead(stage, attention) <= _ROUNDING
    except Exception:  # the family may not take the value
        return False


def _stage_of(config: PreTrainedConfig, attention: str) -> Stage:
    return build_stage(plan_model(config, attention=_on_cpu(config, attention)), one_process(), seq_len=_SEQ_LEN)


def _on_cpu(config: PreTrainedConfig, attention: str) -> str:
    """Return an implementation that computes on a CPU what `attention` computes on a GPU."""
    if not attention.startswith(("flash", "flex")):
        return attention
    try:
        build_empty(config, "sdpa")
    except Exception:  # the family has no other
        return "eager"
    return "sdpa"


def _ids(stage: Stage) -> torch.Tensor:
    first = 3 if stage.vocab_size > 8 else 0  # ids below may be special
    return torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (stage.vocab_size - first) + first


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return names[0] + more
