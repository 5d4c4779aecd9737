"""Styles: what is sharded computes what the whole does, and a style that is not defined for a module says so."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

from recipes.common.engine.startup import start_distributed
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.grid import build_grid
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.parallel.tensor_plans import BUILT_IN_TENSOR
from recipes.common.parallel.tensor_styles import shard_embedding
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout
from tests.support.parity import assert_equal, trial_of
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial


@pytest.mark.parametrize(("size", "padding"), [(2, None), (3, 0), (3, 130)])
def test_a_sharded_embedding_looks_up_what_the_whole_does(size, padding):
    assert run_ranks(_embedding, size, padding) == [[True] * 4] * size


class _Normed(nn.Embedding):
    """Does more than look up, as Inkling's."""

    def forward(self, ids):
        return F.layer_norm(super().forward(ids), (8,))


def _embedding(padding):
    """[values equal, gradient equal] of either kind; a padding id has no gradient, wherever its row lies."""
    start_distributed("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    grid = build_grid(Layout(tensor=size), torch.device("cpu"))
    torch.manual_seed(0)
    weight, ids = torch.randn(131, 8), torch.randint(0, 131, (4, 9))
    ids[0, :2] = torch.tensor([0, 130])
    scale, equal = torch.randn(4, 9, 8), []
    for kind in (nn.Embedding, _Normed):
        module, plain = kind(131, 8, padding_idx=padding), kind(131, 8, padding_idx=padding)
        module.weight = nn.Parameter(ShardSpec(0).take(weight, rank, size))
        plain.weight = nn.Parameter(weight.clone())
        shard_embedding(module, grid)
        found, wanted = module(ids), plain(ids)
        (found * scale).sum().backward()
        (wanted * scale).sum().backward()
        equal += [found.equal(wanted), module.weight.grad.allclose(ShardSpec(0).take(plain.weight.grad, rank, size))]
    return equal


# embeddings of token sequences, in one layer
NGRAMS = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8, "indexer_compress_ratio": 2},
    **{"ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 100, "split_ngram_parts": 2},
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "style", "fields"),
    [
        ("llama4_text", "packed_rowwise", {}),
        ("granitemoe_swa", "local_params", {}),
        ("exaone4", "replicated_with_grad_allreduce", {}),
        ("inkling_text", "all_reduce", {}),
        ("longcat_flash", "moe_identity_expert", {}),
        ("qwen4_exp_text", "embedding_colwise", NGRAMS),
    ],
)
def test_gradients_of_styles_that_few_families_have(family, style, fields):
    """Banks sharded by packed inputs, parameters of modules that communicate, gradients summed inside a block, shared experts."""
    config = shrink(AutoConfig.for_model(family, attention_dropout=0.0, **fields), Layout(tensor=2))
    assert style in type(config).base_model_tp_plan.values()
    assert_equal(gradient_trial(trial_of(config, 1, 2, 1, global_seqs=2)))


def test_an_output_that_is_gathered_may_be_padded():
    """Queries, keys and values of phi3 are one projection: here of 80 outputs over 3 ranks."""
    config = tiny_config("phi3", num_attention_heads=3, num_key_value_heads=1, hidden_size=48, num_hidden_layers=2)
    assert_equal(gradient_trial(trial_of(config, 1, 3, 1, global_seqs=2)))


@pytest.mark.parametrize(
    ("name", "style", "message"),
    [
        (
            "h.*.mlp.c_fc",
            "packed_rowwise",
            "the style 'packed_rowwise' is not defined for modules, and transformer.h.0.mlp.c_fc is one",
        ),
        (
            "h.*.ln_1.weight",
            "rowwise_rep",
            "'rowwise_rep' is not defined for single parameters, and transformer.h.0.ln_1",
        ),
        (
            "h.*.ln_1.weight",
            "rowwise",
            "ln_1.weight (style 'rowwise') has shape (64,), not that of a bank of matrices",
        ),
        ("h.*.ln_1", "colwise", "transformer.h.0.ln_1 (style 'colwise') is a LayerNorm, not a linear layer"),
    ],
)
def test_a_style_on_what_it_is_not_defined_for_is_refused(name, style, message):
    assert message in run_ranks(_refusal, 1, name, style)[0]


def _refusal(name, style):
    BUILT_IN_TENSOR["gpt2"] = {name: style}
    causal = build_empty(tiny_config("gpt2"), "eager")
    try:
        plan_tensor_parallel(causal, find_stack(causal), 2)
    except PlanError as error:
        return str(error)
    return "accepted"
