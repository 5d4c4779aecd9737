"""Makes planted runs: real small training runs in which one thing is broken on purpose, to score `explain` against the truth.

The training process or its input is broken (`planted_faults`), never what `explain` reads: a run directory and the data that the
recipe names. The rules of `explain` were written with the runs of TUNING at hand; HELD_OUT has other seeds, widths, batches,
strengths and steps, and is what counts.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from recipes.common.config.ds_config import load_ds_config, merge_ds_config
from recipes.common.recipe import AdamW, Batch, Checkpoints, Constant, Layout, Monitor, Recipe, derive_sizes
from recipes.common.runtime.exits import TrainingError
from recipes.common.train import start_run, train
from tests.bench.spikes import planted_faults as faults
from tests.bench.spikes.planted_data import VOCAB, bad_sequence, position_of, write_language
from tests.support.fp16 import allow_fp16
from tools.common.forked_ranks import run_ranks

HEALTHY = "nothing is wrong"
TOKENS = 90_000


@dataclass(frozen=True)
class Planted:
    """A run with a known cause, and where a user would point."""

    cause: str  # a name in tools.spikes.evidence.causes
    fault: str  # which way it is brought about
    at: int  # the first step whose numbers show it
    seed: int
    options: dict[str, Any] = field(default_factory=dict)  # of the fault
    pointed_at: int = 0  # steps after `at` that the user names
    steps: int = 72
    hidden: int = 48
    layers: int = 2
    seq_len: int = 32
    micro_seqs: int = 4
    global_seqs: int = 32
    ramp: tuple[tuple[int, int], ...] = ()
    layout: Layout = Layout()  # noqa: RUF009, it is frozen
    world_size: int = 2
    lr: float = 8e-3
    deepspeed: str = "zero1_fp32.json"
    resumed_at: int | None = None  # the run is stopped after this step and resumed

    @property
    def event_step(self) -> int:
        return self.at + self.pointed_at

    @property
    def label(self) -> str:
        words = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.cause}: {self.fault} {words} at {self.at}, seed {self.seed}, hidden {self.hidden}"


def make_run(planted: Planted, folder: Path) -> Path:
    """Train the run and return its directory. Forks: the caller must have run no tensor code."""
    data = folder / "data"
    data.mkdir(parents=True)
    run_dir = folder / "run"
    write_language(data, seed=planted.seed, tokens=TOKENS, patches=_bad_sequences(planted), seq_len=planted.seq_len)
    recipe = recipe_of(planted, data)
    first = planted.resumed_at or planted.steps
    run_ranks(_train, planted.world_size, planted, recipe, str(run_dir), str(data), False, first)
    if planted.resumed_at:
        run_ranks(_train, planted.world_size, planted, recipe, str(run_dir), str(data), True, planted.steps)
    return run_dir


def recipe_of(planted: Planted, data: Path) -> Recipe:
    model = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=planted.hidden,
        intermediate_size=2 * planted.hidden,
        num_hidden_layers=planted.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=planted.seq_len,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return Recipe(
        name="planted",
        model=model,
        num_params=0,
        tokenizer=str(data / "tokenizer"),
        data=str(data),
        layouts={planted.world_size: planted.layout},
        batch=Batch(seq_len=planted.seq_len, micro_seqs=planted.micro_seqs, global_seqs=planted.global_seqs, ramp=planted.ramp),
        optimizer=AdamW(lr=planted.lr, eps=1e-8),
        schedule=Constant(warmup_steps=8),
        steps=planted.steps,
        deepspeed=planted.deepspeed,
        seed=planted.seed,
        checkpoints=Checkpoints(every_steps=10, keep_last=20),
        monitor=Monitor(activations_every_steps=5, drift_every_steps=10),
    )


def _bad_sequences(planted: Planted) -> dict[int, np.ndarray]:
    """Return position -> ids of the bad document's sequences, which are among those that step `at` reads."""
    if planted.fault not in ("noise", "repeat", "rare"):
        return {}
    rng = np.random.default_rng(planted.seed)
    first = (planted.at - 1) * planted.global_seqs
    places = rng.choice(planted.global_seqs, planted.options["seqs"], replace=False)
    positions = [position_of(planted.seed, first + int(p), TOKENS, planted.seq_len) for p in places]
    return {position: bad_sequence(planted.fault, planted.seq_len, rng) for position in positions}


def _train(planted: Planted, recipe: Recipe, run_dir: str, data: str, resume: bool, steps: int) -> None:
    """Break what is to be broken, on every rank, then train as recipes.common.train does."""
    if planted.deepspeed == "zero1_fp16.json":
        allow_fp16()
    inject(planted, Path(data), resumed=resume)
    sizes = derive_sizes(recipe, planted.layout, planted.world_size)
    config = load_ds_config(recipe.deepspeed)
    if "fp16" in config and "initial_power" in planted.options:
        config["fp16"] |= {"initial_scale_power": planted.options["initial_power"]}
    config = merge_ds_config(config, recipe, sizes, sizes.accumulation)
    quiet = io.StringIO()
    with (
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
        contextlib.suppress(TrainingError),  # the run saw that it was hopeless and stopped, on every rank alike
    ):
        train(start_run(recipe, planted.layout, sizes, config, Path(run_dir), resume_run=resume, max_steps=steps))


def inject(planted: Planted, data: Path, *, resumed: bool) -> None:
    """Patch this process with the run's fault."""
    at, seed, options = planted.at, planted.seed, planted.options
    match planted.fault:
        case "schedule":
            faults.learning_rate_in_schedule(at, options["factor"], options["steps"])
        case "optimizer's rate":
            faults.learning_rate_in_optimizer(at, options["factor"], options["steps"])
        case "flip in master":
            faults.bit_flip_in_master(at, seed)
        case "flip in copy":
            faults.bit_flip_in_copy(at, seed)
        case "stale v":
            faults.stale_second_moment(at, options["factor"], options.get("part"))
        case "norm drift":
            faults.norm_drift(at, options["rate"])
        case "logit growth":
            faults.attention_growth(at, options["rate"], options["steps"])
        case "lost":
            faults.lost_micro_batch(at, options["steps"], options["rank"])
        case "accumulation":
            faults.accumulation_not_ramped()
        case "zeros" | "garbage":
            shards = sorted(data.glob("train_*.bin"))
            path = shards[options["shard"] % len(shards)]
            faults.corrupt_shard(at, path, planted.fault, options["share"], VOCAB)
        case "sampler" | "reader" if resumed:
            faults.resumed_without_sampler(options["reset_to"], logged=planted.fault == "sampler")
        case "loss scale":
            faults.loss_scale_collapse(at, options["power"])
        case "slow":
            faults.slow_rank(at, options["factor"], options["rank"])
