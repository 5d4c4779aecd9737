"""Lists the causes that `explain` knows: name, meaning, and cure."""

from __future__ import annotations

from dataclasses import dataclass

LEARNING_RATE = "learning-rate bug"
BAD_DOCUMENT = "bad document"
BIT_FLIP = "bit flip in one rank's weights"
STALE_MOMENT = "stale second moment"
NORM_DRIFT = "replicas drift apart"
SAMPLER = "resume without sampler state"
FP16 = "fp16 underflow"
ATTENTION = "attention-logit growth"
LOST_MICRO_BATCH = "lost micro batch"
RAMP_EDGE = "batch-ramp edge"
CORRUPT_SHARD = "corrupt shard"
SLOW_RANK = "slow rank"
NOTHING = "nothing is wrong"


@dataclass(frozen=True)
class Cause:
    """A possible cause of an event."""

    name: str
    prior: float  # log odds before any evidence: how often reports of large runs name it
    means: str
    cure: str


CAUSES = (
    Cause(LEARNING_RATE, 0.0, "the optimizer used another rate than the recipe says", "fix the schedule, rewind to before it"),
    Cause(BAD_DOCUMENT, 0.5, "a few sequences of the step do not belong", "`plan-rewind` skips them; drop the document"),
    Cause(BIT_FLIP, -0.5, "weights changed in memory, outside the optimizer", "`replay` the step; test the machine; rewind"),
    Cause(STALE_MOMENT, 0.0, "Adam's v does not match these gradients", "rewind; a lower beta2; check what a resume restored"),
    Cause(
        NORM_DRIFT, -0.5, "copies of a weight that must be equal differ", "find the rank that skips a reduction; rewind to before"
    ),
    Cause(SAMPLER, 0.0, "a resume read sequences that were read before", "resume again from the checkpoint before it"),
    Cause(
        FP16, 0.0, "gradients are too small for fp16 at this loss scale", "bf16; or a higher min_loss_scale and fewer overflows"
    ),
    Cause(ATTENTION, 0.0, "queries and keys grew until attention saturates", "QK norm, a lower rate, z-loss; rewind"),
    Cause(LOST_MICRO_BATCH, -0.5, "a micro batch added nothing to the step", "check the rank's reader and the accumulation"),
    Cause(RAMP_EDGE, 0.0, "the batch size changed at this step", "check the rate for the new batch and the accumulation"),
    Cause(CORRUPT_SHARD, -0.5, "a shard's bytes changed after preparation", "prepare it again; rewind to before"),
    Cause(SLOW_RANK, 0.0, "steps take longer and the numbers are the same", "find the slow machine; no rewind is needed"),
    Cause(NOTHING, 1.0, "nothing but the usual noise, or one hard batch", "nothing"),
)
NAMES = tuple(cause.name for cause in CAUSES)
