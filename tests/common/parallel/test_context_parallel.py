"""Context parallelism trains what plain transformers trains: beside every option, with any heads, windows and documents."""

import pytest
import torch
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from recipes.common.parallel.context_parallel import ContextAttention
from recipes.common.runtime.step_clock import CLOCK
from tests.support.parity import ADAMW, assert_same, both_of_each, trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import build_trial_trainer, gradient_trial, rank_batches

# pairs of options rather than their whole product: (family, fields of its config, (pipeline, tensor, data), options, fields)
TRIALS = {
    "llama, as many kv heads as heads": ("llama", {"num_key_value_heads": 4}, (1, 1, 2), {"context": 2}, {}),
    "qwen3, fewer kv heads than ranks": ("qwen3", {"num_key_value_heads": 2}, (1, 1, 4), {"context": 4}, {"micro_seqs": 2}),
    "gemma2, windows, soft caps, shared kv": (
        "gemma2", {"num_key_value_heads": 1}, (1, 2, 2), {"context": 2, "sequence_parallel": True}, {},
    ),
    "gemma3_text, two readers": ("gemma3_text", {}, (1, 1, 4), {"context": 2}, {"attention": "sdpa"}),
    "gpt_oss, sinks": ("gpt_oss", {}, (2, 1, 2), {"context": 2, "pipeline_schedule": "zero_bubble"}, {}),
    "mixtral, recomputed": ("mixtral", {}, (1, 1, 2), {"context": 2, "recompute": "full"}, {}),
    "phi3, recomputed but for products": ("phi3", {}, (2, 1, 2), {"context": 2, "recompute": "selective"}, {}),
    "olmo2, folded, recomputed, tied": (
        "olmo2", {"tie_word_embeddings": True, "num_hidden_layers": 4}, (2, 1, 2),
        {"context": 2, "pipeline_schedule": "zero_bubble_v", "recompute": "full"}, {},
    ),
    "llama, queries divided as well": ("llama", {}, (1, 1, 4), {"context": 4, "context_heads": 2}, {"attention": "sdpa"}),
    "gemma2, queries divided alone": ("gemma2", {}, (1, 1, 2), {"context": 2, "context_heads": 1}, {}),
    "llama, documents": ("llama", {}, (2, 1, 2), {"context": 2}, {"document_end": 5, "attention": "sdpa", "seq_len": 48}),
    "llama, documents, queries divided": (
        "llama", {}, (1, 1, 4), {"context": 4, "context_heads": 2}, {"document_end": 5, "seq_len": 48},
    ),
    "gemma3_text, documents and windows without masks, queries divided": (
        "gemma3_text", {"sliding_window": 7}, (1, 1, 4), {"context": 4, "context_heads": 2, "recompute": "full"},
        {"document_end": 5, "seq_len": 48, "attention": "varlen", "micro_seqs": 2},
    ),
}  # fmt: skip


def context_trial(name):
    family, config, sizes, options, fields = TRIALS[name]
    readers = sizes[2] // options["context"]
    two_micro_batches = {"global_seqs": 2 * fields.get("micro_seqs", 1) * readers}
    return trial_of(tiny_config(family, **{"num_hidden_layers": 2} | config), *sizes, **options, **two_micro_batches | fields)


@pytest.fixture(scope="module")
def trained():
    """Name -> (what the layout left, what the oracle left), of all trials."""
    trials = {name: gradient_trial(context_trial(name)) for name in TRIALS} | {"AdamW": context_trial("llama, documents")}
    bf16 = trial_of(tiny_config("llama", num_hidden_layers=2), 2, 1, 2, context=2, deepspeed=ds_config("zero1_bf16.json"))
    return both_of_each(trials | {"bf16": bf16})


@pytest.mark.parametrize("name", TRIALS)
def test_gradients(trained, name):
    assert_same(*trained[name])


def test_two_steps_of_adamw(trained):
    assert_same(*trained["AdamW"])


def test_bf16_tracks_fp32(trained):
    found, plain = trained["bf16"]
    assert found.losses == pytest.approx(plain.losses, rel=5e-4)
    worst = max((found.parameters[n] - p).abs().max().item() for n, p in plain.parameters.items())
    assert worst <= 2 * len(plain.losses) * ADAMW.lr


def messages_of_a_step(trial):
    """Return (op, bytes) -> how often, of the context ranks' communication in one step on this rank."""
    trainer = build_trial_trainer(trial)
    grid = trainer.grid
    CLOCK.start(grid, grid.device, grid.timed_groups())
    CLOCK.begin_step(1)
    CLOCK.phase("other")
    trainer.train_step(rank_batches(trial, trainer)[0], 1e-3, trial.global_seqs * trial.seq_len)
    CLOCK.end_step()
    CLOCK.settle(wait=True)
    (step,) = CLOCK.taken()
    return {(key.op, key.bytes): entry[0] for key, entry in step.comms.items() if key.group == "context"}


@pytest.mark.parametrize(("context", "head_ranks"), [(2, 2), (4, 2)])
def test_messages_and_bytes_are_those_of_the_formula(context, head_ranks):
    """A layer sends q, k and v in one message and the output in another, and their gradients likewise."""
    layers, heads, kv_heads, width, seq_len, micro_batches = 2, 4, 2, 16, 16, 2
    config = tiny_config("llama", num_hidden_layers=layers)
    trial = trial_of(config, 1, 1, context, context=context, context_heads=head_ranks, global_seqs=micro_batches, seq_len=seq_len)
    found = run_ranks(messages_of_a_step, context, trial)[0]
    to_heads = 4 * seq_len // context * (heads + 2 * kv_heads) * width
    to_slices = 4 * seq_len // context * heads * width
    passes = 2 * layers * micro_batches  # forward and backward
    wanted = {("all_to_all_single", to_heads): passes, ("all_to_all_single", to_slices): passes}
    if context > head_ranks:
        gathered = 4 * seq_len * 2 * kv_heads // head_ranks * width
        wanted |= {("all_gather_into_tensor", gathered): passes // 2, ("reduce_scatter_tensor", gathered): passes // 2}
    assert found == wanted


def calls_of_a_kernel_that_takes_positions():
    """Return what it is told with and without documents: (its name, positions, mask, key/value groups), of half the heads."""
    found = []

    def kernel(module, query, key, value, mask, **options):
        found.append((module.config._attn_implementation, options["position_ids"], mask, module.num_key_value_groups))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = kernel
    config = tiny_config("llama", num_attention_heads=4, num_key_value_heads=4)
    config._attn_implementation = "flash_attention_2"
    module = LlamaAttention(config, 0)
    context = ContextAttention(config, "flash_attention_2", size=1, rank=0, heads=1)
    config._attn_implementation = "another"
    tensors = [torch.ones(1, heads, 8, 16) for heads in (4, 2, 2)]
    for documents in (None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])):
        local = context.places(8, documents, torch.device("cpu"))["position_ids"]
        mask = context.mask(q_length=8, kv_length=8, batch_size=1, mask_function=causal_mask_function)
        context.attend(module, *tensors, mask, position_ids=local)
    return found


def test_a_kernel_that_takes_positions_gets_those_of_whole_sequences():
    plain, masked = run_ranks(calls_of_a_kernel_that_takes_positions, 1)[0]
    assert plain == ("flash_attention_2", None, None, 2)
    assert masked[1].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert (masked[0], masked[2], masked[3]) == ("flash_attention_2", None, 2)
