"""Every file in ds_configs/ is accepted; every known mistake is refused, by name, all at once."""

from __future__ import annotations

import copy
import re

import pytest

from recipes.common.config import ds_keys
from recipes.common.config.ds_checks import device_problems, ds_config_problems, fp16_supported, version_problems
from recipes.common.config.ds_config import load_ds_config, precision, zero_stage
from recipes.common.recipe import ROOT, Layout

NAMES = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
FLAT, PIPELINE = Layout(tensor=2), Layout(tensor=2, pipeline=2)


def problems_of(change: dict, *, base: str = "zero1_bf16.json", layout: Layout = PIPELINE) -> list[str]:
    """Problems of a good file after `change`: {"a.b": value}, where value ... deletes."""
    config = load_ds_config(base)
    for path, value in change.items():
        *parents, key = path.split(".")
        block = config
        for parent in parents:
            block = block.setdefault(parent, {})
        if value is ...:
            del block[key]
        else:
            block[key] = value
    return ds_config_problems(config, "f.json", layout)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_has_no_problems(name: str) -> None:
    config = load_ds_config(name)
    assert ds_config_problems(config, name, FLAT) == []
    stage, kind = name.removesuffix(".json").replace("_offload", "").split("_")
    assert (zero_stage(config), precision(config)) == (int(stage[-1]), kind)
    with_pipeline = ds_config_problems(config, name, PIPELINE)
    assert bool(with_pipeline) == (zero_stage(config) > 1)
    assert name in (ROOT / "ds_configs/README.md").read_text()


BAD = {
    # keys of the recipe name the field to edit
    "train_batch_size=8 does not belong here; delete it: it is batch.global_seqs": {"train_batch_size": 8},
    "it is batch.micro_seqs": {"train_micro_batch_size_per_gpu": 1},
    "gradient_accumulation_steps=2 does not belong here": {"gradient_accumulation_steps": 2},
    "gradient_clipping=1.0 does not belong here; delete it: it is optimizer.clip": {"gradient_clipping": 1.0},
    "it is optimizer=AdamW(...)": {"optimizer": {"type": "AdamW"}},
    "it is schedule=Cosine(...)": {"scheduler": {"type": "WarmupLR"}},
    "activation_checkpointing={} does not belong here; delete it: it is recompute of": {"activation_checkpointing": {}},
    "pipeline.activation_checkpoint_interval=1 does not belong here": {"pipeline.activation_checkpoint_interval": 1},
    "pipeline.stages=2 does not belong here": {"pipeline.stages": 2},
    "tensor_parallel": {"tensor_parallel": {"autotp_size": 2}},
    "data_efficiency": {"data_efficiency": {"enabled": True}},
    # known to break
    "steps_per_print=10 is refused": {"steps_per_print": 10},
    "wall_clock_breakdown=true is refused; delete it: it crashes with pipeline > 1": {"wall_clock_breakdown": True},
    "flops_profiler": {"flops_profiler": {"enabled": True}},
    "elasticity={} is no longer in DeepSpeed": {"elasticity": {}},
    "zero_optimization.mics_shard_size=2 is no longer in DeepSpeed": {"zero_optimization.mics_shard_size": 2},
    "the old name of offload_optimizer": {"zero_optimization.cpu_offload": True},
    "master weights and their gradients are fp32": {"bf16.bf16_master_weights_and_grads": True},
    "pipeline.pipe_partitioned=true": {"pipeline.pipe_partitioned": True},
    "pipeline.grad_partitioned=true": {"pipeline.grad_partitioned": True},
    "pipeline.use_reentrant is missing, and DeepSpeed's default is true": {"pipeline.use_reentrant": ...},
    # typos, which DeepSpeed would ignore (or which it finds after the processes have started)
    "unknown key 'gradient_cliping' (did you mean 'gradient_clipping'?)": {"gradient_cliping": 1.0},
    "unknown key 'comunication_data_type' (did you mean 'communication_data_type'?)": {"comunication_data_type": "x"},
    "unknown key 'pipeline.pipe_partitoned' (did you mean 'pipe_partitioned'?)": {"pipeline.pipe_partitoned": False},
    "unknown key 'data_types.grad_acum_dtype' (did you mean 'grad_accum_dtype'?)": {"data_types.grad_acum_dtype": "fp32"},
    "unknown key 'bf16.imediate_grad_update' (did you mean 'immediate_grad_update'?)": {"bf16.imediate_grad_update": True},
    "unknown key 'zero_optimization.overlap_com' (did you mean 'overlap_comm'?)": {"zero_optimization.overlap_com": True},
    "unknown key 'timers.throughput.enable' (did you mean 'enabled'?)": {"timers.throughput.enable": True},
    "unknown key 'aio.block_sise' (did you mean 'block_size'?)": {"aio.block_sise": 1},
    # values
    'zero_optimization.overlap_comm="maybe": Input should be a valid boolean': {"zero_optimization.overlap_comm": "maybe"},
    "zero_optimization.reduce_bucket_size=-1: Input should be greater than 0": {"zero_optimization.reduce_bucket_size": -1},
    'zero_optimization.reduce_bucket_size="5e7" must be a number': {"zero_optimization.reduce_bucket_size": "5e7"},
    'zero_optimization.contiguous_gradients="yes" must be true or false': {"zero_optimization.contiguous_gradients": "yes"},
    "zero_optimization.stage=4 must be 1, 2 or 3": {"zero_optimization.stage": 4},
    "memory_breakdown=1 must be true or false": {"memory_breakdown": 1},
    'zero_optimization.reduce_bucket_size="auto" is understood by the Hugging Face Trainer only': {
        "zero_optimization.reduce_bucket_size": "auto"
    },
    # precision
    'data_types.grad_accum_dtype="bf16": gradients of micro batches': {"data_types.grad_accum_dtype": "bf16"},
    "data_types.grad_accum_dtype is missing, and DeepSpeed's default is bf16": {"data_types": ...},
    "communication_data_type is missing, and DeepSpeed's default is bf16": {"communication_data_type": ...},
    "bf16.enabled=true and fp16.enabled=true": {"fp16": {"enabled": True}},
    "the old name of bf16": {"bfloat16": {"enabled": True}},
    "fp16.enabled is missing": {"fp16": {"loss_scale": 0}},
    "bf16.immediate_grad_update is not true with layout.pipeline=2: gradients": {"bf16": {"enabled": True}},
    # ZeRO
    "zero_optimization.stage=0: without ZeRO DeepSpeed clips wrongly": {"zero_optimization.stage": 0},
    "zero_optimization.stage=0 (missing, and DeepSpeed's default is 0)": {"zero_optimization": ...},
    "zero_optimization.stage=2 with layout.pipeline=2": {"zero_optimization.stage": 2},
}


@pytest.mark.parametrize("message", BAD)
def test_one_mistake_is_one_problem_that_names_it(message: str) -> None:
    problems = problems_of(BAD[message])
    assert len(problems) == 1, problems
    assert problems[0].startswith("f.json: ")
    assert message in problems[0]


OFFLOAD = "zero_optimization.offload_optimizer"
BAD_OFFLOAD = {
    "without zero_force_ds_cpu_optimizer=false": {"zero_force_ds_cpu_optimizer": ...},
    'offload_optimizer.device="gpu": Input should be': {f"{OFFLOAD}.device": "gpu"},
    "unknown key 'zero_optimization.offload_optimizer.devise' (did you mean 'device'?)": {f"{OFFLOAD}.devise": "cpu"},
    "ratio=0.5 is refused": {f"{OFFLOAD}.ratio": 0.5},
    "zero_optimization.offload_param with zero_optimization.stage=2": {
        "zero_optimization.stage": 2,
        "zero_optimization.offload_param": {"device": "cpu"},
    },
}


@pytest.mark.parametrize("message", BAD_OFFLOAD)
def test_offload_problems(message: str) -> None:
    problems = problems_of(BAD_OFFLOAD[message], base="zero3_offload_bf16.json", layout=FLAT)
    assert len(problems) == 1, problems
    assert message in problems[0]


def test_all_problems_at_once() -> None:
    change = {"optimizer": {}, "pipelin": {}, "zero_optimization.stage": 3, "bf16.enabled": "true", "amp": {}}
    assert len(problems_of(change)) == 5


def test_pipeline_keys_may_be_left_out_without_a_pipeline() -> None:
    assert problems_of({"pipeline": ...}, layout=FLAT) == []
    assert problems_of({"comms_logger": {"enabled": True}, "prescale_gradients": True, "dump_state": False}) == []


def test_the_callers_config_is_left_alone() -> None:
    config = load_ds_config("zero1_bf16.json")
    before = copy.deepcopy(config)
    ds_config_problems(config, "f", PIPELINE)
    assert config == before


def test_fp16_is_refused_where_the_device_lacks_it() -> None:
    config = load_ds_config("zero1_fp16.json")
    assert device_problems(config, "f.json", fp16_supported=True) == []
    (problem,) = device_problems(config, "f.json", fp16_supported=False)
    assert problem.startswith("f.json: fp16.enabled=true")
    assert device_problems(load_ds_config("zero1_bf16.json"), "f.json", fp16_supported=False) == []


def test_the_device_is_asked_through_deepspeed() -> None:
    from deepspeed.accelerator import get_accelerator

    assert fp16_supported() is bool(get_accelerator().is_fp16_supported())


@pytest.mark.parametrize(
    ("deepspeed", "torch", "found"),
    [
        ("0.18.2", "2.13.0", [r"^deepspeed==0\.18\.2: needs deepspeed>=0\.19\.3; install requirements\.txt"]),
        ("0.18.3", "2.13.0", [r"^deepspeed==0\.18\.3: .*scale pipeline gradients.*install deepspeed>=0\.19\.3"]),
        ("0.19.2", "2.13.0+cpu", [r"^deepspeed==0\.19\.2: .*scale pipeline gradients"]),
        ("0.19.0", "2.10.1", [r"^deepspeed==0\.19\.0: .*scale pipeline gradients", r"^torch==2\.10\.1: needs torch>=2\.11"]),
        ("0.19.3", "2.13.0", []),
        ("0.19.3+cu128", "2.11.0", []),
        ("0.19.8", "2.13.0+cpu", []),
        ("0.19.8", "2.10.1", [r"^torch==2\.10\.1: needs torch>=2\.11"]),
        ("0.19.1", "2.9.0", [r"^deepspeed==0\.19\.1", r"^torch==2\.9\.0"]),
        ("0.20.0", "2.14.0.dev1", []),
    ],
)
def test_versions_that_train_wrongly(deepspeed, torch, found):
    lines = version_problems(deepspeed, torch)
    assert len(lines) == len(found)
    assert all(re.search(pattern, line) for pattern, line in zip(found, lines, strict=True))


def test_our_lists_agree_with_deepspeeds() -> None:
    from deepspeed.runtime import config as theirs
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(ds_keys.REMOVED[""])
    assert set(theirs._REMOVED_ZERO_CONFIG_KEYS) <= set(ds_keys.REMOVED["zero_optimization"])
    assert set(AIO_DEFAULT_DICT) == set(ds_keys.UNCHECKED_BLOCKS["aio"])
    pipeline = set(theirs.get_pipeline_config({}))
    known = {*ds_keys.RECIPE_OWNED, *(f"pipeline.{key}" for key in ds_keys.UNCHECKED_BLOCKS["pipeline"])}
    assert {f"pipeline.{key}" for key in pipeline} <= known


def test_no_key_has_two_homes() -> None:
    lists = [ds_keys.RECIPE_OWNED, ds_keys.REFUSED, ds_keys.TOP_LEVEL, dict.fromkeys(ds_keys.REMOVED[""])]
    names = [name for names in lists for name in names]
    assert len(names) == len(set(names))
