"""Turns rows of published tables into cases of the two models: GPT's formulas, Megatron's and FSDP's memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.bench.planner.tables import MeasuredRun
from tools.plan.memory_model import MemoryCase, StageBytes, library_bytes
from tools.plan.time_model import Cases

_BUCKET_ELEMENTS = 5e8  # DeepSpeed's default
_GROUPS = 6  # Megatron-DeepSpeed: tensor, pipeline, data, model, embedding, world
_FSDP_GROUPS = 2
# What Megatron-LM's layer moves, in bytes a token and element of the hidden states (those of all tensor ranks, and of each one's
# part) and a score, by our count of its fused kernels in 16 bits with a byte for dropout's mask. Forward: norms 4 each, bias with
# dropout and residual 7 each; copies of attention's output 4, bias with GELU 16; scores written, masked and normalized, dropped
# out, and read. Backward: the norms 11 each, dropout's 7; GELU 24 and 8 for its bias, copies and bias of q, k and v 22
FORWARD, BACKWARD = (22.0, 20.0), (36.0, 54.0)
FORWARD_SCORE, BACKWARD_SCORE = 13.0, 19.0
# that a layer starts, by our count of its code; what it scripts counts as what it is written of, which its host pays as much for
FORWARD_KERNELS, BACKWARD_KERNELS = 28.0, 55.0
LOGIT_BYTES = 60.0  # of vocabulary-parallel cross-entropy: to fp32, less the maximum, exponential, sum, share; copy, and back
GRADIENT_BYTES = 6.0  # 16-bit gradients, added


def time_cases(rows: Sequence[MeasuredRun], *, by_table: bool = False) -> Cases:
    """Return the rows as cases. `by_table`: rows of a table share one factor (software, GPU), not rows of one layer shape."""

    def column(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=float)

    def each(name: str) -> np.ndarray:
        return column([getattr(row, name) for row in rows])

    layer_params, tensor, pipeline, data = each("layer_params"), each("tensor"), each("pipeline"), each("data")
    hidden, heads, seq_len, layers = each("hidden"), each("heads"), each("seq_len"), each("layers")
    flash, sharded, again = each("flash") > 0, each("sharded") > 0, each("passes") - 3.0
    score_forward, score_backward = (np.where(flash, 0.0, size) for size in (FORWARD_SCORE, BACKWARD_SCORE))
    score_again = np.where(column([row.recompute == "selective" for row in rows]) > 0, 1.0, again)
    whole = np.where(each("sequence_parallel") > 0, tensor, 1.0)
    by_hidden = (1 + again) * (FORWARD[0] / whole + FORWARD[1] / tensor) + BACKWARD[0] / whole + BACKWARD[1] / tensor
    by_score = (1 + score_again) * score_forward + score_backward
    half = column([row.device.product_rate("fp16") for row in rows])
    fused = column([row.device.peak("fp16") * row.device.flash for row in rows]) * np.where(each("first_flash") > 0, 0.5, 1.0)
    vocab_params = each("vocab") * hidden
    params = (layers * layer_params / pipeline + vocab_params) / tensor
    stages = [_stage_layers(row) for row in rows]
    return Cases(
        tokens=each("micro_seqs") * seq_len / each("sequence_share"),
        hidden=hidden,
        widths=layer_params[:, None] / (12.0 * hidden * tensor)[:, None] * np.array([3.0, 1.0, 4.0, 4.0]),
        inners=np.repeat(hidden[:, None], 4, axis=1),
        rows=np.ones((len(rows), 4)),
        groups=np.ones((len(rows), 4)),
        counts=np.ones((len(rows), 4)),
        summed=np.full((len(rows), 4), 2.0),
        scores=2.0 * hidden * seq_len * np.where(flash, 0.5, 1.0),
        misaligned=(hidden % heads + hidden // heads % 8 > 0) * 1.0,
        # unfused products of scores have a head's width for their depth: loads do not hide behind them, and they take their time
        attention_passes=each("passes") + np.where(flash, 0.5, 0.0),
        attention_rate=np.where(flash, fused, half),
        traffic=hidden * by_hidden + heads * seq_len / tensor * by_score,
        kernels=(1 + again) * FORWARD_KERNELS + BACKWARD_KERNELS,
        head=vocab_params,
        head_summed=np.zeros_like(tensor),  # FLOPs bound the head's products
        logit_bytes=np.full_like(tensor, LOGIT_BYTES),
        sum_bytes=params * GRADIENT_BYTES,
        passes=each("passes"),
        tensor=tensor,
        sums=2.0 * (each("passes") - 1.0),  # two a forward pass, two a backward pass, which is two passes' worth of work
        sums_beside=np.zeros_like(tensor),
        passes_beside=np.zeros_like(tensor),
        data=data * each("sequence_share"),
        pipeline=pipeline,
        context=np.ones_like(tensor),
        exchanged=np.zeros_like(tensor),
        expert=np.ones_like(tensor),
        routed=np.zeros_like(tensor),
        micro_batches=each("micro_batches"),
        layers=layers,
        layers_slowest=column([max(of[:-1], default=0) for of in stages]),
        layers_last=column([of[-1] for of in stages]),
        params=params,
        reduce_bytes=np.where(sharded, 2.0, 4.0),
        beside_backward=np.zeros_like(tensor),
        beside_forward=np.zeros_like(tensor),
        laps=np.ones_like(tensor),
        lap_batches=np.ones_like(tensor),
        last_passes=each("passes") - 1.0,
        deferred=np.zeros_like(tensor),
        gather_bytes=column([2.0 * _gathers(row) for row in rows]),
        updated=np.where((each("overlapped") > 0) | (each("zero_stage") > 0), params / data, params),
        overlapped=each("overlapped"),
        bubble_share=1.0 / each("chunks"),
        messages=2.0 * (each("micro_batches") + pipeline - 1),
        pipe_share=tensor,
        rate=column([row.device.product_rate(row.precision) for row in rows]),
        rate_half=half,
        units=column([row.device.units for row in rows]),
        bandwidth=column([row.device.bandwidth for row in rows]),
        link=column([row.device.link for row in rows]),
        network=column([row.device.network for row in rows]),
        node=column([row.device.node for row in rows]),
        keys=[(row.table,) if by_table else (row.hidden, row.heads, row.seq_len, row.tensor, row.micro_seqs) for row in rows],
    )


def _gathers(row: MeasuredRun) -> int:
    """Return how often a micro batch gathers a layer's sharded weights.

    FSDP recomputes a layer while it holds it for the backward pass; ZeRO 3 releases it in between.
    """
    if not row.sharded:
        return 0
    return 3 if row.zero_stage == 3 and row.recompute == "full" else 2


def memory_case(row: MeasuredRun) -> MemoryCase:
    """Return a row's memory by Megatron's formulas (arXiv 2205.05198: sbh(10 + 24/t) + 5as^2b/t bytes a layer; 2sbh stored under
    full recomputation).

    Selective recomputation drops the scores; with sequence parallelism all 34sbh are sharded. torchtitan's keeps every second
    matrix product: half.
    """
    weights, gradients, optimizer = _state_bytes(row)
    tokens = row.micro_seqs * row.seq_len / row.sequence_share
    boundary = 2.0 * tokens * row.hidden / (row.tensor if row.sequence_parallel else 1)
    whole = tokens * row.hidden * (34.0 / row.tensor if row.sequence_parallel else 10.0 + 24.0 / row.tensor)
    if row.recompute != "selective" and not row.flash:
        whole += 5.0 * row.heads * row.seq_len * tokens / row.tensor
    kept = {"full": boundary, "selective": whole / 2 if row.sharded else whole, "none": whole}[row.recompute]
    stages = []
    for index, count in enumerate(_stage_layers(row)):
        in_flight = min(row.pipeline - index, row.micro_batches)
        is_end = index in (0, row.pipeline - 1)
        params = (count * row.layer_params + is_end * row.vocab * row.hidden) / row.tensor
        logits = 10.0 * tokens * row.vocab / row.tensor if index == row.pipeline - 1 else 0.0
        stages.append(
            StageBytes(
                weights=weights * params, gradients=gradients * params, optimizer=optimizer * params,
                stored=count * in_flight * kept, working=whole, loss=logits, in_flight=in_flight,
            )
        )  # fmt: skip
    return MemoryCase(stages=tuple(stages), libraries=_libraries(row, gradients), capacity=row.device.memory)


def _libraries(row: MeasuredRun, gradient_bytes: float) -> float:
    if row.arithmetic:
        return 0.0
    if row.sharded:
        return library_bytes(_FSDP_GROUPS, 0.0, 2.0)
    return library_bytes(_GROUPS, _BUCKET_ELEMENTS, 4.0 if gradient_bytes > 2.0 else 2.0)


def _state_bytes(row: MeasuredRun) -> tuple[float, float, float]:
    """Return bytes a parameter of (weights, gradients, optimizer).

    Megatron-DeepSpeed in bf16: 16-bit weights and gradients, an fp32 sum of gradients, 12 bytes of fp32 states over the data
    ranks. In fp16 the fp32 gradients belong to the sharded part; without ZeRO a flat 16-bit copy of them comes on top. FSDP: fp32
    all, sharded; under a pipeline weights and gradients stay whole between micro batches. Megatron alone: 18 bytes.
    """
    ranks = row.data * row.sequence_share
    if row.sharded:
        whole = row.pipeline > 1
        return 4.0 / ranks + 2.0 * whole, 4.0 / ranks + 4.0 * whole, 8.0 / ranks
    if row.table.endswith("bf16"):
        return 2.0, 6.0, 12.0 / ranks
    if row.zero_stage == 0 and not row.table.endswith("fp16"):
        return 2.0, 4.0, 12.0
    return (2.0, 2.0, 16.0 / ranks) if row.zero_stage else (2.0, 4.0, 16.0)


def _stage_layers(row: MeasuredRun) -> list[int]:
    """Return the layers of each stage: even, the rest to the later ones; one less at the ends where these count as a layer."""
    blocks = row.layers + (2 if row.embedding_balanced else 0)
    base, rest = divmod(blocks, row.pipeline)
    counts = [base + (index >= row.pipeline - rest) for index in range(row.pipeline)]
    if row.embedding_balanced:
        counts[0] -= 1
        counts[-1] -= 1
    return counts
