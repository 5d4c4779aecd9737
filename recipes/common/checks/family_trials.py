"""Checks on a tiny model of a family, before a run, that partitioning it or masking its documents does not change its results.

Some decoders hand on, between their layers, what no stage can send (parameters used twice, state kept in modules); partitioned
into stages, they would train something else without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from recipes.common.config.placement import placement_of
from recipes.common.model.attention_tables import attach
from recipes.common.model.decoder import PlanError
from recipes.common.model.document_bounds import no_questions
from recipes.common.model.flops import layer_costs
from recipes.common.model.varlen_attention import VARLEN, attend
from recipes.common.parallel.grid import Grid, one_process
from recipes.common.parallel.tiny_model import is_tiny, shrink
from recipes.common.pipeline.carrier import MORE_THAN_PARTS
from recipes.common.pipeline.crossings import find_crossings
from recipes.common.pipeline.partition import partition_layers
from recipes.common.pipeline.stage import PlannedModel, Stage, build_stage, plan_model
from recipes.common.recipe import Layout

_SEQS, _SEQ_LEN = 2, 16
_DOCUMENTS = ((5, 11), (13, 3))  # their lengths, in each of _SEQS sequences
_ROUNDING = 1e-4  # another mask is another order of summation


def partition_problems(config: PreTrainedConfig, layout: Layout, attention: str) -> list[str]:
    """Check that the stages, one after another, give what the whole model gives, to the last bit."""
    family = config.model_type
    if layout.pipeline == 1:
        return []
    advice = "use pipeline=1 (ZeRO 1 to 3 and tensor parallelism remain)"
    try:
        count = layout.pipeline * (2 if placement_of(layout).folded else 1)  # chunks that go around are cut as stages are
        tiny = config if is_tiny(config) else shrink(config, Layout(pipeline=count))
        ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (tiny.vocab_size - 3) + 3
        whole = build_stage(plan_model(tiny, attention=attention), one_process(), seq_len=_SEQ_LEN).eval()
        with torch.no_grad():
            wanted = whole(ids)
    except Exception as error:  # a family's own code may raise anything on the tiny model; nothing is shown then
        return [f"model_type={family}: a tiny model of it does not run ({type(error).__name__}: {error}); {advice}"]
    try:
        hidden = ids
        for stage in _stages(tiny, attention, count):
            with torch.no_grad():
                hidden = stage(hidden)
    except PlanError as error:
        return [f"{error}; {advice}"]
    except Exception as error:  # as above, but the whole did run: it is the partition that fails
        return [f"model_type={family} cannot be partitioned into stages ({type(error).__name__}: {error}); {advice}"]
    difference = (hidden - wanted).abs().max().item()
    if difference == 0.0 and not _shares_layers(whole):
        return []
    return [
        f"model_type={family} cannot be partitioned into stages: its layers share more than hidden states (in {count} parts, a "
        f"tiny model of it differs by {difference:.1e}, or two layers share weights); {advice}"
    ]


def masking_problems(config: PreTrainedConfig, attention: str) -> list[str]:
    """Check that two packed documents, marked by positions that restart, give what each gives alone.

    State-space and linear-attention layers, for example, carry their state across the boundary, whatever the positions are.
    """
    family = config.model_type
    try:
        tiny = shrink(config, Layout())
        ids = torch.arange(_SEQ_LEN).view(1, _SEQ_LEN) % (tiny.vocab_size - 3) + 3
        half = torch.arange(_SEQ_LEN // 2).repeat(2).view(1, _SEQ_LEN)
        stage = build_stage(plan_model(tiny, attention=attention), one_process(), seq_len=_SEQ_LEN).eval()
        with torch.no_grad(), no_questions(documents=attention != VARLEN):
            stage.set_positions([half])
            packed = stage(ids)[:, _SEQ_LEN // 2 :]
            alone = stage(ids[:, _SEQ_LEN // 2 :])
        difference = (packed - alone).abs().max().item()
    except Exception as error:  # a family's own code may raise anything on the tiny model; nothing is shown then
        advice = "turn it off" + (", or use attention='sdpa'" if attention == VARLEN else "")
        return [f"mask_documents=True: a tiny {family} does not run with it ({type(error).__name__}: {error}); {advice}"]
    if difference <= _ROUNDING * packed.abs().max().item():
        return []
    return [
        f"mask_documents=True: model_type={family} does not keep documents apart (in a tiny model of it, output changes by "
        f"{difference:.1e} with the neighbouring document); turn it off"
    ]


def varlen_problems(config: PreTrainedConfig, attention: str, *, mask_documents: bool) -> list[str]:
    """Check that attention without masks gives what "sdpa" gives: of whole sequences with a window, of documents one by one."""
    family, advice = config.model_type, "use attention='sdpa'"
    if attention != VARLEN:
        return []
    try:
        tiny = shrink(config, Layout())
        ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (tiny.vocab_size - 3) + 3
        plain = build_stage(plan_model(tiny, attention="sdpa"), one_process(), seq_len=_SEQ_LEN).eval()
        with torch.no_grad(), no_questions(documents=False):
            wanted = [plain(ids)]
            if mask_documents:
                parts = [row.split(lengths) for row, lengths in zip(ids, _DOCUMENTS, strict=True)]
                wanted.append(torch.stack([torch.cat([plain(part[None])[0] for part in each]) for each in parts]))
    except Exception:  # a family's own code may raise anything on the tiny model; nothing is shown then
        return []
    try:
        found = _without_masks(tiny, ids, documents=mask_documents)
    except PlanError as error:
        return [f"attention='varlen': model_type={family}: {error}; {advice}"]
    except Exception as error:  # as above, but "sdpa" did run: it does not take what stands for a mask
        return [f"attention='varlen': a tiny {family} does not run with it ({type(error).__name__}: {error}); {advice}"]
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))
    if difference <= _ROUNDING:
        return []
    return [
        f"attention='varlen': attention of model_type={family} is more than causal with a window (a tiny model of it differs by "
        f"{difference:.1e} from attention='sdpa'); {advice}"
    ]


def _without_masks(config: PreTrainedConfig, ids: torch.Tensor, *, documents: bool) -> list[torch.Tensor]:
    """Run a model with attention="varlen" on whole sequences, and with `documents` on documents. Raises PlanError if it does not
    ask for its attention."""
    stage = build_stage(plan_model(config, attention=VARLEN), one_process(), seq_len=_SEQ_LEN).eval()
    called = []
    attach(stage.causal, lambda *args, **options: called.append(1) or attend(*args, **options), stage.own_attention.mask)
    found = []
    with torch.no_grad(), no_questions(documents=False):
        found.append(stage(ids))
        if documents:
            stage.set_positions([torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in _DOCUMENTS])])
            found.append(stage(ids))
    if not called:
        raise PlanError("it does not call attention through transformers' table of attention functions")
    return found


def sequence_problems(config: PreTrainedConfig, layout: Layout, attention: str) -> list[str]:
    """Check that, outside the blocks that gather the sequence, a layer treats each token by itself.

    On a tiny model each layer runs on half of a sequence, with its blocks returning half of what they returned for the whole.
    """
    family, advice = config.model_type, "use sequence_parallel=False"
    if not layout.sequence_parallel or layout.tensor == 1:
        return []
    try:
        tiny = shrink(config, Layout(tensor=layout.tensor))
        model = plan_model(tiny, attention=attention)
        each = [range(index, index + 1) for index in range(tiny.num_hidden_layers)]
        if layout.pipeline > 1 and find_crossings(model.causal, model.stack, attention, each).messages:
            return [f"sequence_parallel=True with pipeline={layout.pipeline}: model_type={family}: {MORE_THAN_PARTS}; {advice}"]
        stage = build_stage(model, one_process(), seq_len=_SEQ_LEN).eval()
        blocks = plan_model(tiny, Layout(tensor=layout.tensor, sequence_parallel=True), attention=attention).tensor_plan.blocks
        difference = _halves_differ(stage, blocks)
    except PlanError as error:
        return [f"sequence_parallel=True: {error}; {advice}"]
    except Exception as error:  # a family's own code may raise anything on half of a sequence
        return [f"sequence_parallel=True: a tiny {family} does not run with it ({type(error).__name__}: {error}); {advice}"]
    if difference == 0.0:
        return []
    return [
        f"sequence_parallel=True: layers of model_type={family} mix tokens outside attention and MLP (a tiny model of it differs "
        f"by {difference:.1e} on half of a sequence); {advice}"
    ]


def chunk_problems(config: PreTrainedConfig, layout: Layout, attention: str) -> list[str]:
    """Check that MLPs computed for a part of the tokens at a time give what they give for all."""
    family, tokens, advice = config.model_type, f"mlp_chunk_tokens={layout.mlp_chunk_tokens}", "use mlp_chunk_tokens=0"
    if not layout.mlp_chunk_tokens:
        return []
    try:
        tiny = shrink(config, Layout())
        ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (tiny.vocab_size - 3) + 3
        options = {"seq_len": _SEQ_LEN}
        whole, parts = (
            build_stage(plan_model(tiny, attention=attention), one_process(), chosen, **options).eval()
            for chosen in (Layout(), Layout(mlp_chunk_tokens=_SEQ_LEN - 3))
        )
        with torch.no_grad():
            wanted = whole(ids)
            difference = (parts(ids) - wanted).abs().max().item() / wanted.abs().max().item()
    except PlanError as error:
        return [f"{tokens}: model_type={family}: {error}; {advice}"]
    except Exception as error:  # a family's own code may raise anything on a part of a sequence
        return [f"{tokens}: a tiny {family} does not run with it ({type(error).__name__}: {error}); {advice}"]
    if difference <= _ROUNDING:
        return []
    return [f"{tokens}: MLPs of model_type={family} mix tokens (a tiny model of it differs by {difference:.1e}); {advice}"]


def _halves_differ(stage: Stage, blocks: frozenset[str]) -> float:
    """Return the largest difference in blocks' inputs and layers' outputs when each layer runs on a sequence's second half."""
    ids = torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (stage.vocab_size - 3) + 3
    second = slice(_SEQ_LEN // 2, None)
    layers = list(stage.causal.get_submodule(stage.stack.layers))
    inner = [stage.causal.get_submodule(name) for name in blocks]
    calls: dict[nn.Module, tuple[tuple, dict[str, Any], Any]] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, kwargs, out: calls.update({m: (args, kwargs, out)}), with_kwargs=True)
        for module in [*layers, *inner]
    ]
    differences: list[float] = []

    def note(half: Any, whole: Any) -> None:
        differences.append((_first(half) - _first(whole)[:, second]).abs().max().item())

    def recorded(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        whole_args, whole_kwargs, out = calls[block]
        note(args or kwargs["hidden_states"], whole_args or whole_kwargs["hidden_states"])
        return (out[0][:, second], *out[1:]) if isinstance(out, tuple) else out[:, second]

    with torch.no_grad():
        stage(ids)
        for hook in hooks:
            hook.remove()
        for block in inner:
            block.forward = partial(recorded, block)
        for layer in layers:
            args, kwargs, out = calls[layer]
            if args:
                args = args[0][:, second], *args[1:]
            else:
                kwargs = kwargs | {"hidden_states": kwargs["hidden_states"][:, second]}
            note(layer(*args, **kwargs), out)
    return max(differences)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _stages(config: PreTrainedConfig, attention: str, count: int) -> Iterator[Stage]:
    """Yield the stages in order. The model is built once: a stage is made from a copy of it without the others' layers."""
    model = plan_model(config, attention=attention)
    costs, head = layer_costs(model.causal, model.stack, _SEQ_LEN)
    layers = list(model.causal.get_submodule(model.stack.layers))
    for index, own in enumerate(partition_layers(costs, head, placement_of(Layout(pipeline=count)))):
        kept = {id(layer): layer for i, layer in enumerate(layers) if i not in own}  # not copied: the stage takes them out
        grid = Grid(**(vars(one_process()) | {"pipeline": count, "pipeline_rank": index}))
        yield build_stage(_copied(model, kept), grid, seq_len=_SEQ_LEN).eval()


def _copied(model: PlannedModel, kept: dict[int, nn.Module]) -> PlannedModel:
    """Copy a model apart from the modules in `kept`. A parameter's copy would lose what its constructor gave it."""
    copied = copy.deepcopy(model, kept)
    originals = dict(model.causal.named_parameters(remove_duplicate=False))
    for name, parameter in copied.causal.named_parameters(remove_duplicate=False):
        if hasattr(originals[name], "constructed"):
            parameter.constructed = originals[name].constructed
    return copied


def _shares_layers(whole: Stage) -> bool:
    """Return whether one parameter belongs to two layers: its gradient would be lost between stages."""
    owners: dict[int, set[int]] = {}
    for index, layer in enumerate(whole.causal.get_submodule(whole.stack.layers)):
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), set()).add(index)
    return any(len(layers) > 1 for layers in owners.values())
