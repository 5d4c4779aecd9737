"""What a run does about trouble, as its recipe says: log it, leave the step out, or rewind and skip.

Every rank pushes the same numbers into the same detectors and comes to the same decision, so nothing is sent for it. A rewind
goes back to a checkpoint before the onset, in the same process, and leaves out the sequences that the suspect steps read. It is
what PaLM's team did by hand (arXiv 2204.02311, section 5.1). A run that rewinds equals, bitwise, one that is resumed from that
checkpoint with --resume-step and --skip.
"""

from __future__ import annotations

import json
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

from recipes.common.anomalies.detector import AnomalyDetector, Event
from recipes.common.anomalies.rewinds import (
    Rewind,
    append_history,
    checkpoint_before,
    describe_rewind,
    history_fields,
    lr_factor_at,
    sequences_of_steps,
    tries_at,
)
from recipes.common.checkpoint.files import step_folder
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.resume import resume
from recipes.common.checkpoint.saver import Saver
from recipes.common.config.lr_schedules import seqs_after
from recipes.common.data.batches import open_train
from recipes.common.data.order import kept_index
from recipes.common.engine.trainer import Trainer
from recipes.common.monitor.monitor import RunMonitor
from recipes.common.recipe import Reaction, Recipe, from_root
from recipes.common.run_dir.black_box import BlackBox
from recipes.common.run_dir.metrics import METRICS, NON_FINITE, RunLog, plain
from recipes.common.runtime.exits import TrainingError

MEMORY_STEPS = 4096  # what the detectors are told again after a resume or a rewind
MAX_SKIPS_IN_A_ROW = 8
_BYTES_A_RECORD = 2048  # more than a line of metrics.jsonl has

# slow steps, a bump after a resume and a rise over thousands of steps are nothing that other sequences would cure
CURED_BY_REWIND = ("fast_recovery", "slow_recovery", "diverged", "precision")

Seen = Iterable[tuple[int, dict[str, float]]]  # (step, what the detectors look at)


class Recovery:
    """Watches one run and reacts. Every rank has an equal one; rank 0's also leaves black boxes and the history."""

    def __init__(
        self, recipe: Recipe, out_dir: Path, trainer: Trainer, saver: Saver, monitor: RunMonitor, log: RunLog | None
    ) -> None:
        self.history: tuple[Rewind, ...] = ()
        self._recipe, self._out_dir = recipe, out_dir
        self._trainer, self._saver, self._observer, self._log = trainer, saver, monitor, log
        self._box = None if log is None else BlackBox(out_dir, self._locate, log.note)
        self._skips: tuple[tuple[int, int], ...] = ()
        self._seen: deque[tuple[int, dict[str, float]]] = deque(maxlen=MEMORY_STEPS)
        self._news: list[Event] = []
        self._skipped_in_a_row = 0
        self._open: dict[int, Event] = {}  # by onset: events that go on
        self._watch, self._clock = AnomalyDetector(), AnomalyDetector()

    def start(self, position: RunPosition, history: tuple[Rewind, ...], *, resumed: bool) -> None:
        """At a start of the process. Collective: rank 0 reads what the detectors had seen before, for all."""
        self.history, self._skips = history, position.skips
        if resumed:
            seen = [read_seen(self._out_dir, position.step) if self._log is not None else []]
            if dist.get_world_size() > 1:
                dist.broadcast_object_list(seen, src=0, device=self._trainer.grid.device)
            self._seen.extend(seen[0])
            self._watch_from(position.step)

    def lr_factor(self, step: int) -> float:
        return lr_factor_at(self.history, step)

    def norm_ceiling(self) -> float:
        """A step with a higher gradient norm is left out. Not for ever: a norm that stays up is the new curve."""
        if self._recipe.reaction.action != "skip" or self._skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
            return math.inf
        return self._watch.norm_limit()

    def observe(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """After every step: show it to the detectors. Gives what they and the history have to say in the step's record."""
        step = int(record["step"])
        values = watched(record)
        self._seen.append((step, values))
        self._news = self._watch.push(step, values)
        for event in self._news:
            if event.end_step is None:
                self._open[event.onset_step] = event
            else:
                self._open.pop(event.onset_step, None)
        if self._log is not None:  # rank 0's clock is its own: nothing is decided by it
            timed = self._clock.push(step, {"loss": values["loss"], "seconds": record["seconds"]})
            self._news += [event for event in timed if event.kind == "hardware_suspect"]
        fields = history_fields(self.history, step)
        if self._news:
            fields["event"] = ", ".join(dict.fromkeys(event.kind for event in self._news))
        if self._box is not None:
            self._box.remember({**record, **fields})
        return fields

    def decide(self, position: RunPosition, hopeless: tuple[int, str] | None, *, skipped: bool) -> RunPosition | None:
        """What to do after this step. None: go on; a position: the run is there again. Collective.

        hopeless: since which step going on is useless, if it is, and why. skipped: the step did not change the weights, so
        whatever it showed did no harm. Raises TrainingError where nothing is left to try.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        causes = [event for event in self._news if calls_for_rewind(self._recipe.reaction, event, self.history) and not skipped]
        cause = causes[0] if causes else None
        if hopeless is not None and cause is None:
            since, reason = hopeless
            onset = min([since, *(event.onset_step for event in self._open.values() if event.kind in CURED_BY_REWIND)])
            cause = Event(
                onset, position.step, None, math.nan, "diverged", True, "loss", position.step - onset, {"reason": reason}
            )
        plan, tried = None, ()
        if cause is not None and self._recipe.reaction.action == "rewind":
            tried = tries_at(self.history, cause.onset_step)
            plan = self._plan(cause, position, len(tried)) if len(tried) < self._recipe.reaction.max_rewinds else None
        self._leave_boxes(position, cause, plan, hopeless)
        if plan is not None:
            return self._go_back(plan)
        if hopeless is not None or tried:
            _wait_for_all()
            raise TrainingError(self._last_words(position.step, cause, tried, hopeless))
        return None

    @contextmanager
    def box_at_end(self, position: RunPosition) -> Iterator[None]:
        """Leave a black box where something else ends the run (copies of a parameter that differ, say)."""
        try:
            yield
        except TrainingError as error:
            step, self._news = position.step, []
            event = Event(step, step, None, math.nan, "hardware_suspect", True, "drift", 0, {"reason": str(error)})
            self._leave_boxes(position, event, None, (step, str(error)))
            _wait_for_all()
            raise

    def _plan(self, event: Event, position: RunPosition, tries: int) -> Rewind | None:
        """The next try; None where no checkpoint is from before the event."""
        self._saver.finish()  # the newest may still be on its way to the disk
        suspects = suspect_steps(event, position.step, tries)
        to_step = [checkpoint_before(self._out_dir, suspects[0], tries) if self._log is not None else None]
        if dist.get_world_size() > 1:  # a shared file system may show the ranks different moments
            dist.broadcast_object_list(to_step, src=0, device=self._trainer.grid.device)
        if to_step[0] is None:
            self._note(f"{event.kind} from step {event.onset_step}: no checkpoint is from before it, so the run cannot go back")
            return None
        reaction = self._recipe.reaction
        return Rewind(
            kind=event.kind,
            onset_step=event.onset_step,
            from_step=position.step,
            to_step=to_step[0],
            skipped=sequences_of_steps(self._recipe.batch, suspects, position.skips),
            lr_factor=reaction.lr_factor,
            lr_until_step=to_step[0] + reaction.lr_steps,
        )

    def _go_back(self, plan: Rewind) -> RunPosition:
        loaded = resume(self._out_dir, self._trainer, last_step=plan.to_step)
        # one that was damaged is passed over: the run may be further back than planned
        plan = replace(plan, to_step=loaded.step, lr_until_step=loaded.step + self._recipe.reaction.lr_steps)
        position = replace(loaded, skips=self._skips).skip((plan.skipped,))
        self._saver.last_saved = step_folder(self._out_dir, position.step)
        self.history, self._skips = (*self.history, plan), position.skips
        while self._seen and self._seen[-1][0] > position.step:
            self._seen.pop()
        self._watch_from(position.step)
        self._observer.rewind(position.step)
        if self._log is not None:
            append_history(self._out_dir, plan, position.skips)
            self._log.rewind(position.step)
            self._log.note(f"rewound: {describe_rewind(plan)}")
        return position

    def _watch_from(self, step: int) -> None:
        """Detectors as they were after `step`, told that a process went on from its checkpoint."""
        self._watch, self._news, self._open = AnomalyDetector(), [], {}
        for seen, values in self._seen:
            self._watch.push(seen, values)
        self._watch.resumed(step)

    def _leave_boxes(
        self, position: RunPosition, cause: Event | None, plan: Rewind | None, hopeless: tuple[int, str] | None
    ) -> None:
        if self._box is None:
            return
        for event in {id(event): event for event in [*self._news, cause] if event is not None}.values():
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
        """The sequences that a step read, and where they lie: number of the folder in the blend, position in it."""
        recipe = self._recipe
        consumed = np.arange(seqs_after(recipe.batch, step - 1), seqs_after(recipe.batch, step))
        index = kept_index(consumed, self._skips)
        source, place = open_train(recipe.data, from_root, recipe.batch.seq_len).locate(recipe.seed, index)
        return {"sequences": index.tolist(), "folder": source.tolist(), "position": place.tolist()}

    def _last_words(self, step: int, cause: Event, tried: tuple[Rewind, ...], hopeless: tuple[int, str] | None) -> str:
        what = f"step {step}: " + (hopeless[1] if hopeless else f"{cause.kind} from step {cause.onset_step}")
        tries = "".join(f"; tried: {describe_rewind(rewind)}" for rewind in tried)
        saved = self._saver.last_saved
        return what + tries + (f"; the last checkpoint is {saved}" if saved else "; no checkpoint was saved")

    def _note(self, text: str) -> None:
        if self._log is not None:
            self._log.note(text)


def _wait_for_all() -> None:
    """Before a run ends: rank 0 has written what it saw by then. The launcher kills all ranks when the first has left."""
    if dist.get_world_size() > 1:
        dist.barrier()


def calls_for_rewind(reaction: Reaction, event: Event, history: tuple[Rewind, ...]) -> bool:
    """What has ended needs no cure any more. A bump after a resume does where the run itself had gone back, and in vain."""
    in_vain = event.kind == "resume_artefact" and bool(tries_at(history, event.onset_step))
    curable = event.kind in CURED_BY_REWIND or in_vain
    return reaction.action == "rewind" and event.actionable and event.end_step is None and curable


def suspect_steps(event: Event, last_step: int = 0, tries: int = 0) -> tuple[int, int]:
    """(first, last) of the steps whose sequences may have caused `event`.

    The loss of a step is that of the weights before its update: what shows at the onset may be the update one step earlier.
    last_step: the newest, of an event that goes on: each step so far may belong to it. tries: rewinds that did not help; each
    doubles the stretch forward, as a bad document may be longer than what was read of it.
    """
    first, last = max(event.onset_step - 1, 1), max(event.peak_step, event.onset_step, last_step)
    return first, last + (last - first + 1) * (2**tries - 1)


def watched(record: Mapping[str, Any]) -> dict[str, float]:
    """What the detectors look at: numbers that are equal on every rank (a step's seconds are not)."""
    return {name: float(record[name]) for name in ("loss", "grad_norm", "loss_scale") if name in record}


def read_seen(out_dir: Path, step: int) -> list[tuple[int, dict[str, float]]]:
    """What the detectors saw in the last steps up to `step`, from the end of metrics.jsonl."""
    path = out_dir / METRICS
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - MEMORY_STEPS * _BYTES_A_RECORD, 0))
        lines = file.read().split(b"\n")[1 if file.tell() > MEMORY_STEPS * _BYTES_A_RECORD else 0 : -1]
    seen = []
    for line in lines:
        record = json.loads(line)
        record = {k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
        if "loss" in record and record["step"] <= step:
            seen.append((record["step"], watched(record)))
    return seen[-MEMORY_STEPS:]


def event_fields(event: Event) -> dict[str, Any]:
    """An event as JSON holds it: its kind is called "class", a number that is not finite is a text as in metrics.jsonl."""
    fields = {"class" if name == "kind" else name: plain(value) for name, value in vars(event).items()}
    return fields | {"evidence": {name: plain(value) for name, value in event.evidence.items()}}
