"""Measures what each layer holds for its backward pass, and in it: runs the layers both ways on tensors that have shapes but no
memory.

Every storage that autograd saves is counted once, and in the backward pass as long as it lives, so no family, attention or
precision needs a formula. A 70B model takes about a second on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.common.model.attention_tables import attach
from recipes.common.model.decoder import PlanError, Stack, find_stack
from recipes.common.model.document_bounds import no_questions
from recipes.common.model.fusion import fuse_layer
from recipes.common.model.linears import route_products
from recipes.common.model.token_chunks import chunk_tokens, find_mlp
from recipes.common.model.varlen_attention import VARLEN, built_as
from recipes.common.parallel.tensor_plans import tensor_plan
from recipes.common.pipeline.placeholders import Placeholder
from tools.plan.layer_log import Bytes, LayerBytes, LayerLog, sum_bytes
from tools.plan.rehearsal.attention_kernels import attend


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that the parts of a model hold of one sequence."""

    layers: tuple[LayerBytes, ...]
    after: Bytes  # from the forward to the backward pass of what lies between the last layer and the head


def model_activations(
    config: PreTrainedConfig,
    *,
    seq_len: int,
    dtype: torch.dtype,
    attention: str,
    kernels: str = "none",
    mlp_tokens: int = 0,
    fake: bool = True,
) -> ModelBytes:
    """Return the bytes that every decoder layer holds of one sequence. `fake=False` computes with real tensors, for comparison.

    One layer of each kind runs; all do in families whose layers cannot be replaced by placeholders. mlp_tokens: of the sequence,
    for so many of which an MLP runs at a time; 0: for all.
    """
    changes = _Changes(kernels, mlp_tokens)
    try:
        return _measure(config, seq_len, dtype, attention, changes, fake, every_layer=False)
    except Exception:  # a family's code may raise anything over a placeholder; over its own layers it reaches the user
        return _measure(config, seq_len, dtype, attention, changes, fake, every_layer=True)


@dataclass(frozen=True)
class _Changes:
    """How training changes a layer."""

    kernels: str
    mlp_tokens: int

    def make(self, layer: nn.Module, log: LayerLog) -> None:
        if self.kernels == "compile":
            route_products(layer, by_torch=True)
            fuse_layer(layer)
        if self.mlp_tokens:
            mlp = find_mlp(layer)
            chunk_tokens(mlp, self.mlp_tokens)
            mlp.register_forward_pre_hook(lambda _, args: log.keep(args[0]))
        layer.forward = partial(log.run, layer.forward)


def _measure(
    config: PreTrainedConfig, seq_len: int, dtype: torch.dtype, attention: str, change: _Changes, fake: bool, *, every_layer: bool
) -> ModelBytes:
    width, config = config.get_text_config().hidden_size, copy.deepcopy(config)  # whose attention may be replaced
    memoryless = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    # on the meta device, which asks less of each of a deep model's layers: most of them are not to run
    empty = fake and not every_layer
    options = {"dtype": dtype, "attn_implementation": built_as(attention)}
    with torch.device("meta") if empty else memoryless, no_init_weights() if fake else nullcontext():
        causal = AutoModelForCausalLM.from_config(config, **options, trust_remote_code=False).train()
    with memoryless, _latent_attention() if fake else nullcontext(), no_questions(documents=False):
        if attention == VARLEN:  # what its kernel saves is what the causal one saves
            attach(causal, ALL_ATTENTION_FUNCTIONS["sdpa"], lambda **_: None)
        stack = find_stack(causal)
        layers, styles = causal.get_submodule(stack.layers), _styles(causal, stack)
        kinds = list(range(len(layers))) if every_layer else [_kind(layer) for layer in layers]
        own = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index]
        for index in set(range(len(layers))).difference(own):
            layers[index] = Placeholder(layers[index])
        if empty:
            _hold(causal)
        logs: dict[int, LayerLog] = {}
        for index in own:
            logs[index] = LayerLog(layers[index], width)
            change.make(layers[index], logs[index])
            logs[index].gather(*_gathered_blocks(causal, f"{stack.layers}.{index}.", styles))
        after = [(causal.get_submodule(name), LayerLog(causal.get_submodule(name), width)) for name in stack.after]
        for module, log in after:
            if change.kernels == "compile":
                fuse_layer(module)
            module.forward = partial(log.run, module.forward)
        layers[0].register_forward_hook(lambda layer, args, output: _return_alike(layers, output))
        causal.get_submodule(stack.base)(input_ids=torch.zeros(1, seq_len, dtype=torch.long), use_cache=False)
    measured = {index: log.measured() for index, log in logs.items()}
    return ModelBytes(tuple(measured[kinds.index(kind)] for kind in kinds), sum_bytes(log.measured().saved for _, log in after))


def _hold(causal: PreTrainedModel) -> None:
    """Put what is left of a model on the CPU, as tensors of the mode that is on."""
    held: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in causal.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
                module._parameters[name] = held.setdefault(parameter, new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


@contextmanager
def _latent_attention() -> Iterator[None]:
    """Let values narrower than keys be attended to as on a GPU: a CPU's kernel would compute the whole score matrix."""
    plain = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        by = plain if value.shape[-1] == query.shape[-1] else attend
        return by(query, key, value, *args, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _styles(causal: PreTrainedModel, stack: Stack) -> dict[str, str]:
    try:
        return tensor_plan(causal, stack)
    except PlanError:  # no tensor ranks, then
        return {}


def _gathered_blocks(causal: PreTrainedModel, prefix: str, styles: dict[str, str]) -> Iterator[list[nn.Module]]:
    """Yield a layer's modules that gather their outputs from the tensor ranks, and those that split their inputs again."""
    for kinds in (("colwise_gather_output", "colwise_rep"), ("rowwise_split_input", "rowwise_rep")):
        names = [name for name, style in styles.items() if style in kinds and name.startswith(prefix)]
        yield [causal.get_submodule(name) for name in names]


def _return_alike(layers: nn.ModuleList, output: Any) -> None:
    """Let placeholders return what a layer returns: hidden states, or a tuple that begins with them."""
    for layer in layers:
        if isinstance(layer, Placeholder):
            layer.outputs = len(output) if isinstance(output, tuple) else 0


def _kind(layer: nn.Module) -> tuple:
    """Identify layers that save the same bytes: same class, submodules, shapes and attention window."""
    parts = tuple(
        (name, type(module).__name__, getattr(module, "sliding_window", None)) for name, module in layer.named_modules()
    )
    return type(layer).__name__, parts, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
