"""Predicts the time of a training step for many layouts at once: a roofline with fitted efficiencies, and the schedule.

A layer takes the smooth maximum of GPU time (matrix products in waves of tiles, attention, what elementwise kernels move) and of
the host's launches, plus its tensor-parallel all-reduces (those that go beside products, by what stands out) and the all-to-alls
of context and expert ranks. A step is 1F1B: the slowest stage for every micro batch, every stage once to fill and drain the
pipeline, then what stands out of the gradients' reduction and the weights' gathering, the optimizer, and a constant. By first
principles every term comes from a data sheet, from a published measurement of a part of a step, or from our count. A fit moves
them; as most are shares of what a GPU can do, those fitted on one serve another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.plan.products import training_seconds

# name -> (value by first principles, width: how far a fit may move it, as the standard deviation of its logarithm)
TERMS: dict[str, tuple[float, float]] = {
    # of the best product's rate: shapes are not the best, and a step waits for the slowest of GPUs that differ by 5 % and more
    # (Bekman, Machine Learning Engineering)
    "gemm": (0.9, 0.2),
    "attention": (1.0, 0.3),  # of the rate that attention's kernel was measured at
    "misaligned": (1.2, 0.2),  # factor on a layer's time where a head's width is no multiple of 8, as matrix units need
    # factor on the vocabulary's products where a rank's part is no multiple of 8 ("over 2x": He, What Shapes Do Matrix
    # Multiplications Like, answer 1)
    "misaligned_head": (2.0, 0.3),
    "head": (1.0, 0.2),  # factor on the rest of the vocabulary's product, and of the loss
    "memory": (0.75, 0.15),  # share of memory bandwidth: copies reach 0.85 to 0.9 (BabelStream), norms and sums of gradients less
    # host time to start a kernel. 25.5 tokens/s of a 7B model that waits for its host alone (pytorch.org/blog/
    # accelerating-generative-ai-2): 1.22 ms for each of 32 layers, of 51 kernels by our count of its code
    "launch_seconds": (24e-6, 1.0),
    "blend": (3.0, 0.5),  # exponent of the smooth maximum of GPU and host time
    # an all-reduce in a node: vTrain's table of NCCL on A100s (trace/a100 in its repository), 41, 56 and 70 us and 185, 206
    # and 230 GB/s of 300 with 2, 4 and 8 GPUs
    "tensor_start": (35e-6, 0.5),
    "tensor_latency": (5.6e-6, 1.0),  # seconds a hop
    "tensor_link": (0.7, 0.3),  # share of the links in a node
    "tensor_network": (8.0, 0.5),  # the same between nodes, of one GPU's network: all of a node's adapters serve one ring
    "pipe_latency": (3e-5, 1.0),
    "pipe_rate": (0.8, 0.7),  # share of link or network between stages
    "data_link": (0.5, 0.5),
    "data_network": (0.8, 0.5),  # share of the network of a group's ranks in one node
    "shard_network": (1.0, 1.0),  # of one GPU's network, for ZeRO 3 and FSDP: many short exchanges over all ranks
    # x 40 bytes a parameter: Adam reads 4 and writes 3 fp32 numbers, the norm reads one, weights are written in 16 bits (38)
    "optimizer": (1.0, 1.0),
    "constant_seconds": (5e-3, 1.0),
}
REDUCTION_KERNELS = 2.0  # kernels' worth of host time in starting an all-reduce: itself, and the event that orders it
OUTSIDE_KERNELS = 60.0  # of embedding, final norm, head and loss, both ways, by our count
PRIOR = np.array([value for value, _ in TERMS.values()])
WIDTHS = np.array([width for _, width in TERMS.values()])
OVERLAP = 3.0  # exponent of the smooth maximum of compute and of an exchange that it overlaps


@dataclass(frozen=True, kw_only=True)
class Cases:
    """One layout a row, every field an array [n]. A layer's figures are means over the model's layers."""

    tokens: np.ndarray  # of a micro batch
    hidden: np.ndarray
    widths: np.ndarray  # [n, shapes]: of a layer's products the side that tensor ranks divide, on a rank; see `layer_products`
    inners: np.ndarray  # [n, shapes]: the other side
    rows: np.ndarray  # [n, shapes]: tokens that each sees, of one of the micro batch
    groups: np.ndarray  # [n, shapes]: products in one launch
    counts: np.ndarray  # [n, shapes]: a layer, 0 where there are fewer shapes
    summed: np.ndarray  # [n, shapes]: bytes that an element of the weight's gradient moves in its product
    scores: np.ndarray  # multiply-adds a token, a layer, in attention's two products
    attention_passes: np.ndarray  # of attention's products: a fused kernel's backward pass is 2.5 forward passes' work
    attention_rate: np.ndarray  # FLOP/s of attention's products
    misaligned: np.ndarray  # 1 where a head's width is no multiple of 8, else 0
    traffic: np.ndarray  # bytes a token, a layer, a tensor rank, that elementwise work moves in all passes
    kernels: np.ndarray  # that a layer's passes start, a micro batch
    head: np.ndarray  # multiply-adds a token
    head_summed: np.ndarray  # bytes that an element of the head's gradient moves in its products
    logit_bytes: np.ndarray  # that the loss moves for each of a token's logits
    sum_bytes: np.ndarray  # that adding a micro batch's gradients to those before moves, but in products
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
    beside_backward: np.ndarray  # of reduce_bytes, those that are exchanged beside a step's last backward passes
    beside_forward: np.ndarray  # and those beside its first forward passes
    laps: np.ndarray  # chunks of a rank that are exchanged one after another
    lap_batches: np.ndarray  # micro batches that a chunk runs before the next chunk's turn
    last_passes: np.ndarray  # forward passes' worth of a chunk's work that gives it its last gradients
    deferred: np.ndarray  # forward passes' worth of weight gradients that come later than their lap
    updated: np.ndarray  # parameters whose optimizer states this rank updates
    overlapped: np.ndarray  # whether what the data ranks exchange hides behind compute
    bubble_share: np.ndarray  # the share of 1F1B's bubble that the schedule leaves
    messages: np.ndarray  # between stages, one after another, that a step waits for
    pipe_share: np.ndarray  # tensor ranks that share sending one activation (Megatron scatters it, we do not)
    rate: np.ndarray  # FLOP/s of the best products in the layers
    rate_half: np.ndarray  # in the head, in 16 bits even where the layers' matrices have 8
    units: np.ndarray  # of the GPU, for tiles of a product
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
    rest = micro["head"] + micro["loss"]
    last = c.layers_last * layer + rest
    slowest = np.maximum(c.layers_slowest * layer, last)
    steady_layers = np.where(last >= slowest, c.layers_last, c.layers_slowest)
    steady_head = np.where(last >= slowest, 1.0, 0.0)
    # every micro batch takes the slowest stage's time; the other stages' work on one micro batch fills and drains the pipeline
    parts = {name: c.micro_batches * steady_layers * micro[name] for name in ("matrices", "attention", "elementwise", "host")}
    parts |= {name: c.micro_batches * steady_head * micro[name] for name in ("head", "loss")}
    parts |= {name: c.micro_batches * steady_layers * micro[name] for name in ("tensor", "context", "expert")}
    sums = c.sum_bytes / (k["memory"] * c.bandwidth)
    parts["gradients"] = c.micro_batches * sums
    parts["pipeline"] = c.messages * micro["pipe"]
    parts["bubble"] = (np.maximum(c.layers * layer + rest - slowest, 0.0) + (c.pipeline - 1.0) * sums) * c.bubble_share
    micro_seconds, busy = steady_layers * layer + steady_head * rest, sum(parts.values())
    parts["data"] = _data_seconds(k, c, micro_seconds, busy)
    parts["optimizer"] = k["optimizer"] * 40.0 * c.updated / (k["memory"] * c.bandwidth)
    parts["other"] = np.full_like(layer, k["constant_seconds"])
    return parts


def _data_seconds(k: dict[str, float], c: Cases, micro_seconds: np.ndarray, busy: np.ndarray) -> np.ndarray:
    """Return the seconds of a step in which data ranks exchange and nothing is computed.

    micro_seconds: of a micro batch's passes on the slowest stage; busy: of all passes.
    """
    # a ring over nodes uses the network adapter of each of its ranks in a node
    adapters = np.minimum(c.data, np.maximum(c.node / c.tensor, 1.0))
    network = np.where(c.gather_bytes > 0, k["shard_network"], k["data_network"] * adapters) * c.network
    link = k["data_link"] * c.link
    rate = np.where(c.tensor * c.data <= c.node, link, np.minimum(network, link))
    a_byte = (c.data - 1) / c.data * c.params / rate  # seconds, of one byte a parameter
    exchange = a_byte * (c.reduce_bytes + c.gather_bytes * c.micro_batches)
    one_pass = micro_seconds / c.passes / c.laps  # of a chunk
    reduced, gathered = a_byte * c.beside_backward, a_byte * c.beside_forward
    alone = exchange - reduced - gathered
    alone += _lapped(c, reduced, one_pass * c.last_passes, one_pass * (c.passes - 1.0), one_pass * c.deferred)
    alone += _lapped(c, gathered, one_pass, one_pass, 0.0)
    return np.where(c.overlapped > 0, _standing_out(busy, exchange), alone)


def _lapped(c: Cases, exchange: np.ndarray, nearest: np.ndarray, one_of_lap: np.ndarray, late: np.ndarray | float) -> np.ndarray:
    """Return by how many seconds an exchange stands out of a step whose ends are laps: a chunk's part goes beside the others'.

    nearest: seconds of the pass at the very end, or beginning, beside which its own chunk's part goes; one_of_lap: of each of a
    lap's passes; late: by which parts begin after their lap.
    """
    laps = np.maximum((c.laps - 1.0) * c.lap_batches * one_of_lap - late, 0.0)
    return np.maximum(_standing_out(nearest, exchange / c.laps), _standing_out(nearest + laps, exchange))


def _micro_batch(k: dict[str, float], c: Cases, effects: np.ndarray | float) -> dict[str, np.ndarray]:
    """Return the seconds of one micro batch: in one layer by part, in the head, to send to the next stage."""
    gpu = {"units": c.units, "bandwidth": k["memory"] * c.bandwidth}
    matrices = _matrix_seconds(k, c)
    attention = 2.0 * c.attention_passes * c.tokens * c.scores / c.tensor / (k["attention"] * c.attention_rate)
    elementwise = c.tokens * c.traffic / gpu["bandwidth"]
    busy = matrices + attention + elementwise
    split = c.tensor > 1
    host = k["launch_seconds"] * (c.kernels + split * REDUCTION_KERNELS * (c.sums + c.sums_beside))
    effects = effects * k["misaligned"] ** c.misaligned
    layer = _smooth_maximum(busy, host, k["blend"])
    activation = 2.0 * c.tokens * c.hidden
    rate = np.where(c.tensor > c.node, k["tensor_network"] * c.network, k["tensor_link"] * c.link)
    ring = 2.0 * (c.tensor - 1) / c.tensor * activation / rate
    once = k["tensor_start"] + k["tensor_latency"] * (c.tensor - 1) + ring
    standing_out = _standing_out(c.passes_beside / c.passes * matrices, c.sums_beside * once)
    tensor = np.where(split, c.sums * once + standing_out, 0.0)
    within = c.tensor * c.context <= c.node
    rate = np.where(within, k["tensor_link"] * c.link, k["data_network"] * c.network)  # between nodes each uses its adapter
    exchange = 2.0 * k["tensor_latency"] * (c.context - 1) + c.tokens * c.exchanged / rate  # to heads, and back
    context = np.where(c.context > 1, (c.passes - 1.0) * exchange, 0.0)
    within = c.tensor * c.expert <= c.node
    rate = np.where(within, k["tensor_link"] * c.link, k["data_network"] * c.network)
    # to the experts and back, if their loads are even, and the counts before, for which the host waits
    travel = 3.0 * k["tensor_latency"] * (c.expert - 1) + 2.0 * c.tokens * c.routed * (c.expert - 1) / c.expert / rate
    expert = np.where(c.expert > 1, (c.passes - 1.0) * travel, 0.0)
    inside = c.tensor * c.data * 2 <= c.node
    pipe = k["pipe_latency"] + activation / c.pipe_share / (k["pipe_rate"] * np.where(inside, c.link, c.network))
    vocab = np.floor(c.head / c.hidden / c.tensor)
    head = training_seconds(
        c.tokens,
        vocab,
        c.hidden,
        np.zeros_like(vocab),
        groups=np.ones_like(vocab),
        rate=k["gemm"] * c.rate_half,
        summed=c.head_summed,
        **gpu,
    )
    head = k["head"] * head * np.where(vocab % 8 > 0, k["misaligned_head"], 1.0)
    loss = k["head"] * c.tokens * vocab * c.logit_bytes / gpu["bandwidth"]
    outside = _smooth_maximum(head + loss, k["launch_seconds"] * OUTSIDE_KERNELS, k["blend"])
    return {
        "matrices": matrices * effects,
        "attention": attention * effects,
        "elementwise": elementwise * effects,
        "host": (layer - busy) * effects,
        "tensor": tensor * effects,
        "context": context * effects,
        "expert": expert * effects,
        "head": head,
        "loss": outside - head,
        "pipe": np.where(c.pipeline > 1, pipe, 0.0),
    }


def _matrix_seconds(k: dict[str, float], c: Cases) -> np.ndarray:
    """Return the seconds of a layer's matrix products, all passes."""

    def each(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[:, None], c.widths.shape)

    gpu = {"units": each(c.units), "bandwidth": each(k["memory"] * c.bandwidth), "rate": each(k["gemm"] * c.rate)}
    tokens, repeated = c.tokens[:, None] * c.rows, each(c.passes - 3.0)
    options = {"groups": c.groups, "summed": c.summed}
    return (c.counts * training_seconds(tokens, c.widths, c.inners, repeated, **options, **gpu)).sum(axis=1)


def _standing_out(compute: np.ndarray, exchange: np.ndarray) -> np.ndarray:
    """Return the seconds by which an exchange is not hidden by the compute that it goes beside."""
    return _smooth_maximum(compute, exchange, OVERLAP) - compute


def _smooth_maximum(a: np.ndarray, b: np.ndarray, exponent: float) -> np.ndarray:
    return (a**exponent + b**exponent) ** (1.0 / exponent)


def step_seconds(terms: np.ndarray, cases: Cases, effects: np.ndarray | float = 1.0) -> np.ndarray:
    return sum(step_parts(terms, cases, effects).values())
