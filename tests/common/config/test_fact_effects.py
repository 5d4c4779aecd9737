"""What is recorded has a class, and what nobody classified is not free."""

import pytest

from recipes.common.config.fact_effects import (
    ENVIRONMENT_EFFECTS,
    PACKAGE_EFFECTS,
    effect_of_fact,
    effect_of_package,
    effect_of_path,
    gravest,
)
from recipes.common.config.field_effects import Effect


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("recipe.optimizer.eps", Effect.MATHEMATICS),
        ("recipe.batch.seq_len", Effect.ORDER),
        ("package.torch.version", Effect.MATHEMATICS),
        ("package.nvidia_nccl_cu12.files", Effect.ROUNDING),
        ("package.pytest.version", Effect.NOTHING),
        ("package.nobody_knows_it.version", Effect.MATHEMATICS),
        ("environment.NCCL_ALGO", Effect.ROUNDING),
        ("environment.NCCL_DEBUG", Effect.NOTHING),
        ("environment.NCCL_ALGO2", Effect.MATHEMATICS),  # a name is matched whole
        ("deepspeed.zero_optimization.allgather_bucket_size", Effect.SPEED),
        ("deepspeed.bf16.enabled", Effect.ROUNDING),
        ("deepspeed.zero_optimization.offload_optimizer.device", Effect.ROUNDING),
        ("deepspeed.zero_optimization.offload_optimizer.pin_memory", Effect.SPEED),
        ("deepspeed.a_new_key", Effect.MATHEMATICS),
        ("host.3.name", Effect.NOTHING),
        ("host.3.cpu", Effect.ROUNDING),
        ("host.3.package.torch.version", Effect.MATHEMATICS),
        ("rank.2.environment.OMP_NUM_THREADS", Effect.ROUNDING),
        ("rank.2.threads.torch", Effect.ROUNDING),
        ("layout.recompute", Effect.SPEED),
        ("layout.tensor", Effect.ROUNDING),
        ("algorithm.order", Effect.ORDER),
        ("algorithm.initial_weights", Effect.MATHEMATICS),
        ("library.nccl", Effect.ROUNDING),
        ("a.new.fact", Effect.MATHEMATICS),
    ],
)
def test_what_a_change_of_a_fact_changes(name, effect):
    assert effect_of_fact(name) is effect


def test_names_are_in_one_row_and_spelt_as_they_are_looked_up():
    assert all(effect_of_package(name) is effect for name, effect in PACKAGE_EFFECTS.items())
    assert all(name.isupper() or name == "NVTE_FUSED_ATTN_USE_FAv2_BWD" for name in ENVIRONMENT_EFFECTS)


@pytest.mark.parametrize(
    ("path", "effect"),
    [
        ("recipes/common/engine/trainer.py", Effect.MATHEMATICS),
        ("recipes/llama_1b.py", Effect.MATHEMATICS),
        ("recipes/common/README.md", Effect.NOTHING),
        ("ds_configs/zero1_bf16.json", Effect.NOTHING),
        ("tests/test_parity.py", Effect.NOTHING),
        ("somewhere/else.py", Effect.MATHEMATICS),
    ],
)
def test_what_a_changed_line_of_a_file_changes(path, effect):
    assert effect_of_path(path) is effect


def test_the_gravest_of_several():
    assert gravest([Effect.SPEED, Effect.ORDER, Effect.ROUNDING]) is Effect.ORDER and gravest([]) is Effect.NOTHING
