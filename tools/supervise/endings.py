"""Why an attempt ended, and whether it is restarted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.supervise.rank_links import RankEvent

FINISHED, STOPPED, USER_ERROR, NUMBERS, UNSAVED = "finished", "stopped", "user_error", "training_error", "unsaved"
RANK_LOST, HOST_LOST, HANG, FAILED, LAUNCHER = "rank_lost", "host_lost", "hang", "rank_failed", "launcher_failed"
PREFLIGHT, DISK = "preflight_failed", "disk_error"

# 75: sysexits' "try again later". All others end in 1
EXIT_CODES = {FINISHED: 0, USER_ERROR: 2, DISK: 2, NUMBERS: 3, UNSAVED: 4, STOPPED: 75}
_RESTARTED = (RANK_LOST, HOST_LOST, HANG, FAILED, LAUNCHER, PREFLIGHT, DISK)
_SAME_HOST_SECONDS = 2.0  # a host that is lost takes its ranks within this time


@dataclass(frozen=True)
class Ending:
    cause: str  # one of the names above
    detail: str
    hosts: tuple[str, ...] = ()  # those that may be at fault


@dataclass(frozen=True)
class RestartPolicy:
    """How often to restart and how long to wait. A new checkpoint resets the count and the wait."""

    limit: int = 5
    first_wait_seconds: float = 5.0
    longest_wait_seconds: float = 300.0

    def wait_seconds(self, in_a_row: int) -> float | None:
        """Return the wait before restart `in_a_row` (from 1) without progress; None after the last allowed restart."""
        if in_a_row > self.limit:
            return None
        return min(self.first_wait_seconds * 2 ** (in_a_row - 1), self.longest_wait_seconds)


def is_restarted(cause: str) -> bool:
    return cause in _RESTARTED


def judge(events: Sequence[RankEvent], code: int | None, ranks_by_host: dict[str, set[int]]) -> Ending:
    """Return the ending that follows from the launcher's exit code and the ranks' exit reports, in order of arrival.

    The first failure is the cause; later ones are its consequences. code: None when the launcher had to be killed.
    """
    ends = [event for event in events if event.kind in ("end", "lost", "silent")]
    by_word = {event.word: event for event in reversed(ends) if event.kind == "end"}  # the first of each word
    if "user_error" in by_word or (code == 2 and not ends):
        return Ending(USER_ERROR, "the recipe or its flags are wrong; see the message above")
    if "disk_error" in by_word:
        return Ending(DISK, "a folder or a file cannot be used; see the message above")
    if "training_error" in by_word:
        return Ending(NUMBERS, by_word["training_error"].detail)
    if "unsaved" in by_word:  # every rank had trained to the end: who left first, and how, is no matter
        return Ending(UNSAVED, by_word["unsaved"].detail)
    failed = [event for event in ends if event.kind == "end" and event.word == "failed"]
    lost = [event for event in ends if event.kind in ("lost", "silent")]
    if lost and (not failed or ends.index(lost[0]) < ends.index(failed[0])):
        return _loss(lost, ranks_by_host)
    if failed:
        first = failed[0]
        return Ending(FAILED, f"rank {first.rank} on {first.host}: {first.detail}", (first.host,))
    if "peer_lost" in by_word:
        first = by_word["peer_lost"]
        return Ending(RANK_LOST, f"rank {first.rank} on {first.host} lost a peer: {first.detail}")
    if "stopped" in by_word:
        return Ending(STOPPED, "stopped on request, after saving")
    if code == 0 and "finished" in by_word:  # a launcher's word alone is none: it may have started nothing
        return Ending(FINISHED, "reached the last step, which is on disk")
    return Ending(LAUNCHER, f"the launcher exited with code {code} before any rank did; see its output above")


def _loss(lost: Sequence[RankEvent], ranks_by_host: dict[str, set[int]]) -> Ending:
    """Return the loss of a rank, or of a whole host: all its ranks silent at about the same time, while others exist."""
    first = lost[0]
    together = {e.rank for e in lost if e.host == first.host and e.time - first.time < _SAME_HOST_SECONDS}
    whole = len(ranks_by_host) > 1 and together >= ranks_by_host.get(first.host, set()) and first.kind == "silent"
    if whole:
        return Ending(HOST_LOST, f"host {first.host} with ranks {sorted(together)}: {first.detail}", (first.host,))
    how = first.detail or "killed without an exit report"
    return Ending(RANK_LOST, f"rank {first.rank} on {first.host}: {how}", (first.host,))
