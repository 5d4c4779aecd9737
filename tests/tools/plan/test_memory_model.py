"""The planner's memory, class by class, against what real models and engines hold."""

import gc
import math
from pathlib import Path

import pytest
import torch

from recipes.common.config.ds_config import precision, zero_stage
from recipes.common.config.placement import coordinates
from recipes.common.parallel.grid import Grid, one_process
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import AdamW, Layout
from tests.support.tiny import ds_config, tiny_config, tiny_recipe
from tools.common.devices import find_device
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer, rank_batches
from tools.plan.activations import model_activations
from tools.plan.memory_model import PRIOR, MemoryCase, StageBytes, stage_totals, state_bytes
from tools.plan.model_cases import Candidate, read_model
from tools.plan.stage_memory import memory_case


def _held_bytes(trial):
    """Bytes a parameter of all tensors with memory alive after two steps: weights, gradients, optimizer states, nothing else."""
    trainer = build_trial_trainer(trial)
    count = sum(math.prod(trainer.stage.whole_shapes[name]) for name, _ in trainer.stage.hf_named_parameters())
    for micro in rank_batches(trial, trainer):
        trainer.train_step(micro, 1e-3, trial.global_seqs * trial.seq_len)
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / count


@pytest.mark.parametrize(
    "name, layout, world",
    [
        ("zero1_bf16.json", Layout(), 2),
        ("zero1_bf16.json", Layout(pipeline=2), 2),
        ("zero1_fp32.json", Layout(), 1),
        ("zero2_bf16.json", Layout(), 2),
        ("zero3_fp32.json", Layout(), 1),
    ],
)
def test_states_are_what_an_engine_holds(name, layout, world):
    keys = ds_config(name)
    zero = keys["zero_optimization"]
    # the buckets are counted beside the states; here they would be larger than the model
    zero |= {key: 1000 for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size") if key in zero}
    model = tiny_config("llama", hidden_size=256, intermediate_size=512, vocab_size=1031)
    trial = Trial(model=model, layout=layout, world_size=world, optimizer=AdamW(lr=1e-3), deepspeed=keys, steps=2, seq_len=8,
                  global_seqs=4)  # fmt: skip
    held = run_ranks(_held_bytes, world, trial)[0]
    weights, gradients, states = state_bytes(precision(keys), zero_stage(keys), trial.data)
    kept = 0.0 if zero_stage(keys) == 2 else gradients  # its gradients live within a step
    assert held == pytest.approx(weights + kept + states, rel=0.01)


def _activations(family, attention):
    config, kind = tiny_config(family), {"seq_len": 48, "dtype": torch.bfloat16, "attention": attention}
    return model_activations(config, **kind), model_activations(config, **kind, fake=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_without_memory_are_those_of_a_real_run(family, attention):
    without, real = run_ranks(_activations, 1, family, attention)[0]
    assert len(real.layers) == 4 and min(layer.saved.total for layer in real.layers) > 0 and real.after.total > 0
    assert without == real


def _by_parts():
    config, kind = tiny_config("llama"), {"seq_len": 48, "dtype": torch.bfloat16, "attention": "sdpa"}
    return [model_activations(config, mlp_tokens=tokens, **kind).layers[0] for tokens in (0, 12)]


def test_what_a_layer_keeps_besides():
    """Counted by hand, of a llama's layer: hidden states of 64, 4 heads and 2 of keys, an MLP of 96."""
    whole, by_parts = run_ranks(_by_parts, 1)[0]
    tokens = 48 * 2  # of two bytes
    inputs, outputs = 64 + 64 + 64 + 96, (64 + 32 + 32) + 64 + (96 + 96) + 64
    assert whole.factors.total == tokens * (inputs + outputs)
    kept = [each.saved.total for each in (whole, by_parts)]
    assert kept[0] - kept[1] == tokens * 4 * 96  # gate, up, SiLU and their product, computed again
    fullest = [max(moment.total for moment in each.working) for each in (whole, by_parts)]
    assert fullest[0] == tokens * (64 + 96) + 2 * 64 * 96  # gradients of the output, the product and the last matrix
    assert fullest[1] > fullest[0]


def _normed_over_heads():
    kind = {"seq_len": 48, "dtype": torch.bfloat16, "attention": "sdpa"}
    return model_activations(tiny_config("olmo2"), **kind).layers[0]


def test_attention_that_norms_over_all_heads_is_whole_on_every_tensor_rank():
    """OLMo 2's queries and keys are gathered; its MLP, of gate, up and down, is divided."""
    layer, tokens = run_ranks(_normed_over_heads, 1)[0], 48 * 2  # of two bytes
    width = tiny_config("olmo2").num_key_value_heads * 16
    sums = 48 * 4 * 4  # each head's, in fp32
    assert layer.products.gathered == tokens * (64 + 2 * width + 64) + sums
    assert layer.products.sharded == tokens * 2 * 96
    assert layer.products.whole == tokens * 2 * 64
    assert layer.saved.gathered > layer.products.gathered - tokens * 64


def _counts(layout, tied):
    """(parameters a tensor rank of each stage holds, as trained; as planned)."""
    recipe = tiny_recipe(Path("unread"), model=tiny_config("llama", tie_word_embeddings=tied))
    facts = read_model(recipe, ds_config("zero1_bf16.json"))
    built = []
    for index in range(layout.pipeline):
        place = vars(coordinates(index * layout.tensor, layout.pipeline * layout.tensor, layout))
        grid = Grid(**(vars(one_process()) | place))
        stage = build_stage(plan_model(recipe.model, layout), grid, layout, seq_len=recipe.batch.seq_len)
        built.append(sum(p.numel() for p in stage.parameters()))
    case = memory_case(facts, Candidate(layout=layout, data=1, micro_seqs=1), find_device("A100-80"))
    return built, [stage.weights / 2 for stage in case.stages]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(pipeline=2),
        Layout(tensor=2),
        Layout(tensor=2, pipeline=4),
        Layout(pipeline=2, pipeline_schedule="zero_bubble_v"),
    ],
)
def test_stages_have_the_parameters_that_training_gives_them(layout, tied):
    built, planned = run_ranks(_counts, 1, layout, tied)[0]
    assert planned == pytest.approx(built, rel=2e-3)  # a vocabulary of 131 is padded over two ranks


def test_stages_keep_as_many_micro_batches_as_1f1b():
    cases = run_ranks(_stages, 1)[0]
    assert [stage.in_flight for stage in cases[0].stages] == [4, 3, 2, 1]
    assert [stage.in_flight for stage in cases[1].stages] == [2, 2, 2, 1]  # there are two micro batches
    assert [stage.in_flight for stage in cases[3].stages] == [2, 2]  # folded: each as the first
    full, none = (case.stages[0] for case in cases[2:0:-1])
    assert full.stored < none.stored / 5 and full.working > none.working


def _stages():
    facts = read_model(tiny_recipe(Path("unread")), ds_config("zero1_bf16.json"))
    device = find_device("A100-80")
    few = Candidate(layout=Layout(pipeline=4), data=1, micro_seqs=2)
    again = Candidate(layout=Layout(pipeline=4, recompute="full"), data=1, micro_seqs=2)
    many = Candidate(layout=Layout(pipeline=4), data=1, micro_seqs=1)
    folded = Candidate(layout=Layout(pipeline=2, pipeline_schedule="zero_bubble_v"), data=1, micro_seqs=1)
    return [memory_case(facts, candidate, device) for candidate in (many, few, again, folded)]


def test_the_allocator_holds_nothing_when_memory_is_short():
    stage = StageBytes(weights=0.0, gradients=0.0, optimizer=0.0, stored=10.0, working=0.0, loss=0.0, in_flight=1)
    short, ample = (MemoryCase(stages=(stage,), libraries=0.0, capacity=size) for size in (10.0, 1e9))
    assert stage_totals(PRIOR, short)[0] == 10.0
    assert stage_totals(PRIOR, ample)[0] == pytest.approx(13.0)
