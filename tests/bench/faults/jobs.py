"""The fault bench's small recipe, and the supervised jobs that train it, with shortened waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from recipes.common.checkpoint import saver
from recipes.common.runtime import exits, stop_signal
from tests.support.forked_jobs import LAUNCHER, Prepare, start_job
from tests.support.supervised import recipe_copy
from tools.supervise import attempt

STEPS, EVERY = 16, 4
RESTARTS = 2  # in a row without a new checkpoint
_TINY = """
recipe = replace(
    recipe,
    model=LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False),
    num_params=13_392,
    batch=Batch(seq_len=16, micro_seqs=1, global_seqs=2),
    layouts={1: Layout(), 2: Layout(pipeline=2) if PIPELINED else Layout(), 4: Layout(tensor=2, pipeline=2)},
    optimizer=AdamW(lr=LR, weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=2, min_lr=4e-4),
    checkpoints=Checkpoints(every_steps=EVERY, keep_last=KEEP, last_save_minutes=0.05),
)
"""


def write_recipe(folder: Path, *, pipelined: bool, lr: float, every: int = EVERY, keep: int = 2) -> Path:
    """Write a recipe of 16 steps that saves every 4: a start is most of its cost. Returns the file."""
    values = {"PIPELINED": pipelined, "LR": lr, "EVERY": every, "KEEP": keep}
    text = _TINY
    for name, value in values.items():
        text = text.replace(name, repr(value))
    return recipe_copy(folder, steps=STEPS, every=every, extra=text)


def _shorten_waits() -> None:
    """Shorten the waits of this process and of those that it forks."""
    attempt.POLL_SECONDS, attempt.GRACE_SECONDS, attempt.STACKS_SECONDS, attempt.LAUNCHER_SECONDS = 0.05, 1.0, 0.5, 1.0
    exits._SETTLE_SECONDS = 0.2
    stop_signal.GRACE_SECONDS = 5.0
    saver._FIRST_WAIT_SECONDS = 0.2


def words_of(recipe: Path, ranks: int, run_dir: Path) -> list[str]:
    """Return the command line of tools/supervise, the same at every start."""
    limits = ["--hang-seconds", "12", "--long-phase-seconds", "40", "--stop-seconds", "10"]
    restarts = ["--backoff-seconds", "0.05", "--restarts", str(RESTARTS), "--continue", "--no-preflight"]
    return [*limits, *restarts, "--launcher", f"{LAUNCHER} {ranks}", str(recipe), "--out-dir", str(run_dir)]


def start_trial(recipe: Path, ranks: int, run_dir: Path, output: int, prepare: Prepare) -> int:
    """Fork a supervisor whose waits are short, and return its process. output: a descriptor for its stdout and stderr."""

    def shortened() -> None:
        _shorten_waits()
        prepare.supervisor()

    return start_job(words_of(recipe, ranks, run_dir), output, replace(prepare, supervisor=shortened)).pid
