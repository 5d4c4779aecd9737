"""Finds the parts of a Hugging Face decoder: embeddings, the stack of layers, final norm and head.

`transformers` configs carry `base_model_pp_plan`, the modules before, in and after the stack of layers: it says where a model
may be partitioned. Families without one either have a stack that can be read off the module tree (embeddings, one list of layers,
one final norm) or an entry below.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# (before the layers, after the layers), relative to the module that holds the list of layers.
BUILT_IN_STACK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bloom": (("word_embeddings", "word_embeddings_layernorm"), ("ln_f",)),
}

# Fields that change how a model computes outside training alone, and for that reach into every layer, and the value that does
# not: rwkv halves weights and hidden states against overflows of fp16.
ONLY_INFERENCE = {"rescale_every": 0}


class PlanError(ValueError):
    """Raised for a family that cannot be sharded or partitioned as asked; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The names of a decoder's parts, from the ForCausalLM's root."""

    base: str  # the base model, e.g. "model"
    layers: str  # the list of layers, e.g. "model.layers"
    before: tuple[str, ...]  # modules that only the first stage runs (embeddings)
    after: tuple[str, ...]  # modules that only the last stage runs (the final norm)
    embedding: str  # the input embedding
    head: str  # the output embedding
    tied: bool  # head and embedding are one weight


def find_stack(causal: PreTrainedModel) -> Stack:
    """Find the parts of `causal` (a ForCausalLM, on any device).

    Raises PlanError if it has no single stack of layers.
    """
    base_name = next((name for name, child in causal.named_children() if isinstance(child, PreTrainedModel)), None)
    if base_name is None:
        raise PlanError(f"{type(causal).__name__} has no base model apart from its head")
    base = causal.get_submodule(base_name)
    family, depth = causal.config.model_type, causal.config.num_hidden_layers
    stacks = {name: len(module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    lists = [name for name, length in stacks.items() if length == depth]
    lists = [name for name in lists if name.count(".") == min(n.count(".") for n in lists)]
    pp_plan = getattr(type(causal.config), "base_model_pp_plan", None) or {}
    # a plan names its list also where the config counts other layers (LongCat's have two attentions each)
    lists = [name for name in lists if name in pp_plan] or lists or [name for name in stacks if name in pp_plan]
    if len(lists) != 1:
        raise PlanError(f"model_type={family}: expected one list of {depth} layers, found {lists or 'none'}")
    holder = base.get_submodule(lists[0].rpartition(".")[0])
    leaf = lists[0].rpartition(".")[2]
    if leaf in pp_plan:
        names = list(pp_plan)
        before, after = tuple(names[: names.index(leaf)]), tuple(names[names.index(leaf) + 1 :])
    elif family in BUILT_IN_STACK:
        before, after = BUILT_IN_STACK[family]
    else:
        before, after = _read_off_stack(holder, leaf, causal.get_input_embeddings())
    prefix = ".".join(filter(None, (base_name, lists[0].rpartition(".")[0])))
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if head is None:
        raise PlanError(f"{type(causal).__name__} has no output embedding to compute a loss with")
    return Stack(
        base=base_name,
        layers=f"{base_name}.{lists[0]}",
        before=tuple(f"{prefix}.{name}" for name in before if hasattr(holder, name)),
        after=tuple(f"{prefix}.{name}" for name in after if hasattr(holder, name)),
        embedding=_name_of(causal, embedding),
        head=_name_of(causal, head),
        tied=head.weight is embedding.weight,
    )


def _read_off_stack(holder: nn.Module, leaf: str, embedding: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (before, after): embeddings run before the layers; one other module that follows them can only be the final norm.

    Others are not named: a pipeline's trial tells which stage computes with them. embedding: the model's; what holds it is one
    too.
    """
    children = [n for n, m in holder.named_children() if n == leaf or any(True for _ in m.parameters())]
    modules = {n: holder.get_submodule(n) for n in children if n != leaf}
    before = tuple(n for n, m in modules.items() if isinstance(m, nn.Embedding) or embedding in m.modules())
    others = [n for n in modules if n not in before]
    after = tuple(n for n in others if children.index(n) > children.index(leaf))
    return before, after if len(others) == 1 else ()


def _name_of(root: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in root.named_modules() if module is wanted)
