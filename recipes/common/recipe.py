"""Declares what a recipe says: frozen dataclasses of plain data, with no behaviour but arithmetic on their own fields.

The recipe owns what changes the trained model, and the layout; `ds_configs/*.json` own memory and precision. The data-parallel
size and gradient accumulation are derived (`Sizes`), never typed. Nothing is checked here: `recipes.common.checks.recipe_checks`
reports every problem at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOT = Path(__file__).resolve().parents[2]


class RecipeError(ValueError):
    """Raised with all of the user's mistakes in a recipe, a ds_config, the data or the flags, in one message."""

    def __init__(self, title: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in problems))


RECOMPUTE = ("none", "selective", "full")  # recipes.common.model.recompute
KERNELS = ("none", "compile")
PRECISIONS = (FP8,) = ("fp8",)  # recipes.common.model.fp8
DETERMINISM = ("order", "rounding", "bitwise", "bitwise_stages")  # recipes.common.checks.determinism_checks
EXPERTS = SLICES, WHOLE = "slices", "tensor"  # recipes.common.parallel.experts
PIPELINE_SCHEDULES = ("1f1b", "zero_bubble", "zero_bubble_v")  # recipes.common.pipeline.schedules


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallelism of one replica of the model: tensor x pipeline GPUs. Data parallelism uses all GPUs that remain.

    `context` data ranks share their sequences, each with a slice; `expert` data ranks share experts, each with some of them. Both
    split the data dimension, and add no GPUs.
    """

    tensor: int = 1  # tensor-parallel size: GPUs that shard each layer's matrices; best a divisor of the GPUs of a node
    pipeline: int = 1  # pipeline-parallel size: stages, each with consecutive layers
    context: int = 1  # data ranks that share each sequence, a slice each; attention exchanges slices for heads
    # Of the context ranks, how many divide the heads between them; the rest divide the queries, and gather all keys and values.
    # 0: as many as the heads allow
    context_heads: int = 0
    # Activation recomputation. "none": keep all activations. "full": keep each layer's input and run the layer again in the
    # backward pass. "selective": keep also what matrix products and attention give, and repeat only norms and elementwise work
    recompute: str = "none"
    recompute_every: int = 1  # recompute layers 0, k, 2k, ... only
    offload_activations: bool = False  # keep the inputs of recomputed layers in the host's memory: recompute="full"
    mlp_chunk_tokens: int = 0  # compute MLPs for so many tokens at a time, and again in the backward pass; 0: for all at once
    sequence_parallel: bool = False  # outside attention and MLP, each tensor rank holds its part of the sequence only
    # Data ranks that share a mixture's experts, each with whole ones, a part of them; tokens travel to their experts. It splits
    # the data dimension, context ranks included, and adds no GPUs
    expert: int = 1
    # How tensor ranks share a mixture's experts. "slices": each has a slice of every expert. "tensor": each has whole experts, a
    # part of them; the same messages, and larger products
    experts: str = "slices"
    # "1f1b": one forward, one backward. "zero_bubble": weight gradients are computed late, to fill the bubble.
    # "zero_bubble_v": also, each stage has two chunks of layers, one from either end of the model (ZB-V)
    pipeline_schedule: str = "1f1b"
    # Chunks of layers of each stage, which a micro batch passes in as many rounds of the pipeline ("interleaved", Megatron's
    # virtual stages): the bubble is so many times shorter, and there are so many times more messages. "zero_bubble_v" has two
    chunks: int = 1
    # Layers of each chunk (of each stage, where it has one), in the model's order. (): balanced by cost
    layers_per_stage: tuple[int, ...] = ()

    def recomputed_layers(self, depth: int) -> range:
        """Return the indices of the layers to recompute, among `depth`."""
        return range(0, depth if self.recompute != "none" else 0, self.recompute_every)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of one optimizer step. Gradient accumulation follows: global_seqs / (micro_seqs x data / context ranks)."""

    seq_len: int  # tokens of a sequence
    micro_seqs: int  # sequences of a micro batch: one forward and backward pass of one data rank
    global_seqs: int  # sequences of one optimizer step over all GPUs, the same at any number of them
    # Batch-size ramp ((until_seqs, global_seqs), ...): until so many sequences have been read in all, use this global_seqs
    ramp: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), which leaves out norms and biases (fewer than 2 dimensions)."""

    lr: float  # the peak learning rate, which the schedule scales
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True  # False: no weight decay on input and output embeddings
    clip: float = 1.0  # the largest global gradient norm; 0: no clipping


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent, for comparisons: it shows wrongly scaled gradients, which Adam hides."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_embeddings: bool = True
    clip: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then the peak. A schedule has all its lengths in steps, or all in tokens."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up, then a line down to `min_lr` at the end of the run, or at `decay_*` counted from the run's start."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    decay_steps: int | None = None
    decay_tokens: int | None = None
    min_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine to `min_lr` at the end of the run, or at `decay_*` counted from the run's start."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    decay_steps: int | None = None
    decay_tokens: int | None = None
    min_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): the peak until the last `cooldown_*` of the run, then down to `min_lr`."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    cooldown_steps: int | None = None
    cooldown_tokens: int | None = None
    shape: str = "1-sqrt"  # of the cool-down: "linear", "cosine" or "1-sqrt" (arXiv 2405.18392)
    min_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Linear warm-up, then lr * sqrt(warm-up / now) (arXiv 1706.03762), but never below `min_lr`."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    min_lr: float = 0.0


Optimizer = AdamW | SGD
Schedule = Constant | Linear | Cosine | WSD | InverseSqrt


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Several prepared folders, read as one in proportion to their weights, which need not sum to one."""

    weights: dict[str, float]  # folder, as in Recipe.data -> weight
    changes: tuple[tuple[int, dict[str, float]], ...] = ()  # ((after_tokens, weights), ...): the weights from then on


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures the loss on the validation split of every folder: before the first step, every `every_steps`, and at the end."""

    every_steps: int = 0  # 0: never
    seqs: int = 256  # sequences to evaluate, from the start of each validation split


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Says when to save a checkpoint, and which to keep. The last step is always saved."""

    every_steps: int = 0  # save every so many steps; 0: not by steps
    every_minutes: float = 0.0  # save when so much time has passed since the last save; 0: not by time
    keep_last: int = 3  # older checkpoints are deleted
    keep_every_steps: int = 0  # but those at multiples of this step; 0: none
    last_save_minutes: float = 10.0  # how long the last save is tried again while it fails, before the run ends without it


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Says how often statistics are recorded, in the run's `tensor_stats/` and `metrics.jsonl` (recipes.common.monitor)."""

    every_steps: int = 1  # norms of gradients, weights and updates, of each parameter; 0: never
    activations_every_steps: int = 10  # outputs and attention logits of each layer, load of each expert; 0: never
    drift_every_steps: int = 100  # compare the copies of replicated parameters between ranks; 0: never
    on_drift: str = "stop"  # "stop" or "log", when copies differ
    max_nonfinite_steps: int = 3  # a step with a NaN or an infinity is skipped; after so many in a row the run stops


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """Says what a run does about a loss spike or another anomaly that it detects (recipes.common.anomalies).

    Every anomaly is logged, and recorded in a black box.
    """

    # "log": no more than that. "skip": a step with an abnormal gradient norm updates no weight. "rewind": roll back to a
    # checkpoint before the anomaly began, and skip the sequences that were read when it did
    action: str = "log"
    max_rewinds: int = 3  # rewinds in a row that do not get past the step that went wrong; then the run stops
    lr_factor: float = 1.0  # after a rewind, multiply the learning rate by this ...
    lr_steps: int = 0  # ... for so many steps


@dataclass(frozen=True, kw_only=True)
class Router:
    """What trains the routers of a mixture of experts beside the model's loss (recipes.common.parallel.router_losses)."""

    # The loss that balances the experts. "micro_batch": transformers' own, of each micro batch. "global_batch": the same of all
    # the sequences of a step, however they are spread (arXiv 2501.11873). "sequence": DeepSeek-V3's, of each sequence in each
    # layer (arXiv 2412.19437, equations 17 to 20). None: none
    loss: str | None = "micro_batch"
    coefficient: float | None = None  # its weight. None: the model's own (router_aux_loss_coef), 0 where the family has no loss
    # "global_batch" with accumulation: True counts the tokens of all micro batches in a forward pass of their own, before the
    # step. False counts those of the step so far, which costs nothing, and then the layout changes the loss a little
    count_ahead: bool = True
    z_loss: float = 0.0  # weight of each router's mean of (log Z)^2 (arXiv 2202.08906, equation 5), summed over the layers
    # After each step, the bias that a router adds to its scores moves by this much against the deviation of each expert's load
    # (DeepSeek-V3's balancing without a loss, arXiv 2408.15664; 0.001 there); 0: it stays
    bias_rate: float = 0.0
    fp32: bool = False  # compute routers in fp32 where the model's precision is lower; some families always do


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one training run needs to know, but for the machines it runs on."""

    name: str  # the file's own
    model: PreTrainedConfig  # the transformers config of any decoder
    num_params: int  # what you expect: the model is counted before a run, which catches misspelt fields
    tokenizer: str  # a Hugging Face tokenizer folder; relative paths start at the repository root
    data: str | Blend  # a folder written by `tools.data prepare`, or several; relative paths start at the repository root
    layouts: dict[int, Layout]  # number of GPUs -> layout
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule  # of the learning rate
    steps: int  # optimizer steps of the whole run
    deepspeed: str  # a file in ds_configs/, or a path: memory, communication and precision
    seed: int = 1234  # of initial weights, the order of the data, and dropout
    z_loss: float = 0.0  # weight of the mean of (log Z)^2 in the loss (arXiv 2204.02311, section 5)
    logits_chunk_tokens: int = 2048  # compute logits and loss for so many tokens at a time: less memory, not other numbers
    router: Router = field(default_factory=Router)  # of a mixture of experts; other models ignore it
    # transformers' attn_implementation; or "varlen": "sdpa" without masks of documents and windows, which take a sequence's
    # length squared: each document is taken by itself (recipes.common.model.varlen_attention). Equal but for rounding
    attention: str = "sdpa"
    # What computes norms, activations, rotation and the loss. "none": PyTorch's own operators, one after another. "compile": each
    # of these as one operator by torch.compile, with the sums of gradients beside them (recipes.common.model.fusion). Equal but
    # for rounding: in 16 bits what lies between them is no longer rounded
    kernels: str = "none"
    # In what the layers' linears multiply. None: the precision of the ds_config, as everything else. "fp8": values in e4m3 and
    # gradients in e5m2, each tensor with a scale of its own (recipes.common.model.fp8), around weights and sums of bf16
    precision: str | None = None
    mask_documents: bool = False  # keep attention inside each document of a packed sequence, and restart positions there
    # What a rerun must repeat. "order": what each step reads and draws. "rounding": also, in the same layout, every number but
    # for rounding. "bitwise": every bit, in the same layout on the same machines. "bitwise_stages": every bit, also with
    # other pipeline stages
    determinism: str = "order"
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    monitor: Monitor = field(default_factory=Monitor)
    reaction: Reaction = field(default_factory=Reaction)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that follow from a recipe, a layout and a number of GPUs."""

    world: int  # GPUs
    tensor: int
    pipeline: int
    data: int
    accumulation: int  # micro batches of one data rank in a step of the full batch
    tokens_per_step: int
    context: int = 1  # data ranks that share their sequences
    expert: int = 1  # data ranks that share experts

    @property
    def readers(self) -> int:
        """Return how many groups of data ranks read different sequences."""
        return self.data // self.context


def due(every_steps: int, step: int) -> bool:
    """Return whether what a recipe asks for every so many steps (0: never) falls on `step`."""
    return every_steps > 0 and step % every_steps == 0


def derive_sizes(recipe: Recipe, layout: Layout, world_size: int) -> Sizes:
    """Return the sizes of a recipe that `check_recipe` has accepted."""
    data = world_size // (layout.tensor * layout.pipeline)
    batch = recipe.batch
    return Sizes(
        world=world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=data,
        accumulation=batch.global_seqs // (batch.micro_seqs * (data // layout.context)),
        tokens_per_step=batch.global_seqs * batch.seq_len,
        context=layout.context,
        expert=layout.expert,
    )


def from_root(path: str) -> Path:
    """Return a path of a recipe, relative ones from the repository root, so that a run may start in any folder."""
    return ROOT / Path(path).expanduser()
