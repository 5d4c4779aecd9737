"""The cut into stages: as balanced as can be, nothing lost or doubled, Hugging Face names, and the whole's own numbers."""

import itertools
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from recipes.common.grid import Grid, coordinates, one_process
from recipes.common.plans import find_stack
from recipes.common.recipe import Layout
from recipes.common.shrink import shrink
from recipes.common.stage import balance_stages, build_stage, layer_costs
from recipes.common.weights import build_empty
from tests.tiny import tiny_config
from tools.common.local_ranks import run_ranks

FAMILIES = ["llama", "qwen3", "gemma2", "olmo2", "phi3", "mixtral", "gpt2", "deepseek_v3"]


def config_of(family, **fields):
    if family == "deepseek_v3":  # multi-head latent attention has widths of its own
        return shrink(DeepseekV3Config(**fields), Layout())
    return tiny_config(family, **fields)


def dearest(layers, head, stages):
    burdens = [0.0] * (len(stages) - 1) + [head]
    return max(sum(layers[i] for i in own) + burden for own, burden in zip(stages, burdens, strict=True))


def test_no_cut_is_better():
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 8)
        layers, head = [rng.choice((1.0, 2.0, 5.0, rng.random())) for _ in range(count)], rng.choice((0.0, 1.0, 4.0, 30.0))
        for pipeline in range(1, count + 1):
            stages = balance_stages(layers, head, pipeline)
            assert len(stages) == pipeline
            assert all(len(own) > 0 for own in stages)  # a stage without a layer would have nothing to hand on
            assert [i for own in stages for i in own] == list(range(count))
            cuts = itertools.combinations(range(1, count), pipeline - 1)
            every = ([range(a, b) for a, b in itertools.pairwise((0, *cut, count))] for cut in cuts)
            assert dearest(layers, head, stages) == pytest.approx(min(dearest(layers, head, option) for option in every))


@pytest.mark.parametrize(
    ("layers", "head", "pipeline", "lengths"),
    [(5, 0.0, 2, [3, 2]), (4, 0.0, 4, [1, 1, 1, 1]), (4, 100.0, 2, [3, 1]), (16, 2.0, 3, [6, 6, 4]), (1, 3.0, 1, [1])],
)
def test_of_equal_layers_the_last_stage_has_fewer(layers, head, pipeline, lengths):
    assert [len(own) for own in balance_stages([1.0] * layers, head, pipeline)] == lengths


def test_costs_count_matrices_attention_and_the_experts_that_a_token_visits():
    dense, mixture = run_ranks(_costs, 1)[0]
    attention = 2 * 4 * 16 * 32 / 2
    projections = 64 * 64 * 2 + 64 * 32 * 2
    assert dense == ([projections + 3 * 64 * 96 + attention] * 4, 64 * 131)
    assert mixture == ([projections + 4 * 64 + 2 * 3 * 64 * 96 + attention] * 4, 64 * 131)  # router, 2 of 4 experts


def _costs():
    found = []
    for family in ("llama", "mixtral"):
        causal = build_empty(tiny_config(family), "eager")
        found.append(layer_costs(causal, find_stack(causal), seq_len=32))
    return found


def stages_of(config, pipeline, tensor=1, tensor_rank=0):
    """Every stage of one tensor rank, without process groups."""
    for index in range(pipeline):
        rank = index * tensor + tensor_rank
        place = vars(coordinates(rank, pipeline * tensor, Layout(pipeline=pipeline, tensor=tensor)))
        # torch's own products: what is shown is the cut
        facts = {"seq_len": 16, "attention": "eager", "seed": 3, "own_linears": False}
        yield build_stage(config, Grid(**(vars(one_process()) | place)), **facts)


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
            differences.append((stage._logits(hidden) - plain(ids, use_cache=False).logits).abs().max().item())
    return differences
