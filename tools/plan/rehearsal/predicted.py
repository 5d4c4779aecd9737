"""Says what the planner predicts of one rank's step, in the terms in which a rehearsal counts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.common.config.ds_config import load_ds_config, precision, zero_stage
from recipes.common.recipe import Layout, Recipe
from tools.common.devices import Device
from tools.plan.memory_model import StageBytes
from tools.plan.model_cases import Candidate, memory_case, read_model, time_cases


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one stage. No allowance for libraries and for what the allocator keeps: a rehearsal has neither."""

    states: float  # bytes of weights, gradients and optimizer states
    buckets: float  # bytes of ZeRO's buffers for gradients, as they are filled and as they are sent
    activations: float  # bytes, of the micro batches in flight, and a layer's working set
    loss: float  # bytes
    products: float  # FLOPs of a step
    elementwise: float  # bytes that the layers' elementwise work moves in a step
    reduced: float  # bytes that the data ranks exchange in a step, a parameter's once for each way

    @property
    def peak(self) -> float:
        return self.states + self.buckets + self.activations + self.loss


def predict(recipe: Recipe, layout: Layout, world_size: int, stage: int, micro_batches: int, device: Device) -> Prediction:
    facts = read_model(recipe, load_ds_config(recipe.deepspeed))
    data = world_size // (layout.tensor * layout.pipeline)
    candidate = Candidate(layout=layout, data=data, micro_seqs=recipe.batch.micro_seqs)
    stages = memory_case(facts, candidate, device).stages
    bytes_of: StageBytes = stages[stage]
    own, work = facts.own_layers(layout)[stage], facts.work
    row = time_cases(facts, [candidate], device)
    tokens, passes = float(row.tokens[0]), float(row.passes[0])
    matrices = 2.0 * passes * sum(work.layers[index].matrices for index in own) / layout.tensor
    head = 6.0 * work.head / layout.tensor if bytes_of.loss else 0.0
    params = bytes_of.weights / facts.activation_width
    return Prediction(
        states=bytes_of.states,
        buckets=_bucket_bytes(facts.ds_config),
        activations=bytes_of.stored + bytes_of.working,
        loss=bytes_of.loss,
        products=(matrices + head) * tokens * micro_batches,
        elementwise=float(row.traffic[0]) * passes / 3.0 * tokens * micro_batches * len(own),
        reduced=params * float(row.reduce_bytes[0]) if data > 1 else 0.0,
    )


def _bucket_bytes(ds_config: dict[str, Any]) -> float:
    """Return the bytes of two buckets; DeepSpeed's optimizer for bf16 with fp32 gradients has none."""
    if precision(ds_config) == "bf16" and zero_stage(ds_config) <= 1:
        return 0.0
    width = 4.0 if ds_config.get("communication_data_type", precision(ds_config)) == "fp32" else 2.0
    return 2.0 * width * ds_config.get("zero_optimization", {}).get("reduce_bucket_size", 5e8)
