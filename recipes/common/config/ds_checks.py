"""Checks a ds_config: every key is allowed by name or refused by name, and known-bad combinations are refused.

DeepSpeed ignores unknown keys in most blocks, and trains wrongly with some values; `ds_keys` has the tables. DeepSpeed is
imported inside functions only, since that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from recipes.common.config.ds_config import did_you_mean, json_text, precision, zero_stage
from recipes.common.config.ds_keys import RECIPE_OWNED, REFUSED, REMOVED, TOP_LEVEL, UNCHECKED_BLOCKS
from recipes.common.config.placement import ONE_PASS
from recipes.common.recipe import Layout

if TYPE_CHECKING:
    from pydantic import BaseModel

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "an object {...}",
    list: "a list [...]",
}


def ds_config_problems(config: dict[str, Any], file: str, layout: Layout) -> list[str]:
    """Return everything wrong with `config` for `layout`, one line each, beginning with `file`."""
    problems = list(_auto_problems(config, ""))
    problems += _key_problems(config, TOP_LEVEL, "")
    for name, allowed in UNCHECKED_BLOCKS.items():
        problems += _block_problems(config, name, allowed)
    for name, model in _checked_blocks().items():
        problems += _model_problems(config, name, model)
    problems += _precision_problems(config)
    problems += _zero_problems(config, layout)
    problems += _pipeline_problems(config, layout)
    return [f"{file}: {problem}" for problem in dict.fromkeys(problems)]


def device_problems(config: dict[str, Any], file: str, fp16_supported: bool) -> list[str]:
    """Return what this device cannot do; `fp16_supported` is the answer of the function of that name."""
    if precision(config) == "fp16" and not fp16_supported:
        return [
            f"{file}: fp16.enabled=true, but DeepSpeed refuses fp16 on this device (a CPU needs AMX-FP16 or "
            "AVX512-FP16); use a GPU, or zero1_bf16.json or zero1_fp32.json"
        ]
    return []


def fp16_supported() -> bool:
    """Return whether DeepSpeed accepts fp16 on this machine's accelerator. Imports DeepSpeed."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def version_problems(deepspeed_version: str, torch_version: str) -> list[str]:
    """Return versions that are known to train wrongly, or were never tried; requirements.txt has the right ones."""
    from packaging.version import Version

    problems = []
    if Version("0.18.3") <= Version(deepspeed_version) < Version("0.19.3"):
        problems.append(
            f"deepspeed=={deepspeed_version}: 0.18.3 to 0.19.2 scale pipeline gradients by 1/accumulation once per "
            "stage, which trains wrongly without an error; install deepspeed>=0.19.3 (requirements.txt)"
        )
    elif Version(deepspeed_version) < Version("0.19.3"):
        problems.append(f"deepspeed=={deepspeed_version}: needs deepspeed>=0.19.3; install requirements.txt")
    if Version(torch_version) < Version("2.11"):
        problems.append(f"torch=={torch_version}: needs torch>=2.11; install requirements.txt")
    return problems


def _precision_problems(config: dict[str, Any]) -> Iterator[str]:
    enabled = [name for name in ("bf16", "fp16") if _at(config, f"{name}.enabled") is True]
    for name in ("bf16", "fp16"):
        if isinstance(config.get(name), dict) and "enabled" not in config[name]:
            yield f"{name}.enabled is missing, and DeepSpeed's default is false; write true, or delete {name}"
    if len(enabled) == 2:
        yield "bf16.enabled=true and fp16.enabled=true; one precision at a time: delete one of the two blocks"
    reasons = {
        "data_types.grad_accum_dtype": "gradients of micro batches would be accumulated",
        "communication_data_type": "gradients would be reduced over data ranks",
    }
    for key, reason in reasons.items():
        value = _at(config, key)
        if value == "fp32" or (value is None and not enabled):
            continue
        found = f"={json_text(value)}" if value is not None else f" is missing, and DeepSpeed's default is {enabled[0]}"
        yield f'{key}{found}: {reason} in low precision; write "fp32"'


def _zero_problems(config: dict[str, Any], layout: Layout) -> Iterator[str]:
    raw_stage = _at(config, "zero_optimization.stage")
    if raw_stage is not None and (type(raw_stage) is not int or raw_stage not in range(4)):
        yield f"zero_optimization.stage={json_text(raw_stage)} must be 1, 2 or 3"
        return
    stage = zero_stage(config)
    if stage == 0:
        missing = "" if raw_stage == 0 else " (missing, and DeepSpeed's default is 0)"
        yield (
            f"zero_optimization.stage=0{missing}: without ZeRO DeepSpeed clips wrongly with pipeline > 1, loses the "
            "optimizer of a bf16 pipeline at resume, and has a wrong bf16 gradient norm with tensor > 1; write 1"
        )
    if stage >= 2 and layout.pipeline > 1:
        yield (
            f"zero_optimization.stage={stage} with layout.pipeline={layout.pipeline}: DeepSpeed's pipeline "
            "engine reduces gradients once a step and takes stage 1 only; write 1, or set pipeline=1 in the recipe"
        )
    if layout.expert > 1 and (stage > 1 or _at(config, "zero_optimization.offload_optimizer.device") not in (None, "none")):
        yield (
            f"zero_optimization with layout.expert={layout.expert}: experts that ranks share are partitioned by stage 1 "
            "alone, without offload; write stage 1 and delete offload_optimizer, or set expert=1 in the recipe"
        )
    if _at(config, "zero_optimization.offload_param") is not None and stage != 3:
        yield f"zero_optimization.offload_param with zero_optimization.stage={stage}: only stage 3 supports it; delete it"
    device = _at(config, "zero_optimization.offload_optimizer.device")
    if device in (None, "none"):
        return
    if layout.pipeline > 1:
        yield (
            f"zero_optimization.offload_optimizer.device={json_text(device)} with layout.pipeline={layout.pipeline}: "
            "offload is tested with pipeline=1 only; delete offload_optimizer, or set pipeline=1 in the recipe"
        )
    if config.get("zero_force_ds_cpu_optimizer") is not False:
        yield (
            "zero_optimization.offload_optimizer without zero_force_ds_cpu_optimizer=false: DeepSpeed would refuse "
            "torch's AdamW; write it at the top level"
        )


def _pipeline_problems(config: dict[str, Any], layout: Layout) -> Iterator[str]:
    reasons = {
        "pipe_partitioned": "it synchronises the host at every micro batch and is wrong for activations that differ "
        "between tensor ranks",
        "grad_partitioned": "it synchronises the host at every micro batch and is wrong for activations that differ "
        "between tensor ranks",
        "use_reentrant": "re-entrant recomputation loses the gradient of layers that take token ids (DeepSpeed #4274)",
    }
    for key, reason in reasons.items():
        value = _at(config, f"pipeline.{key}")
        if value is True or (value is None and layout.pipeline > 1):
            found = "=true" if value else " is missing, and DeepSpeed's default is true"
            yield f"pipeline.{key}{found}: {reason}; write false"
    at_once = _at(config, "bf16.immediate_grad_update") is True
    if layout.pipeline > 1 and precision(config) == "bf16" and zero_stage(config) == 1 and not at_once:
        late = "" if layout.pipeline_schedule == ONE_PASS else f", and pipeline_schedule={layout.pipeline_schedule!r}"
        yield (
            f"bf16.immediate_grad_update is not true with layout.pipeline={layout.pipeline}{late}: gradients that are there "
            "before that of a stage's output (the head's), or are computed late, would be lost; write true"
        )


def _checked_blocks() -> dict[str, type[BaseModel]]:
    """Return the blocks whose fields DeepSpeed declares with pydantic, by their path in the file."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }


def _model_problems(config: dict[str, Any], name: str, model: type[BaseModel]) -> Iterator[str]:
    """Return unknown keys and wrong values of a block, by DeepSpeed's own declaration of it."""
    from pydantic import ValidationError

    allowed: dict[str, type | None] = {}
    for field_name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated"):
            continue
        types = {bool: bool, int: float}  # 5e7 is a float in JSON, and an int for pydantic
        for key in {field_name, field.alias or field_name}:
            allowed[key] = types.get(field.annotation)
    yield from _block_problems(config, name, allowed)
    block = _at(config, name)
    if not isinstance(block, dict):
        return
    try:
        model(**{key: value for key, value in block.items() if key in allowed and _is_a(value, allowed[key])})
    except ValidationError as error:
        for item in error.errors():
            if len(item["loc"]) > 1:
                continue  # inside an inner block, which is checked by itself
            key = ".".join([name, *map(str, item["loc"])])
            if key == "zero_optimization.stage":
                continue  # reported by _zero_problems, which refuses 0 as well
            yield f"{key}={json_text(_at(config, key))}: {item['msg']}"


def _block_problems(config: dict[str, Any], name: str, allowed: dict[str, Any]) -> list[str]:
    block = _at(config, name)
    return _key_problems(block, allowed, f"{name}.") if isinstance(block, dict) else []


def _key_problems(block: dict[str, Any], allowed: dict[str, Any], prefix: str) -> list[str]:
    """Return unknown, owned, refused and mistyped keys of one block. `allowed`: key -> type, or None for any."""
    problems = []
    removed = REMOVED.get(prefix.rstrip("."), [])
    for key, value in block.items():
        path = prefix + key
        if path in RECIPE_OWNED:
            problems.append(f"{path}={json_text(value)} does not belong here; delete it: {RECIPE_OWNED[path]}")
        elif path in REFUSED:
            problems.append(f"{path}={json_text(value)} is refused; delete it: {REFUSED[path]}")
        elif key in removed:
            problems.append(f"{path}={json_text(value)} is no longer in DeepSpeed (issue 8489); delete it")
        elif key not in allowed:
            others = [name.removeprefix(prefix) for name in (*RECIPE_OWNED, *REFUSED) if name.startswith(prefix)]
            problems.append(f"unknown key {path!r}{did_you_mean(key, [*allowed, *others])}; delete it or spell it right")
        elif value != "auto" and not _is_a(value, allowed[key]):
            problems.append(f"{path}={json_text(value)} must be {_TYPE_NAMES[allowed[key]]}")
    return problems


def _is_a(value: object, kind: type | None) -> bool:
    if kind is None:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _auto_problems(value: object, path: str) -> Iterator[str]:
    if path in RECIPE_OWNED or path in REFUSED:
        return  # reported by _key_problems
    if value == "auto":
        yield f'{path}="auto" is understood by the Hugging Face Trainer only; write the value, or delete the key'
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _auto_problems(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _auto_problems(inner, f"{path}[{index}]")


def _at(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
