"""What of a layer is fused, and that nothing else changes. The operators run as they are written: their compiler is torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from recipes.common.model import fusion
from recipes.common.model.fusion import ACTIVATIONS, NORMS, ROTATION, fuse_layer
from recipes.common.parallel.grid import one_process
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.stages import config_of
from tools.common.forked_ranks import run_ranks

ALL = {NORMS, ACTIVATIONS, ROTATION}
FUSED = {"llama": ALL, "gpt2": {NORMS, ACTIVATIONS}, "gemma2": ALL, "qwen3": ALL, "mixtral": ALL}


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_layer_computes_the_same(family, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    kinds, worst = run_ranks(_compared, 1, config_of(family))[0]
    assert kinds == FUSED[family] and worst <= 1e-6


def _norms():
    equal = []
    for eps in (1e-6, 0.5):
        norm, hidden = LlamaRMSNorm(8, eps), torch.randn(3, 8)
        wanted = norm(hidden)
        fusion._fuse_norm(norm)
        equal.append(norm(hidden).allclose(wanted))
    return equal


def test_norms_of_other_numbers_are_other_operators(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert run_ranks(_norms, 1)[0] == [True, True]


class _Scaled(nn.Module):
    """What a norm looks like, with a buffer: two of them have one name and compute different things."""

    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, hidden):
        return hidden * self.weight * self.scale


def _scaled():
    layer = nn.Sequential(_Scaled(2.0), _Scaled(3.0))
    kinds = fuse_layer(layer)
    return kinds, [module(torch.ones(1, 8)).unique().tolist() for module in layer]


def test_what_has_buffers_is_no_norm(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert run_ranks(_scaled, 1)[0] == (frozenset(), [[2.0], [3.0]])


class _Mlp(nn.Module):
    """An MLP that may read whether it trains, which a trace would fix, or write over what its first linear gave."""

    def __init__(self, *, drops=False, inplace=False):
        super().__init__()
        self.up, self.down, self.drops, self.inplace = nn.Linear(8, 16), nn.Linear(16, 8), drops, inplace

    def forward(self, x):
        x = F.silu(self.up(x), inplace=self.inplace) * 2.0
        return self.down(F.dropout(x, 0.5, self.training) if self.drops else x)


def _fused_mlps():
    return [fusion._fuse_mlp(_Mlp(**fields)) for fields in ({}, {"drops": True}, {"inplace": True})]


def test_an_mlp_is_fused_only_where_all_between_its_linears_is_known():
    assert run_ranks(_fused_mlps, 1)[0] == [True, False, False]


def _compared(config):
    plain, fused = (_numbers(config, kernels) for kernels in ("none", "compile"))
    assert plain.keys() == fused.keys()
    worst = max(((fused[name] - wanted).abs().max() / wanted.abs().max()).item() for name, wanted in plain.items())
    causal = plan_model(config, Layout(), attention="eager").causal
    layer = next(module for module in causal.modules() if type(module).__name__.endswith(("DecoderLayer", "Block")))
    kinds = fuse_layer(layer)
    norms = [module for name, module in layer.named_modules() if "norm" in name or name.startswith("ln_")]
    assert norms and all("forward" in vars(norm) for norm in norms)
    return kinds, worst


def _numbers(config, kernels):
    """Return the loss and all gradients of one micro batch."""
    planned = plan_model(config, Layout(), attention="eager")
    stage = build_stage(planned, one_process(), seq_len=12, seed=3, z_loss=1e-3, chunk_tokens=5, kernels=kernels)
    ids = torch.arange(3, 27).view(2, 12)
    loss = stage(ids, (ids.flip(1), torch.tensor(0.1)))
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in stage.hf_named_parameters()}
