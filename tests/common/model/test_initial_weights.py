"""Initial weights: equal in every layout, drawn from the family's own distribution, a function of seed and name alone."""

import itertools
import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GlmMoeDsaConfig

from recipes.common.model import initial_weights, shard_draws
from recipes.common.model.initial_weights import build_empty, name_seed
from recipes.common.model.sharding import ShardSpec
from recipes.common.recipe import Layout
from tests.support.stages import FAMILIES, config_of, stages_of
from tools.common.forked_ranks import run_ranks
from tools.verify.tiny_families import tiny_family


def weights_of(config, seed=3):
    """The whole model's initial weights, on the CPU in fp32."""
    from recipes.common.parallel.grid import one_process
    from recipes.common.pipeline.stage import build_stage, plan_model

    stage = build_stage(plan_model(config, attention="eager"), one_process(), seq_len=16, seed=seed)
    return dict(stage.hf_named_parameters())


@pytest.mark.parametrize("family", ["roformer", "ernie4_5_moe"])
def test_of_what_a_family_freezes_only_router_biases_become_buffers(family):
    """A table of sines, which its constructor leaves empty, would be what the memory held; it stays frozen, and is refused."""
    config = AutoConfig.for_model(
        family, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_hidden_layers=2,
        vocab_size=64, max_position_embeddings=32, moe_num_experts=4, moe_k=2, is_decoder=True,
    )  # fmt: skip
    causal = build_empty(config, "eager")
    frozen = [name for name, parameter in causal.named_parameters() if not parameter.requires_grad]
    buffers = {name: buffer for name, buffer in causal.named_buffers() if name in causal.state_dict()}
    if family == "roformer":
        assert len(frozen) == 1 and "embed_positions" in frozen[0] and not buffers
    else:
        assert not frozen and buffers and not any(bias.count_nonzero() for bias in buffers.values())
        assert {name.rpartition(".")[2] for name in buffers} == {"e_score_correction_bias"}


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2", True)])
def test_every_layout_starts_from_the_same_weights(family, tied):
    assert run_ranks(_layouts_that_differ, 1, config_of(family, tie_word_embeddings=tied)) == [[]]


def _layouts_that_differ(config):
    """Each number of stages and of tensor ranks; both at once in one: a shard knows nothing of stages, nor a stage of shards."""
    whole, failed = weights_of(config), []
    for pipeline, tensor in ((1, 4), (2, 2), (4, 1)):
        for tensor_rank in range(tensor):
            for stage in stages_of(config, pipeline, tensor, tensor_rank):
                for name, shard in stage.hf_named_parameters():
                    spec = stage.tensor_plan.shards.get(name) if tensor > 1 else None
                    wanted = whole[name] if spec is None else spec.take(whole[name], tensor_rank, tensor)
                    if not shard.equal(wanted):
                        failed.append((pipeline, tensor, tensor_rank, name))
    return failed


LARGE = 1024  # elements: of matrices, not of the biases beside them


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_large_parameters_are_drawn_by_shards_and_are_the_same_in_every_layout(family):
    """Tiles of 16 x 16, of which shards have parts; what `_init_weights` says is kept: deviations, and GPT-2's narrower ones."""
    different, modules, statistics = run_ranks(_drawn_by_shards, 1, config_of(family))[0]
    large = {name for name, (count, *_) in statistics.items() if count >= LARGE}
    assert different == [] and large - {"model.embed_tokens.weight"} <= set(modules)  # it has a padding row
    for name, (count, (_, std, least), (_, their_std, their_least)) in statistics.items():
        assert std == pytest.approx(their_std, rel=6 / count**0.5), name
        assert their_std or least == their_least, name


def _drawn_by_shards(config):
    modules = []
    draw = initial_weights.draw_shard
    initial_weights._DRAWN_BY_SHARDS, shard_draws._TILE = LARGE, 16
    initial_weights.draw_shard = lambda seed, name, *rest: modules.append(name) or draw(seed, name, *rest)
    return _layouts_that_differ(config), sorted(set(modules)), _statistics(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_before_a_checkpoint_nothing_is_drawn(family):
    """Every parameter has its shard's shape and place, and is NaN where a checkpoint has a value: only padding is zero."""
    assert run_ranks(_undrawn_that_differ, 1, config_of(family, vocab_size=250)) == [[]]


def _undrawn_that_differ(config):
    from transformers import PreTrainedModel

    failed = []
    for tensor, rank in ((1, 0), (4, 0), (4, 3)):
        [drawn] = stages_of(config, 1, tensor, rank)
        initialise, PreTrainedModel._init_weights = PreTrainedModel._init_weights, None  # a call is an error
        [empty] = stages_of(config, 1, tensor, rank, draw=False)
        PreTrainedModel._init_weights = initialise
        found = dict(empty.hf_named_parameters())
        for name, shard in drawn.hf_named_parameters():
            spec = drawn.tensor_plan.shards.get(name) if tensor > 1 else None
            whole = torch.full(drawn.whole_shapes[name], torch.nan)
            wanted = whole if spec is None else spec.take(whole, rank, tensor)
            if found[name].shape != shard.shape or not found[name].detach().isnan().equal(wanted.isnan()):
                failed.append((tensor, rank, name))
    return failed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_distribution_is_the_familys_own(family):
    """Mean and standard deviation of each parameter against what transformers draws, within 6 standard errors.

    GPT-2 draws its c_proj narrower by the square root of twice its depth; norms are ones or zeros.
    """
    statistics = run_ranks(_statistics, 1, config_of(family))[0]
    for name, (count, (mean, std, least), (their_mean, their_std, their_least)) in statistics.items():
        if their_std == 0.0:  # constants
            assert (mean, std, least) == (their_mean, 0.0, their_least), name
            continue
        assert std == pytest.approx(their_std, rel=6 / count**0.5), name
        assert mean == pytest.approx(their_mean, abs=6 * 2**0.5 * their_std / count**0.5), name


def _statistics(config):
    torch.manual_seed(11)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    ours = weights_of(config)

    def numbers(p):
        p = p.detach().double()
        return p.mean().item(), p.std(unbiased=False).item(), p.min().item()

    return {name: (p.numel(), numbers(ours[name]), numbers(p)) for name, p in plain.named_parameters()}


def test_gpt2_output_projections_are_narrower():
    """The one above would hold if transformers forgot it as well."""
    statistics = run_ranks(_statistics, 1, config_of("gpt2"))[0]
    std = {name.rpartition(".h.0.")[2]: ours[1] for name, (_, ours, _) in statistics.items() if ".h.0." in name}
    for name in ("attn.c_proj.weight", "mlp.c_proj.weight"):
        assert std[name] == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.06)
    assert std["attn.c_attn.weight"] == pytest.approx(0.02, rel=0.06)


def test_a_seed_is_the_weights():
    same, other, shared = run_ranks(_seeds, 1)[0]
    assert same == []  # differ between two draws with one seed
    assert other == []  # drawn at random, but equal under another seed
    assert shared == []  # two layers with the same weights


def _seeds():
    first, again, other = (weights_of(config_of("llama"), seed) for seed in (3, 3, 4))
    drawn = [name for name, p in first.items() if p.std() > 0]
    layers = [first[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(4)]
    return (
        [name for name in first if not first[name].equal(again[name])],
        [name for name in drawn if first[name].equal(other[name])],
        [pair for pair in itertools.combinations(range(4), 2) if layers[pair[0]].equal(layers[pair[1]])],
    )


def test_the_global_generator_is_left_alone():
    assert run_ranks(_generator, 1) == [True]


def _generator():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    weights_of(config_of("llama"))
    return torch.random.get_rng_state().equal(before)


def _constructed():
    config = tiny_family("phi4_multimodal", Layout()).config
    probe = "model.embed_tokens_extend.image_embed.img_processor.head.probe"
    first, again = (build_empty(config, "eager").get_parameter(probe).constructed for _ in range(2))
    return first.std().item() > 0, first.equal(again)


def test_what_a_constructor_draws_is_the_same_every_time():
    assert run_ranks(_constructed, 1) == [(True, True)]


def test_name_seed_is_the_same_everywhere():
    """Written down: another value would be another initialisation for every run there is."""
    assert name_seed(1234, "model.layers.0.mlp") == 6_172_843_833_792_371_523
    assert 0 <= name_seed(0, "") < 2**63


def test_an_empty_model_takes_no_memory():
    """A layer of this one holds 38 GB of experts: not even for a moment, nor untouched, may they be allocated."""
    assert run_ranks(_empty, 1) == [True]


def _empty():
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30), resource.RLIM_INFINITY))
    causal = build_empty(GlmMoeDsaConfig(), "eager")
    return all(p.device.type == "meta" for p in causal.parameters())


def test_buffers_hold_their_values():
    """Rotary frequencies are computed by the constructor; on the meta device they would be lost."""
    assert run_ranks(_buffers, 1) == [(True, True)]


def _buffers():
    config = config_of("llama")
    ours = dict(build_empty(config, "eager").named_buffers())
    theirs = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    return ours.keys() == theirs.keys(), all(ours[name].equal(theirs[name]) for name in theirs)


def test_padding_is_zero():
    assert run_ranks(_padding, 1) == [True]


def _padding():
    whole = weights_of(config_of("llama"))["lm_head.weight"]  # 131 rows: the last of 4 ranks has 32 of 33
    return ShardSpec(0).take(whole, 3, 4)[32:].eq(0).all().item()
