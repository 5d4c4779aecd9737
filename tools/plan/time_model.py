"""Predicts the time of a training step for many layouts at once: a roofline with fitted efficiencies, and the schedule.

A layer's pass takes the smooth maximum of GPU time (matrix products, attention, memory traffic) and of the host's launches, plus
its tensor-parallel all-reduces (those that go beside products, by what stands out) and the all-to-alls of context and expert
ranks. A step is 1F1B: the slowest stage for every micro batch, every stage once to fill and drain the pipeline, then the
gradients' reduction (its smooth maximum with compute where the software overlaps them), the optimizer, and a constant.
Efficiencies are dimensionless, so those fitted on one GPU serve another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# name -> (value by first principles, width: how far a fit may move it, as the standard deviation of its logarithm)
TERMS: dict[str, tuple[float, float]] = {
    "gemm": (0.75, 0.2),  # share of the peak that a wide and long matrix product reaches
    "narrow": (200.0, 1.0),  # columns of a tensor rank at which that share is half: a product starts and ends partly idle
    "short": (200.0, 0.7),  # tokens of a micro batch at which it is half
    "attention": (0.4, 0.3),  # share of the peak in attention's products
    "misaligned": (1.2, 0.2),  # factor on a layer's time where a head's width is no multiple of 8, as matrix units need
    "head": (0.65, 0.3),  # share of the peak in the vocabulary's product
    "memory": (0.6, 0.3),  # share of memory bandwidth in everything elementwise
    "launch_seconds": (1e-3, 1.0),  # host time to launch one layer's forward and backward pass
    "launch_tensor_seconds": (3e-4, 1.0),  # and more with tensor parallelism
    "blend": (3.0, 0.5),  # exponent of the smooth maximum of GPU and host time
    "tensor_latency": (2e-5, 1.0),  # seconds a hop of an all-reduce
    "tensor_link": (0.75, 0.3),  # share of the links in a node, tensor all-reduce
    "tensor_network": (3.2, 0.5),  # the same between nodes, of one GPU's network (all adapters serve one ring)
    "pipe_latency": (3e-5, 1.0),
    "pipe_rate": (0.8, 0.7),  # share of link or network between stages
    "data_link": (0.5, 0.5),
    "data_network": (0.8, 0.5),  # share of the network of a group's ranks in one node
    "shard_network": (1.0, 1.0),  # of one GPU's network, for ZeRO 3 and FSDP: many short exchanges over all ranks
    "optimizer": (1.0, 1.0),  # x 20 bytes a parameter at memory bandwidth
    "constant_seconds": (5e-3, 1.0),
}
PRIOR = np.array([value for value, _ in TERMS.values()])
WIDTHS = np.array([width for _, width in TERMS.values()])
OVERLAP = 3.0  # exponent of the smooth maximum of compute and of an exchange that it overlaps


@dataclass(frozen=True, kw_only=True)
class Cases:
    """One layout a row, every field an array [n]. A layer's figures are means over the model's layers."""

    tokens: np.ndarray  # of a micro batch
    hidden: np.ndarray
    matrices: np.ndarray  # multiply-adds a token, a layer, of all tensor ranks: what none of them shards counts for each
    scores: np.ndarray  # multiply-adds a token, a layer, in attention's two products
    misaligned: np.ndarray  # 1 where a head's width is no multiple of 8, else 0
    traffic: np.ndarray  # bytes a token, a layer, a tensor rank, that elementwise work moves, forward and backward
    head: np.ndarray  # multiply-adds a token
    passes: np.ndarray  # forward passes' worth of work a layer does: 3, or 4 with full recomputation
    tensor: np.ndarray
    sums: np.ndarray  # all-reduces' worth of what tensor ranks exchange a layer and micro batch, while nothing is computed
    sums_beside: np.ndarray  # and beside products
    passes_beside: np.ndarray  # forward passes' worth of products that those go beside
    data: np.ndarray
    pipeline: np.ndarray
    context: np.ndarray  # of the data ranks, those that share a sequence
    exchanged: np.ndarray  # bytes a token, a layer, that a context rank sends in a forward pass
    expert: np.ndarray  # of the data ranks, those that share experts
    routed: np.ndarray  # bytes a token, a layer, of what goes to all the experts that it chooses
    micro_batches: np.ndarray
    layers: np.ndarray  # of the model
    layers_slowest: np.ndarray  # of the slowest stage without the head
    layers_last: np.ndarray  # of the stage with the head
    params: np.ndarray  # of a rank of the largest stage
    reduce_bytes: np.ndarray  # a parameter of the rank, that the data ranks exchange a step
    gather_bytes: np.ndarray  # a parameter of the rank, gathered every micro batch (ZeRO 3)
    beside_backward: np.ndarray  # of reduce_bytes, those that are exchanged beside a step's last backward pass
    beside_forward: np.ndarray  # and those beside its first forward pass
    updated: np.ndarray  # parameters whose optimizer states this rank updates
    overlapped: np.ndarray  # whether what the data ranks exchange hides behind compute
    bubble_share: np.ndarray  # the share of 1F1B's bubble that the schedule leaves
    messages: np.ndarray  # between stages, one after another, that a step waits for
    pipe_share: np.ndarray  # tensor ranks that share sending one activation (Megatron scatters it, we do not)
    peak: np.ndarray  # FLOP/s of the layers' matrices
    peak_half: np.ndarray  # FLOP/s of attention and head, in 16 bits even where the layers' matrices have 8
    bandwidth: np.ndarray
    link: np.ndarray
    network: np.ndarray
    node: np.ndarray
    keys: list[tuple]  # shapes of the layer that a rank runs: equal shapes run the same kernels


def step_parts(terms: np.ndarray, c: Cases, effects: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
    """Return the seconds [n] of a step by part; they sum to the step. effects [n] multiply a layer's time."""
    k = dict(zip(TERMS, terms, strict=True))
    micro = _micro_batch(k, c, effects)
    layer = sum(micro[name] for name in ("matrices", "attention", "elementwise", "host", "tensor", "context", "expert"))
    rest = micro["head"]
    last = c.layers_last * layer + rest
    slowest = np.maximum(c.layers_slowest * layer, last)
    steady_layers = np.where(last >= slowest, c.layers_last, c.layers_slowest)
    steady_head = np.where(last >= slowest, 1.0, 0.0)
    # every micro batch takes the slowest stage's time; the other stages' work on one micro batch fills and drains the pipeline
    parts = {name: c.micro_batches * steady_layers * micro[name] for name in ("matrices", "attention", "elementwise", "host")}
    parts["head"] = c.micro_batches * steady_head * rest
    parts["tensor"] = c.micro_batches * steady_layers * micro["tensor"]
    parts["context"] = c.micro_batches * steady_layers * micro["context"]
    parts["expert"] = c.micro_batches * steady_layers * micro["expert"]
    parts["pipeline"] = c.messages * micro["pipe"]
    parts["bubble"] = np.maximum(c.layers * layer + rest - slowest, 0.0) * c.bubble_share
    # a ring over nodes uses the network adapter of each of its ranks in a node
    adapters = np.minimum(c.data, np.maximum(c.node / c.tensor, 1.0))
    network = np.where(c.gather_bytes > 0, k["shard_network"], k["data_network"] * adapters) * c.network
    link = k["data_link"] * c.link
    rate = np.where(c.tensor * c.data <= c.node, link, np.minimum(network, link))
    exchange = (c.data - 1) / c.data * c.params * (c.reduce_bytes + c.gather_bytes * c.micro_batches) / rate
    busy = sum(parts.values())
    micro_seconds, alone = steady_layers * layer + steady_head * rest, exchange
    for share, width in (((c.passes - 1.0) / c.passes, c.beside_backward), (1.0 / c.passes, c.beside_forward)):
        beside = (c.data - 1) / c.data * c.params * width / rate
        alone = alone - beside + _standing_out(share * micro_seconds, beside)
    parts["data"] = np.where(c.overlapped > 0, _standing_out(busy, exchange), alone)
    parts["optimizer"] = k["optimizer"] * 20.0 * c.updated / c.bandwidth
    parts["other"] = np.full_like(layer, k["constant_seconds"])
    return parts


def _micro_batch(k: dict[str, float], c: Cases, effects: np.ndarray | float) -> dict[str, np.ndarray]:
    """Return the seconds of one micro batch: in one layer by part, in the head, to send to the next stage."""
    columns = c.hidden / c.tensor
    rate = k["gemm"] * c.peak * columns / (columns + k["narrow"]) * c.tokens / (c.tokens + k["short"])
    matrices = 2.0 * c.passes * c.tokens * c.matrices / c.tensor / rate
    attention = 2.0 * c.passes * c.tokens * c.scores / c.tensor / (k["attention"] * c.peak_half)
    elementwise = c.tokens * c.traffic * c.passes / 3.0 / (k["memory"] * c.bandwidth)
    gpu = matrices + attention + elementwise
    split = c.tensor > 1
    host = (k["launch_seconds"] + split * k["launch_tensor_seconds"]) * c.passes / 3.0
    effects = effects * k["misaligned"] ** c.misaligned
    layer = _smooth_maximum(gpu, host, k["blend"])
    activation = 2.0 * c.tokens * c.hidden
    rate = np.where(c.tensor > c.node, k["tensor_network"] * c.network, k["tensor_link"] * c.link)
    ring = 2.0 * (c.tensor - 1) / c.tensor * activation / rate
    once = k["tensor_latency"] * (c.tensor - 1) + ring
    standing_out = _standing_out(c.passes_beside / c.passes * matrices, c.sums_beside * once)
    tensor = np.where(split, c.sums * once + standing_out, 0.0)
    within = c.tensor * c.context <= c.node
    rate = np.where(within, k["tensor_link"] * c.link, k["tensor_network"] * c.network)
    exchange = 2.0 * k["tensor_latency"] * (c.context - 1) + c.tokens * c.exchanged / rate  # to heads, and back
    context = np.where(c.context > 1, (c.passes - 1.0) * exchange, 0.0)
    within = c.tensor * c.expert <= c.node
    rate = np.where(within, k["tensor_link"] * c.link, k["tensor_network"] * c.network)
    # to the experts and back, if their loads are even, and the counts before, for which the host waits
    travel = 3.0 * k["tensor_latency"] * (c.expert - 1) + 2.0 * c.tokens * c.routed * (c.expert - 1) / c.expert / rate
    expert = np.where(c.expert > 1, (c.passes - 1.0) * travel, 0.0)
    inside = c.tensor * c.data * 2 <= c.node
    pipe = k["pipe_latency"] + activation / c.pipe_share / (k["pipe_rate"] * np.where(inside, c.link, c.network))
    return {
        "matrices": matrices * effects,
        "attention": attention * effects,
        "elementwise": elementwise * effects,
        "host": (layer - gpu) * effects,
        "tensor": tensor * effects,
        "context": context * effects,
        "expert": expert * effects,
        "head": 6.0 * c.tokens * c.head / c.tensor / (k["head"] * c.peak_half),
        "pipe": np.where(c.pipeline > 1, pipe, 0.0),
    }


def _standing_out(compute: np.ndarray, exchange: np.ndarray) -> np.ndarray:
    """Return the seconds by which an exchange is not hidden by the compute that it goes beside."""
    return _smooth_maximum(compute, exchange, OVERLAP) - compute


def _smooth_maximum(a: np.ndarray, b: np.ndarray, exponent: float) -> np.ndarray:
    return (a**exponent + b**exponent) ** (1.0 / exponent)


def step_seconds(terms: np.ndarray, cases: Cases, effects: np.ndarray | float = 1.0) -> np.ndarray:
    return sum(step_parts(terms, cases, effects).values())
