"""Finds evidence in the data: the documents of the steps, the shards' bytes, the position in the order, the batch size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.common.data.order import kept_index
from recipes.common.data.shards import TokenStream, read_manifest
from recipes.common.run_dir.checkpoint_folders import newest_before
from tools.data.lookup import open_run
from tools.spikes.batch import document_end, sequence_losses
from tools.spikes.batch_stats import read_tokens
from tools.spikes.evidence.case import LOOK_BACK, STANDS_OUT, Case, expected, robust_z
from tools.spikes.evidence.causes import BAD_DOCUMENT, BIT_FLIP, CORRUPT_SHARD, LOST_MICRO_BATCH, NOTHING, RAMP_EDGE, SAMPLER
from tools.spikes.evidence.findings import Evidence, Finding, Unanswered

JUMP_SHARE = 0.03  # of the loss, at least
ODD, VERY_ODD = 8.0, 12.0  # robust z of a sequence's tokens against ordinary sequences
HASH_BYTES = 4 << 30  # shards of an event up to this size are hashed
MODEL_BYTES = 8 << 30  # models up to this size in fp32 score the batch
MANY_STEPS = 16  # before a step, to extrapolate its loss from
AFTER_RESUME = 64  # steps in which a resume can still be the cause


def documents(case: Case) -> Iterator[Evidence]:
    """Compare the tokens of the steps with those of other steps."""
    try:
        found = {step: case.odd_sequences(step) for step in case.near_onset()}
        reads = {step: case.read_at(step) for step in found}
    except (OSError, ValueError) as error:
        yield Unanswered(BAD_DOCUMENT, "what the step read", f"make the data readable on this machine ({error})")
        return
    odd = {step: {o.index for o in oddities if o.z > ODD} for step, oddities in found.items()}
    worst = max(found, key=lambda step: found[step][0].z)
    top = found[worst][0]
    if not any(odd.values()):
        yield Finding(BAD_DOCUMENT, -4.0, f"no sequence of the steps stands out (largest z {top.z:.1f})")
        yield Finding(CORRUPT_SHARD, -1.0, "no sequence of the steps stands out by its tokens")
        return
    count = sum(map(len, odd.values()))
    sequence = reads[worst].consumed + top.index
    text = f"{count} sequences stand out; sequence {sequence} of step {worst}: {top.what} (z {top.z:.0f})"
    few = count <= max(2, 0.25 * sum(read.seqs for read in reads.values()))
    # of hundreds of sequences one is always a little odd: if nothing else moved it takes a very odd one, or two
    strong = case.moved or top.z > VERY_ODD or len(odd[worst]) > 1
    yield Finding(BAD_DOCUMENT, (4.0 if few else 2.0) if strong else 1.0, text)
    yield Finding(CORRUPT_SHARD, 1.0 if few else 2.0, text)


def losses_under_the_checkpoint(case: Case) -> Iterator[Evidence]:
    """Score the batch with the model as it was before: if it is hard there, it is the batch; else the model changed."""
    checkpoint = newest_before(case.folder, case.onset)
    if checkpoint is None:
        yield Unanswered(BAD_DOCUMENT, "whether the batch is hard for the model before", "save a checkpoint before")
        return
    if 4 * case.recipe.num_params > MODEL_BYTES:
        command = f"python -m tools.spikes batch {case.folder} {case.onset}"
        yield Unanswered(BAD_DOCUMENT, "whether the batch is hard for the model before", command)
        return
    try:
        here = case.read_at(case.onset)
        mine = read_tokens(case.run, here.consumed + np.arange(here.seqs))
        others = read_tokens(case.run, here.consumed + here.seqs + np.arange(2 * here.seqs))
        losses = np.array(sequence_losses(checkpoint, np.concatenate([mine, others]), document_end(case.folder, case.run)))
    except (OSError, ValueError) as error:
        yield Unanswered(BAD_DOCUMENT, "whether the batch is hard for the model before", f"make the data readable ({error})")
        return
    mine_losses, other_losses = losses[: here.seqs], losses[here.seqs :]
    spread = float(np.std(other_losses))
    usual = float(np.mean(other_losses))
    worst = float(np.max(mine_losses) - usual) / max(spread, 1e-3)
    excess = float(np.mean(mine_losses)) - usual
    predicted, noise = expected(case.steps, case.columns["loss"], _index(case, case.onset))
    jump = _jump(case, predicted)
    # a jump exceeds the curve's noise, the scatter of a batch's mean, and what a detector would report
    high = jump > max(4 * noise, 4 * spread / math.sqrt(here.seqs), JUMP_SHARE * predicted)
    text = f"under {checkpoint.name} the batch of step {case.onset} is {excess:+.3f} nats from other batches, its worst sequence "
    text += f"{worst:.1f} spreads above them; the log is {jump:+.3f} from the steps before"
    if jump < -max(4 * noise, JUMP_SHARE * predicted):
        easy = excess < jump / 2
        yield Finding(LOST_MICRO_BATCH, -4.0 if easy else 1.0, text + (": an easy batch" if easy else ": not an easy batch"))
    if high and excess < jump / 3:
        yield Finding(BAD_DOCUMENT, -3.0, text)
        yield Finding(NOTHING, -2.0, f"{text}: the model, not the batch")
        yield from _passing_fault(case, jump)
    elif worst > 5 and (excess > jump / 3 or not high):
        yield Finding(BAD_DOCUMENT, 2.0, text)
    else:
        yield Finding(BAD_DOCUMENT, -0.5, text)


def _jump(case: Case, predicted: float) -> float:
    """Return how far the loss is off at the onset: from its extrapolation, or from the mean of the steps beside it if nearer.

    A curve that bends leaves its extrapolation, and stays beside its neighbours. They count where the loss is back at the next.
    """
    losses, index = case.columns["loss"], _index(case, case.onset)
    jump = float(losses[index]) - predicted
    if index == 0 or index + 1 == len(losses) or not _is_back(case, "loss", index):
        return jump
    return min(jump, float(losses[index] - (losses[index - 1] + losses[index + 1]) / 2), key=abs)


def _passing_fault(case: Case, jump: float) -> Iterator[Evidence]:
    """Judge an ordinary batch that was hard: if the next step is as before, the computation was wrong, not the weights."""
    index = _index(case, case.onset)
    if index + 1 >= len(case.steps) or not all(_is_back(case, name, index) for name in case.moved):
        yield Finding(BIT_FLIP, 0.5, "an ordinary batch became hard: something changed the weights or the computation")
        return
    yield Finding(BIT_FLIP, 1.5, "an ordinary batch was hard for one step, and the next was as before: a passing fault")
    ranks = case.layout["data"]
    if ranks > 1 and "loss_max" in case.columns:
        predicted, _ = expected(case.steps, case.columns["loss_max"], index)
        share = (case.at("loss_max", case.onset) - predicted) / (jump * ranks)
        if share > 0.7:
            yield Finding(BIT_FLIP, 2.5, f"all of it on data rank {case.at('loss_max_rank', case.onset):.0f}")


def shard_bytes(case: Case) -> Iterator[Evidence]:
    """Check the shards that the steps near the event read against the checksums of their preparation."""
    try:
        touched = sorted(_shards_of(case))
        size = sum(path.stat().st_size for path, _ in touched)
        if size > HASH_BYTES:
            folders = " ".join(sorted({str(path.parent) for path, _ in touched}))
            yield Unanswered(CORRUPT_SHARD, "whether the shards are as prepared", f"python -m tools.data check {folders}")
            return
        wrong = [path for path, checksum in touched if _sha256(path) != checksum]
    except (OSError, ValueError, KeyError) as error:
        yield Unanswered(CORRUPT_SHARD, "whether the shards are as prepared", f"make the data readable on this machine ({error})")
        return
    if wrong:
        yield Finding(CORRUPT_SHARD, 8.0, f"{', '.join(map(str, wrong[:3]))}: not as prepared (checksum)")
        yield Finding(BAD_DOCUMENT, -4.0, "a shard that was read is not as prepared: its documents are not to blame")
    else:
        text = f"the {len(touched)} shards that were read are as prepared (checksums)"
        yield Finding(CORRUPT_SHARD, -6.0, text)


def position_in_the_order(case: Case) -> Iterator[Evidence]:
    """Check after a resume that the count of sequences continues, and that the loss repeats no earlier steps."""
    resumes = [int(s["resumed_step"]) for s in case.starts if s["resumed_step"]]
    near = [r for r in resumes if r < case.step + 2 and case.onset - r <= AFTER_RESUME]
    if not near:
        yield Finding(SAMPLER, -9.0, "no resume shortly before")
        return
    resumed, records = near[-1], case.all_steps
    before, after = records.get(resumed), records.get(resumed + 1)
    if before is None or after is None:
        yield Unanswered(SAMPLER, "whether the order continued at the resume", "log the steps around it in metrics.jsonl")
        return
    here = int(after["consumed_seqs"]) - int(after["tokens"]) // case.recipe.batch.seq_len
    # in tokens: an accepted change of seq_len counts other sequences
    moved = after["consumed_tokens"] - after["tokens"] != before["consumed_tokens"] if "consumed_tokens" in after else None
    if here != before["consumed_seqs"] if moved is None else moved:
        text = f"step {resumed} ended at sequence {before['consumed_seqs']}, step {resumed + 1} after the resume began at {here}"
        yield Finding(SAMPLER, 9.0, text)
        return
    yield Finding(SAMPLER, -0.5, f"the count of sequences continues over the resume after step {resumed}")
    yield from _echo(case, resumed)


def _echo(case: Case, resumed: int) -> Iterator[Evidence]:
    """Compare the loss after a resume with earlier steps: batches read again repeat its wiggles, for some are harder."""
    records = case.all_steps
    later = [s for s in range(resumed + 1, resumed + AFTER_RESUME + 1) if s in records]
    earlier = [s for s in range(1, resumed + 1) if s in records]
    if len(later) < 12 or len(earlier) < 16:
        yield Unanswered(SAMPLER, "whether the same batches were read again", "a dozen steps after the resume, and before it")
        return
    wiggle_later, wiggle_earlier = _wiggles(records, later), _wiggles(records, earlier)
    length = min(len(wiggle_later), len(wiggle_earlier) - 4)
    scores = []
    for shift in range(len(wiggle_earlier) - length + 1):
        window = wiggle_earlier[shift : shift + length]
        scores.append((float(np.corrcoef(window, wiggle_later[:length])[0, 1]), earlier[shift]))
    best, first = max(scores)
    # correlations of unrelated wiggles scatter by 1 / sqrt(length); the largest over many shifts is about 3 times that
    limit = 3.5 / math.sqrt(length)
    text = f"the loss of the {length} steps after the resume follows that of step {first} on (correlation {best:.2f})"
    if best > max(limit, 0.5):
        yield Finding(SAMPLER, 7.0, f"{text}: the same batches again")
    else:
        yield Finding(SAMPLER, -3.0, f"the loss after the resume repeats no earlier stretch (best correlation {best:.2f})")


def _wiggles(records: dict, steps: list[int]) -> np.ndarray:
    """Return the loss without its trend: each step less the mean of its neighbours."""
    losses = np.array([float(records[s]["loss"]) for s in steps])
    kernel = np.array([0.25, 0.25, 0.0, 0.25, 0.25])
    padded = np.pad(losses, 2, mode="reflect")
    return np.clip(losses - np.convolve(padded, kernel, mode="valid"), -1, 1)


def micro_batches(case: Case) -> Iterator[Evidence]:
    """Check whether k in n of the loss is missing: a micro batch that adds nothing takes its share of the mean away."""
    near = case.near_onset()
    if len({case.at("tokens", int(s)) for s in case.steps if min(near) - LOOK_BACK <= s <= max(near)}) > 1:
        yield Finding(LOST_MICRO_BATCH, -1.0, "the batch size changed here, so no share of the loss can be computed")
        return
    if not any(_index(case, s) >= MANY_STEPS for s in near):
        yield Unanswered(LOST_MICRO_BATCH, "whether a share of the loss is missing", f"{MANY_STEPS} steps before the event")
        return
    known = [s for s in near if _index(case, s) >= MANY_STEPS]
    candidates = [m for s in known for n in (1, 6) if (m := _missing(case, s, n)).is_whole]  # for one step, or from there on
    if not candidates:
        yield Finding(LOST_MICRO_BATCH, -4.0, "the loss did not fall by the share of a whole number of micro batches")
        return
    found = max(candidates, key=lambda m: m.z)
    text = f"the loss from step {found.step} on ({found.length} steps) is {found.share:.3f} of that extrapolated from before: "
    text += f"{found.count:.2f} of {found.of} micro batches are missing"
    weight = (5.0 if found.z > 5.5 else 3.0) - (round(found.count) > 1) - (found.off > max(1.5 * found.error, 0.25))
    yield Finding(LOST_MICRO_BATCH, weight, text)
    if case.layout["data"] > 1 and "loss_max" in case.columns:
        z = robust_z(case.steps, case.columns["loss_max"], _index(case, found.step))
        text = f"the worst data rank's own loss was {z:+.1f} spreads from its curve at step {found.step}"
        yield Finding(LOST_MICRO_BATCH, 2.0 if z > -3 else -2.0, text + (": another rank lost it" if z > -3 else ""))


@dataclass(frozen=True)
class _Missing:
    """The share of the loss that is missing, in micro batches."""

    step: int
    length: int  # steps from there on, averaged
    share: float  # of the loss that was expected
    of: int  # micro batches of a step, over all ranks
    count: float  # micro batches that would explain the share
    error: float  # of count
    first_z: float  # of the first step alone: the loss is lower from there on

    @property
    def z(self) -> float:
        return self.count / self.error

    @property
    def off(self) -> float:
        """Return how far the count is from a whole number."""
        return abs(self.count - round(self.count))

    @property
    def is_whole(self) -> bool:
        near = self.off < max(2.5 * self.error, 0.25)
        return near and 1 <= round(self.count) < self.of and self.z > 4.5 and self.first_z > 2


def _missing(case: Case, step: int, length: int) -> _Missing:
    losses, index = case.columns["loss"], _index(case, step)
    predicted, noise = expected(case.steps, losses, index)
    stretch = losses[index : index + length]
    # a falling curve keeps falling, at the rate of the steps just before
    slope = float(np.median(losses[index - 6 : index]) - np.median(losses[index - 12 : index - 6])) / 6
    predicted += slope * (len(stretch) - 1) / 2
    count = round(case.at("tokens", step) / case.recipe.batch.seq_len / case.recipe.batch.micro_seqs)
    share, first_z = float(np.mean(stretch)) / predicted, (predicted - stretch[0]) / noise
    error = noise / predicted * count / math.sqrt(len(stretch))
    return _Missing(step, len(stretch), share, count, (1 - share) * count, error, first_z)


def batch_size(case: Case) -> Iterator[Evidence]:
    """Find an edge of the batch ramp."""
    if not case.recipe.batch.ramp:
        yield Finding(RAMP_EDGE, -9.0, "the recipe has no batch ramp")
        return
    near = [int(s) for s in case.steps if case.onset - 4 <= s <= max(case.step, case.onset + 1)]
    sizes = [case.at("tokens", s) for s in near]
    edges = [s for s, a, b in zip(near[1:], sizes[:-1], sizes[1:], strict=True) if a != b]
    if edges:
        seqs = [round(case.at("tokens", s) / case.recipe.batch.seq_len) for s in (edges[0] - 1, edges[0])]
        late = case.onset - edges[0]
        text = f"the batch went from {seqs[0]} to {seqs[1]} sequences at step {edges[0]}"
        yield Finding(RAMP_EDGE, 5.0 if -1 <= late <= 1 else 3.0, text)
    else:
        yield Finding(RAMP_EDGE, -6.0, "the batch had one size around the event")


def one_step_only(case: Case) -> Iterator[Evidence]:
    """Measure how far the step is off the curve."""
    if not case.moved:
        yield Finding(
            NOTHING, 1.5, f"neither loss nor gradient norm is {STANDS_OUT:.0f} spreads off the curve near step {case.step}"
        )
        return
    words = ", ".join(f"{name} (z {z:.0f})" for name, z in case.moved.items())
    index = _index(case, case.onset)
    follows = index + 1 < len(case.steps)
    back = follows and all(_is_back(case, name, index) for name in case.moved)
    far = max(abs(z) for z in case.moved.values())
    weight = -min((far - STANDS_OUT) / 3, 3.0) - (not back)  # a little off is common: curves have corners and batches tails
    yield Finding(NOTHING, weight, f"{words} off the curve at step {case.onset}" + (", back at the next" if back else ""))


def _index(case: Case, step: int) -> int:
    return int(np.flatnonzero(case.steps == step)[0])


def _is_back(case: Case, name: str, index: int) -> bool:
    values = case.columns[name]
    predicted, noise = expected(case.steps, values, index)
    return bool(abs(values[index + 1] - predicted) < 4 * noise)


def _shards_of(case: Case) -> set[tuple[Path, str]]:
    """Return (file, its checksum in dataset.json) of every shard that a step near the event read."""
    stream = open_run(case.run)
    streams: list[TokenStream] = stream.streams if hasattr(stream, "streams") else [stream]
    touched = set()
    for step in case.near_onset():
        read = case.read_at(step)
        index = kept_index(read.consumed + np.arange(read.seqs), case.run.skips)
        for source, position in zip(*(a.tolist() for a in stream.locate(case.run.seed, index)), strict=True):
            of = streams[source]
            ends = (position * of.seq_len, position * of.seq_len + of.seq_len)
            for shard in {int(np.searchsorted(of.starts, end, side="right")) - 1 for end in ends}:
                touched.add((source, shard))
    found = set()
    for source, shard in touched:
        of = streams[source]
        entry = read_manifest(of.folder)["splits"][of.split]["shards"][shard]
        found.add((of.folder / entry["file"], entry["checksums"][entry["file"]]))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
