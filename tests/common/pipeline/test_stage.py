"""Stages: nothing lost or doubled, Hugging Face names, and the whole's own numbers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from recipes.common.config.placement import coordinates
from recipes.common.model.main_grads import give_main_grad
from recipes.common.parallel.grid import Grid, one_process
from recipes.common.pipeline import layer_options
from recipes.common.pipeline import stage as stage_module
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.stages import FAMILIES, config_of, stages_of
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_hold_hugging_face_names_once(family, tied):
    """Parameters of all stages together are those of plain transformers; a tied weight is on the first and last stage."""
    wanted, buffers, found, kept = run_ranks(_names, 1, config_of(family, tie_word_embeddings=tied), 3)[0]
    names = [name for stage in found for name in stage]
    doubled = {name for name in names if names.count(name) > 1}
    assert set(names) == set(wanted)
    assert all(stage == {name: wanted[name] for name in stage} for stage in found)  # shapes
    assert len(doubled) == tied
    assert all(name in found[0] and name in found[-1] and name not in found[1] for name in doubled)
    assert all(stage for stage in found)
    # constants that a state dict holds (a router's correction, ...) are saved from the stages that have them
    assert {name for stage in kept for name in stage} == set(buffers)


def _evaluated():
    """Losses without gradients, of RWKV with more layers than it rescales at a time at inference, and as it trains."""
    config = tiny_config("rwkv", num_hidden_layers=4, rescale_every=1)
    ids = torch.arange(3, 19).view(1, 16)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).train()
    stage = stage_module.build_stage(stage_module.plan_model(config, attention="eager"), one_process(), seq_len=16, seed=3)
    plain.load_state_dict(dict(stage.hf_named_parameters()))
    with torch.no_grad():
        wanted = F.cross_entropy(plain(ids).logits[0], ids[0].flip(0), reduction="sum")
        return stage.eval()(ids, (ids.flip(1), torch.tensor(1.0))).item(), wanted.item()


def test_what_is_for_inference_alone_is_off_in_evaluations():
    found, wanted = run_ranks(_evaluated, 1)[0]
    assert found == pytest.approx(wanted, rel=1e-6)


def _names(config, pipeline):
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    buffers = set(plain.state_dict()) & {name for name, _ in plain.named_buffers()}
    found, kept = [], []
    for stage in stages_of(config, pipeline):
        found.append({name: tuple(p.shape) for name, p in stage.hf_named_parameters()})
        kept.append([name for name, _ in stage.persistent_buffers()])
        assert stage.whole_shapes == wanted
    return wanted, sorted(buffers), found, kept


def test_a_family_with_persistent_buffers_is_among_them():
    _, buffers, _, kept = run_ranks(_names, 1, config_of("deepseek_v3"), 3)[0]
    assert buffers
    assert sum(map(len, kept)) == len(buffers)  # each on one stage


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_one_after_another_are_plain_transformers(family):
    """Logits of the last stage's own head against AutoModelForCausalLM with the same weights, bit for bit."""
    assert run_ranks(_logits_differ_by, 1, config_of(family)) == [[0.0, 0.0, 0.0]]


def _logits_differ_by(config):
    ids = torch.arange(3, 27).view(2, 12)
    differences = []
    with torch.no_grad():
        for pipeline in (1, 2, 4):
            hidden, weights = ids, {}
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            for stage in stages_of(config, pipeline):
                weights |= dict(stage.hf_named_parameters()) | dict(stage.persistent_buffers())
                hidden = stage.eval()(hidden)
            plain.load_state_dict(weights, strict=False)
            differences.append((stage.logits(hidden) - plain(ids, use_cache=False).logits).abs().max().item())
    return differences


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, []),
        ({"recompute": "full"}, [(layer, False) for layer in range(4)]),
        ({"recompute": "selective", "recompute_every": 3}, [(0, True), (3, True)]),
    ],
)
def test_what_a_layout_recomputes(options, wanted):
    """Each wanted: the layer, and whether the results of its products are kept."""
    assert run_ranks(_recomputed, 1, options) == [wanted]


def _recomputed(options):
    asked = []
    layer_options.recompute = lambda layer, *, keep_products: asked.append((layer.self_attn.layer_idx, keep_products))
    layout = Layout(**options)
    stage_module.build_stage(stage_module.plan_model(config_of("llama"), layout), one_process(), layout, seq_len=16)
    return asked


def _added_by_rows(tensor):
    layout = Layout(tensor=tensor)
    grid = Grid(**(vars(one_process()) | vars(coordinates(0, tensor, layout))))
    stage = build_stage(plan_model(tiny_config("llama"), layout), grid, layout, seq_len=16, draw=False)
    embedding = stage.causal.get_input_embeddings()
    give_main_grad(embedding.weight, torch.zeros_like(embedding.weight), lambda: False)
    found = embedding(torch.arange(4).view(1, 4))
    return type(found.grad_fn).__name__


@pytest.mark.parametrize(("tensor", "by_rows"), [(1, True), (2, False)])
def test_an_embedding_that_one_rank_has_whole_adds_its_gradient_by_rows(tensor, by_rows):
    assert (run_ranks(_added_by_rows, 1, tensor)[0] == "_LookUpBackward") == by_rows
