"""The kernel that attention runs on is named with its reason: by rule here, by torch's own choice where there is a device."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

from recipes.common.checks.attention_kernel import (
    AttentionCall,
    attention_calls,
    attention_lines,
    chosen_kernel,
    expected_kernel,
)
from recipes.common.recipe import Batch, Layout
from tests.support.tiny import tiny_recipe
from tools.common.forked_ranks import run_ranks

PLAIN = Layout()
CALL = AttentionCall(
    layers="full", micro_seqs=1, seq_len=64, heads=8, kv_heads=2, head_dim=64, value_dim=64, dtype="bfloat16", masked=False
)


@pytest.mark.parametrize(
    ("fields", "kernel", "reason"),
    [
        ({}, "flash, on Hopper and newer cuDNN", "16 bits, causal without a mask"),
        ({"dtype": "float16"}, "flash, on Hopper and newer cuDNN", "16 bits, causal without a mask"),
        ({"head_dim": 256, "value_dim": 256}, "flash", "heads of 256 are not cuDNN's"),
        ({"masked": True}, "memory-efficient", "flash takes no mask"),
        ({"head_dim": 192, "value_dim": 128}, "memory-efficient", "equal widths of keys and values, not 192 and 128"),
        ({"head_dim": 288, "value_dim": 288}, "memory-efficient", "wider than flash's 256"),
        ({"dtype": "float32"}, "math", "no fused kernel for grouped key/value heads"),
        ({"dtype": "float32", "kv_heads": 8}, "memory-efficient", "not in float32"),
        ({"dtype": "float32", "masked": True}, "memory-efficient", "not in float32"),
    ],
    ids=str,
)
def test_the_rule(fields, kernel, reason):
    found, why = expected_kernel(replace(CALL, **fields))
    assert found == kernel and reason in why


SHAPE = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 256}


def llama(**fields):
    return LlamaConfig(**SHAPE | fields)


def calls(model, layout=PLAIN, **fields):
    recipe = tiny_recipe(Path("data"), model=model, batch=Batch(seq_len=64, micro_seqs=3, global_seqs=6), **fields)
    return attention_calls(recipe, layout)


def test_a_call_is_one_ranks():
    [call] = calls(llama(), Layout(tensor=2), deepspeed="zero1_bf16.json")
    shape = {"micro_seqs": 3, "seq_len": 64, "heads": 8, "kv_heads": 2, "head_dim": 64, "value_dim": 64}
    assert asdict(call) == shape | {"layers": "full", "dtype": "bfloat16", "masked": False, "segmented": False}
    [call] = calls(llama(num_key_value_heads=2), Layout(tensor=4))
    assert (call.heads, call.kv_heads, call.dtype) == (4, 1, "float32")
    assert not call.grouped or call.heads > call.kv_heads


def test_masks_are_seen():
    assert [call.masked for call in calls(llama(), mask_documents=True)] == [True]
    assert [call.masked for call in calls(MistralConfig(**SHAPE, sliding_window=16))] == [True]
    assert [call.masked for call in calls(MistralConfig(**SHAPE, sliding_window=64))] == [False]
    both = Gemma3TextConfig(**SHAPE, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    assert [(call.layers, call.masked) for call in calls(both)] == [("sliding", True), ("full", False)]


def test_variable_lengths_take_the_place_of_masks():
    model = llama()
    masked = {"mask_documents": True, "attention": "varlen"}
    assert [(call.masked, call.segmented) for call in calls(model, **masked)] == [(False, True)]
    assert [call.segmented for call in calls(model, attention="varlen")] == [False]
    assert [call.segmented for call in calls(model, Layout(context=2, context_heads=1), attention="varlen")] == [True]
    assert [call.segmented for call in calls(MistralConfig(**SHAPE, sliding_window=16), attention="varlen")] == [True]

    def line(deepspeed, **fields):
        [said] = attention_lines(tiny_recipe(Path("data"), model=llama(**fields), deepspeed=deepspeed, **masked), Layout())
        return said

    assert line("zero1_bf16.json") == "full layers: flash kernel for variable lengths (torch's varlen_attn; no mask)"
    one_by_one = "full layers: one document after another, not all at once: "
    assert line("zero1_fp32.json").startswith(f"{one_by_one}it computes in 16 bits, not in float32; ")
    assert line("zero1_bf16.json", head_dim=288).startswith(f"{one_by_one}it needs heads of a multiple of 8 up to 256, not 288; ")
    assert line("zero1_bf16.json", attention_dropout=0.1).startswith(f"{one_by_one}it drops no attention out; ")


def test_other_attention_names_itself():
    recipe = tiny_recipe(Path("data"), attention="eager")
    assert attention_lines(recipe, Layout()) == ["attention='eager': its own kernel"]


def test_without_a_gpu_the_line_says_so():
    [line] = attention_lines(tiny_recipe(Path("data"), model=llama(), deepspeed="zero1_bf16.json"), Layout())
    assert line.startswith("full layers: ") and (torch.cuda.is_available() or "by rule: there is no GPU here" in line)


def test_torch_is_asked_with_the_calls_own_shapes():
    """On the CPU torch has a flash kernel and the plain one: the way of asking is the GPU's."""
    plain, wide = run_ranks(_chosen, 1)[0]
    assert plain[0] == "flash" and plain[1].startswith("not cuDNN: ")
    assert wide[0] == "math"


def _chosen():
    return [chosen_kernel(call, torch.device("cpu")) for call in (CALL, replace(CALL, value_dim=128))]
