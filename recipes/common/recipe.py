"""What a recipe says: frozen dataclasses, plain data, no behaviour beyond arithmetic on their own fields.

The recipe owns what changes what is learned, and the layout; `ds_configs/*.json` own memory and precision.
Data-parallel size and gradient accumulation are derived (`Sizes`), never typed. Nothing here checks anything:
`recipes.common.checks.recipe_checks` collects every problem at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOT = Path(__file__).resolve().parents[2]


class RecipeError(ValueError):
    """The user's mistakes in a recipe, a ds_config, the data or the flags: all of them in one message."""

    def __init__(self, title: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in problems))


RECOMPUTE = ("none", "selective", "full")  # recipes.common.model.recompute
PIPELINE_SCHEDULES = ("1f1b", "zero_bubble", "zero_bubble_v")  # recipes.common.pipeline.schedules


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one replica of the model is cut. Data parallelism fills the rest of the world."""

    tensor: int = 1  # ranks that share each layer's matrices (innermost: keep it inside a node)
    pipeline: int = 1  # stages, each a run of consecutive layers
    # activation checkpointing: "none"; "selective", a layer keeps its matrix products and attention and repeats the rest; "full"
    recompute: str = "none"
    recompute_every: int = 1  # recompute every k-th layer: 0, k, 2k, ...
    sequence_parallel: bool = False  # between attention and MLP, each tensor rank holds its part of the sequence alone
    # "1f1b"; "zero_bubble", weight gradients fill the bubble; "zero_bubble_v", each stage has two chunks of layers
    pipeline_schedule: str = "1f1b"
    # layers of each stage, or of each chunk where a stage has two, in the model's order; (): balanced by cost
    layers_per_stage: tuple[int, ...] = ()

    def recomputed_layers(self, depth: int) -> range:
        """Return the indices of the recomputed ones among `depth` layers."""
        return range(0, depth if self.recompute != "none" else 0, self.recompute_every)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of `seq_len` tokens. `global_seqs` is what one optimizer step sees, at any number of GPUs."""

    seq_len: int
    micro_seqs: int  # sequences in one forward pass of one data rank
    global_seqs: int
    # ((until_sequences, global_seqs), ...): while fewer sequences than `until_sequences` are consumed, use this batch
    ramp: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), kept off norms and biases (parameters of fewer than 2 dimensions)."""

    lr: float  # the peak; the schedule scales it
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip: float = 1.0  # global gradient norm; 0 turns clipping off


@dataclass(frozen=True, kw_only=True)
class SGD:
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_embeddings: bool = True
    clip: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then the peak. Give every length of a schedule in steps, or every length in tokens."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up, then a line down to `min_lr` at the end of the run (or after `decay_*` counted from step 0)."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    decay_steps: int | None = None
    decay_tokens: int | None = None
    min_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine to `min_lr` at the end of the run (or after `decay_*` counted from step 0)."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    decay_steps: int | None = None
    decay_tokens: int | None = None
    min_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): the peak is held until the last `cooldown_*` of the run."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    cooldown_steps: int | None = None
    cooldown_tokens: int | None = None
    shape: str = "1-sqrt"  # "linear", "cosine" or "1-sqrt" (arXiv 2405.18392)
    min_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Linear warm-up, then lr * sqrt(warm-up / now) (arXiv 1706.03762), never under `min_lr`."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    min_lr: float = 0.0


Optimizer = AdamW | SGD
Schedule = Constant | Linear | Cosine | WSD | InverseSqrt


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Several prepared folders read as one. Weights are shares of the tokens read; they need not sum to one."""

    weights: dict[str, float]  # folder, as in Recipe.data -> weight
    changes: tuple[tuple[int, dict[str, float]], ...] = ()  # ((after_tokens, weights), ...), each replacing the last


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss on the held-out split of every folder: before the first step, every `every_steps`, and at the end."""

    every_steps: int = 0  # 0: never
    seqs: int = 256  # sequences from the start of each validation split


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save and what to keep. The last step is always saved."""

    every_steps: int = 0  # 0: not by steps
    every_minutes: float = 0.0  # 0: not by time
    keep_last: int = 3
    keep_every_steps: int = 0  # checkpoints at multiples of this are never deleted


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What is measured while training: statistics go to `tensor_stats/` and the step line (recipes.common.monitor)."""

    every_steps: int = 1  # norms of gradients, weights and updates, by parameter; 0: never
    activations_every_steps: int = 10  # outputs, attention logits and router load, by layer; 0: never
    drift_every_steps: int = 100  # whether copies of one parameter are still equal on all ranks; 0: never
    on_drift: str = "stop"  # or "log"
    max_nonfinite_steps: int = 3  # a step with a NaN or an infinity is skipped; after so many in a row the run stops


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """What a run does about an actionable event (recipes.common.anomalies). Every event leaves a black box."""

    # "log"; "skip": a step whose gradient norm is off its curve changes no weight; "rewind": back to a checkpoint before the
    # onset, the suspect sequences left out
    action: str = "log"
    max_rewinds: int = 3  # in a row, without getting past the step that went wrong; then the run stops
    lr_factor: float = 1.0  # after a rewind the learning rate is multiplied by this ...
    lr_steps: int = 0  # ... for so many steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    model: PreTrainedConfig  # any transformers config of a decoder
    num_params: int  # stated, and checked on the meta device: it catches every misspelt model field
    tokenizer: str  # a Hugging Face tokenizer folder; relative paths start at the repository root
    data: str | Blend  # folders written by tools.data prepare; relative paths start at the repository root
    layouts: dict[int, Layout]  # GPUs -> layout
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    steps: int
    deepspeed: str  # a file in ds_configs/, or a path
    seed: int = 1234
    z_loss: float = 0.0  # weight of mean(log Z ** 2) (arXiv 2204.02311, section 5)
    logits_chunk_tokens: int = 2048  # head and loss are computed this many tokens at a time
    attention: str = "sdpa"  # transformers' attn_implementation
    mask_documents: bool = False  # in packed sequences, attention stays inside each document and positions restart
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    monitor: Monitor = field(default_factory=Monitor)
    reaction: Reaction = field(default_factory=Reaction)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that follow from a recipe, a layout and a world size."""

    world: int
    tensor: int
    pipeline: int
    data: int
    accumulation: int  # micro batches a data rank runs each step, at the full batch
    tokens_per_step: int


def due(every_steps: int, step: int) -> bool:
    """Whether what a recipe asks for every so many steps (0: never) falls on `step`."""
    return every_steps > 0 and step % every_steps == 0


def derive_sizes(recipe: Recipe, layout: Layout, world_size: int) -> Sizes:
    """Sizes of a recipe that `check` has accepted."""
    data = world_size // (layout.tensor * layout.pipeline)
    batch = recipe.batch
    return Sizes(
        world=world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=data,
        accumulation=batch.global_seqs // (batch.micro_seqs * data),
        tokens_per_step=batch.global_seqs * batch.seq_len,
    )


def from_root(path: str) -> Path:
    """A recipe's path: absolute as it is, relative from the repository root, so that a run may start in any folder."""
    return ROOT / Path(path).expanduser()
