"""Automatic recovery, as the recipe says: log an anomaly, skip the step, or rewind.

Every rank pushes the same numbers into the same detectors and comes to the same decision, so nothing is sent for it. A rewind
returns to a checkpoint before the onset, in the same process, and skips the sequences that the suspect steps read. It is
what PaLM's team did by hand (arXiv 2204.02311, section 5.1). A run that rewinds equals, bitwise, one that is resumed from that
checkpoint with --resume-step and --skip.

After each step there is a cause or not: the first new event that a rewind may cure (`calls_for_rewind`), or else whatever makes
the run useless (`hopeless`: not finite for too long, or overflow after overflow).

    cause       action of the recipe   earlier tries at its step   checkpoint before it   decision
    none        any                                                                       continue
    an event    rewind                 fewer than max_rewinds      yes                    rewind
    an event    rewind                 none                        no                     note it, continue
    an event    rewind                 max_rewinds, or some        any, or no             stop
    hopeless    rewind                 fewer than max_rewinds      yes                    rewind
    hopeless    otherwise                                                                 stop
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from recipes.common.anomalies.detector import AnomalyDetector
from recipes.common.anomalies.events import KINDS, Event
from recipes.common.anomalies.rewinds import (
    Rewind,
    append_history,
    calls_for_rewind,
    checkpoint_before,
    describe_rewind,
    history_fields,
    indices_of,
    lr_factor_at,
    lr_factors,
    suspect_steps,
    tries_at,
)
from recipes.common.anomalies.step_time import StepTime
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.resume import resume
from recipes.common.checkpoint.saver import Saver
from recipes.common.config.lr_schedules import seqs_after
from recipes.common.data.batches import open_train
from recipes.common.data.order import kept_index
from recipes.common.engine.trainer import Trainer
from recipes.common.monitor.monitor import RunMonitor
from recipes.common.parallel.json_messages import broadcast_json
from recipes.common.recipe import Recipe
from recipes.common.record.recording import record_rewind
from recipes.common.run_dir.black_box import BlackBox
from recipes.common.run_dir.checkpoint_folders import step_folder
from recipes.common.run_dir.metrics import METRICS, NON_FINITE, parse_record, plain
from recipes.common.run_dir.run_log import RunLog
from recipes.common.runtime.exits import TrainingError

MEMORY_STEPS = 4096  # replayed to the detectors after a resume or a rewind
MAX_SKIPS_IN_A_ROW = 8
_BYTES_PER_RECORD = 2048  # more than a line of metrics.jsonl has

Hopeless = tuple[int, str]  # since which step the run is useless, and why


class Recovery:
    """Detects anomalies in one run and reacts. Every rank has an equal one; rank 0's also writes black boxes and the history."""

    def __init__(
        self, recipe: Recipe, out_dir: Path, trainer: Trainer, saver: Saver, monitor: RunMonitor, log: RunLog | None
    ) -> None:
        self.history: tuple[Rewind, ...] = ()
        self._recipe, self._out_dir = recipe, out_dir
        self._trainer, self._saver, self._monitor, self._log = trainer, saver, monitor, log
        self._box = None if log is None else BlackBox(out_dir, self._locate, log.note)
        self._start = RunPosition()
        self._skips: tuple[tuple[int, int], ...] = ()
        # step, what the detectors were given, and the sequences consumed after it
        self._recent: deque[tuple[int, dict[str, float], int]] = deque(maxlen=MEMORY_STEPS)
        self._new: list[Event] = []  # of the newest step
        self._open: dict[int, Event] = {}  # by number: events that have not ended
        self._skipped_in_a_row = 0
        self._told: set[str] = set()  # failures of detectors
        self._detector = AnomalyDetector()
        self._step_time = AnomalyDetector((StepTime,))

    def start(self, position: RunPosition, history: tuple[Rewind, ...], *, resumed: bool) -> None:
        """Call at a start of the process. Collective: rank 0 reads what the detectors were given before, for all."""
        self.history, self._start, self._skips = history, position, position.skips
        if resumed:
            recent = read_recent(self._out_dir, position.step) if self._log is not None else []
            self._recent.extend(
                (step, values, consumed) for step, values, consumed in broadcast_json(recent, self._trainer.grid.device)
            )
            self._restart_detector(position.step)

    def lr_factor(self, step: int) -> float:
        return lr_factor_at(self.history, step)

    def norm_ceiling(self) -> float:
        """Return the gradient norm above which a step is skipped. Not for ever: a norm that stays up is the new curve."""
        if self._recipe.reaction.action != "skip" or self._skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
            return math.inf
        return self._detector.norm_limit()

    def observe(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Push a step into the detectors. Return the fields that they and the history add to its record."""
        step = int(record["step"])
        values = detector_values(record)
        self._recent.append((step, values, int(record.get("consumed_seqs", 0))))
        self._new = self._detector.push(step, values)
        for event in self._new:
            if event.end_step is None:
                self._open[event.number] = event
            else:
                self._open.pop(event.number, None)
        if self._log is not None:  # rank 0's clock is its own: nothing is decided by it
            self._new += self._step_time.push(step, record)
            self._say_failures()
        fields = history_fields(self.history, step)
        if self._new:
            fields["event"] = ", ".join(dict.fromkeys(event.kind for event in self._new))
        if self._box is not None:
            self._box.remember({**record, **fields})
        return fields

    def decide(self, position: RunPosition, hopeless: Hopeless | None, *, skipped: bool) -> RunPosition | None:
        """Decide what follows this step. None: continue; a position: the run has been rewound to it. Collective.

        skipped: the step did not change the weights, so whatever it showed did no harm. Raises TrainingError where nothing is
        left to try.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        reaction = self._recipe.reaction
        cause = self._cause(hopeless, position.step, skipped=skipped)
        tried, plan = (), None
        if cause is not None and reaction.action == "rewind":
            tried = tries_at(self.history, cause.onset_step)
            if len(tried) < reaction.max_rewinds:
                plan = self._plan(cause, position, len(tried))
        self._write_boxes(position, cause, plan, hopeless)
        if plan is not None:
            return self._rewind(plan)
        if hopeless is not None or tried:
            _wait_for_all()
            raise TrainingError(self._stop_message(position.step, cause, tried, hopeless))
        return None

    @contextmanager
    def box_at_end(self, position: RunPosition) -> Iterator[None]:
        """Write a black box where something else ends the run (copies of a parameter that differ, say)."""
        try:
            yield
        except TrainingError as error:
            step, self._new = position.step, []
            event = Event(step, step, None, math.nan, "hardware_suspect", True, "drift", 0, {"reason": str(error)})
            self._write_boxes(position, event, None, (step, str(error)))
            _wait_for_all()
            raise

    def _cause(self, hopeless: Hopeless | None, step: int, *, skipped: bool) -> Event | None:
        for event in self._new:
            if not skipped and calls_for_rewind(self._recipe.reaction, event, self.history):
                return event
        return None if hopeless is None else event_of_hopeless(hopeless, step, self._open.values())

    def _plan(self, event: Event, position: RunPosition, tries: int) -> Rewind | None:
        """Return the next try; None where no checkpoint is from before the event."""
        self._saver.finish()  # the newest may still be on its way to the disk
        suspects = suspect_steps(event, position.step, tries)
        since = position.order.since_step
        to_step = checkpoint_before(self._out_dir, suspects[0], tries, since) if self._log is not None else None
        # a shared file system may show the ranks different moments
        to_step = broadcast_json(to_step, self._trainer.grid.device)
        if to_step is None:
            self._note(f"{event.kind} from step {event.onset_step}: cannot rewind, no checkpoint is from before it")
            return None
        reaction = self._recipe.reaction
        return Rewind(
            kind=event.kind,
            onset_step=event.onset_step,
            from_step=position.step,
            to_step=to_step,
            skipped=indices_of((self._consumed_after(suspects[0] - 1), self._consumed_after(suspects[1])), position.skips),
            lr_factor=reaction.lr_factor,
            lr_until_step=to_step + reaction.lr_steps,
        )

    def _rewind(self, plan: Rewind) -> RunPosition:
        loaded = resume(self._out_dir, self._trainer, self._recipe, last_step=plan.to_step)
        # a damaged one is passed over: the run may be further back than planned
        plan = replace(plan, to_step=loaded.step, lr_until_step=loaded.step + self._recipe.reaction.lr_steps)
        if loaded.order == self._start.order:
            position = replace(loaded, skips=self._skips).skip((plan.skipped,))
        else:  # from before the order of the data changed: its sequences have other numbers
            position = self._start = loaded
        self._saver.last_saved = step_folder(self._out_dir, position.step)
        self.history, self._skips = (*self.history, plan), position.skips
        while self._recent and self._recent[-1][0] > position.step:
            self._recent.pop()
        self._restart_detector(position.step)
        self._monitor.rewind(position.step)
        if self._log is not None:
            append_history(self._out_dir, plan, position.skips)
            for remark in record_rewind(self._out_dir, self._recipe, position.step, position.skips, lr_factors(self.history)):
                self._note(remark)
            self._log.rewind(position.step)
            self._log.note(f"rewound: {describe_rewind(plan)}")
        return position

    def _restart_detector(self, step: int) -> None:
        """Bring the detectors to where they were after `step`, and to a resume from its checkpoint."""
        self._detector, self._new, self._open = AnomalyDetector(), [], {}
        for past_step, values, _ in self._recent:
            self._detector.push(past_step, values)
        self._detector.resumed(step)

    def _write_boxes(self, position: RunPosition, cause: Event | None, plan: Rewind | None, hopeless: Hopeless | None) -> None:
        if self._box is None:
            return
        for event in {id(event): event for event in [*self._new, cause] if event is not None}.values():
            content = {
                **event_fields(event),
                "written_step": position.step,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "position": asdict(position),
                "hopeless": hopeless and hopeless[1],
                "reaction": asdict(plan) if plan is not None and event is cause else None,
            }
            folder = self._box.write(event.kind, event.onset_step, position.step, content)
            if event.actionable and folder is not None:
                self._note(f"step {position.step}: {event.kind} from step {event.onset_step}; black box in {folder}")

    def _locate(self, step: int) -> dict[str, Any]:
        """Return the sequences that a step read, and where they lie: number of the folder in the blend, position in it."""
        recipe, order = self._recipe, self._start.order
        if step <= order.since_step > 0:
            return {"sequences": [], "folder": [], "position": []}  # read in another order
        index = kept_index(np.arange(self._consumed_after(step - 1), self._consumed_after(step)), self._skips)
        source, place = open_train(recipe.data, recipe.batch.seq_len, order).locate(recipe.seed, index)
        return {"sequences": index.tolist(), "folder": source.tolist(), "position": place.tolist()}

    def _consumed_after(self, step: int) -> int:
        """Return the sequences consumed up to and including `step`: as recorded, or by the recipe's batch."""
        start, batch = self._start, self._recipe.batch
        for known, _, consumed in reversed(self._recent):
            if start.order.since_step < known <= step and consumed:
                return seqs_after(batch, step - known, consumed)
        if step >= start.step:
            return seqs_after(batch, step - start.step, start.consumed_seqs)
        return max(start.consumed_seqs - seqs_after(batch, start.step) + seqs_after(batch, step), start.order.start_seqs)

    def _stop_message(self, step: int, cause: Event, tried: tuple[Rewind, ...], hopeless: Hopeless | None) -> str:
        what = f"step {step}: " + (hopeless[1] if hopeless else f"{cause.kind} from step {cause.onset_step}")
        tries = "".join(f"; tried: {describe_rewind(rewind)}" for rewind in tried)
        saved = self._saver.last_saved
        return what + tries + (f"; the last checkpoint is {saved}" if saved else "; no checkpoint was saved")

    def _say_failures(self) -> None:
        """Say once of each detector that raised that it is off; a rewind starts it again, with the same numbers before it."""
        for failure in [*self._detector.failures, *self._step_time.failures]:
            if failure not in self._told:
                self._told.add(failure)
                self._note(f"monitor: {failure}")

    def _note(self, text: str) -> None:
        if self._log is not None:
            self._log.note(text)


def _wait_for_all() -> None:
    """Wait, before a run ends, until rank 0 has written its boxes: the launcher kills all ranks when the first has left."""
    if dist.get_world_size() > 1:
        dist.barrier()


def event_of_hopeless(hopeless: Hopeless, step: int, open_events: Iterable[Event]) -> Event:
    """Return the divergence that makes a run useless at `step`. It began with the first open event that a rewind may cure."""
    since, reason = hopeless
    onset = min([since, *(event.onset_step for event in open_events if KINDS[event.kind].cured_by_rewind)])
    return Event(onset, step, None, math.nan, "diverged", True, "loss", step - onset, {"reason": reason})


def detector_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that the detectors decide by: those that are equal on every rank (a step's seconds are not)."""
    return {name: float(record[name]) for name in ("loss", "grad_norm", "loss_scale", "load_evenness") if name in record}


def read_recent(out_dir: Path, step: int) -> list[tuple[int, dict[str, float], int]]:
    """Read what the detectors were given in the last steps up to `step`, and the sequences consumed, from metrics.jsonl's end."""
    path = out_dir / METRICS
    if not path.is_file():
        return []
    tail_bytes = MEMORY_STEPS * _BYTES_PER_RECORD
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - tail_bytes, 0))
        lines = file.read().split(b"\n")[1 if file.tell() > tail_bytes else 0 : -1]
    recent = []
    for line in lines:
        try:
            record = parse_record(line)
        except ValueError:  # damaged, after this start had set such lines aside
            continue
        record = {k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
        if "loss" in record and record["step"] <= step:
            recent.append((record["step"], detector_values(record), int(record.get("consumed_seqs", 0))))
    return recent[-MEMORY_STEPS:]


def event_fields(event: Event) -> dict[str, Any]:
    """Return an event as JSON holds it: its kind is called "class", a number that is not finite is a text as in metrics.jsonl."""
    fields = {"class" if name == "kind" else name: plain(value) for name, value in vars(event).items() if name != "number"}
    return fields | {"evidence": {name: plain(value) for name, value in event.evidence.items()}}
