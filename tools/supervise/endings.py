"""Why an attempt ended, and what follows from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.supervise.rank_links import RankEvent

FINISHED, LEFT, USER_ERROR, NUMBERS = "finished", "left", "user_error", "training_error"
RANK_LOST, HOST_LOST, HANG, FAILED, LAUNCHER = "rank_lost", "host_lost", "hang", "rank_failed", "launcher_failed"
PREFLIGHT = "preflight_failed"

EXIT_CODES = {FINISHED: 0, USER_ERROR: 2, NUMBERS: 3, LEFT: 75}  # 75: sysexits' "try again later". All others end in 1
_RESTARTED = (RANK_LOST, HOST_LOST, HANG, FAILED, LAUNCHER, PREFLIGHT)


@dataclass(frozen=True)
class Ending:
    cause: str  # one of the names above
    detail: str
    hosts: tuple[str, ...] = ()  # those whose fault it may be


@dataclass(frozen=True)
class Restarts:
    """The rule. A restart that brought a new checkpoint starts the count and the wait anew."""

    limit: int = 5
    first_wait_seconds: float = 5.0
    longest_wait_seconds: float = 300.0

    def wait_seconds(self, in_a_row: int) -> float | None:
        """Before restart number `in_a_row` (from 1) without progress; None when enough is enough."""
        if in_a_row > self.limit:
            return None
        return min(self.first_wait_seconds * 2 ** (in_a_row - 1), self.longest_wait_seconds)


def is_restarted(cause: str) -> bool:
    return cause in _RESTARTED


def judge(events: Sequence[RankEvent], code: int | None, ranks_by_host: dict[str, set[int]]) -> Ending:
    """The ending that a launcher's exit code and the ranks' last words, in the order they came, tell.

    The first that fails is the cause; what others say after it is the consequence. code: None when it had to be killed.
    """
    ends = [event for event in events if event.kind in ("end", "lost", "silent")]
    said = {event.word: event for event in reversed(ends) if event.kind == "end"}  # the first of each word
    if "user_error" in said or (code == 2 and not ends):
        return Ending(USER_ERROR, "the recipe or its flags are wrong; the message is above")
    if "training_error" in said:
        return Ending(NUMBERS, said["training_error"].detail)
    failed = [e for e in ends if e.kind == "end" and e.word == "failed"]
    gone = [e for e in ends if e.kind in ("lost", "silent")]
    if gone and (not failed or gone[0].time <= failed[0].time):
        return _lost(gone, ranks_by_host)
    if failed:
        first = failed[0]
        return Ending(FAILED, f"rank {first.rank} on {first.host}: {first.detail}", (first.host,))
    if "peer_lost" in said:
        first = said["peer_lost"]
        return Ending(RANK_LOST, f"rank {first.rank} on {first.host} lost a peer: {first.detail}")
    if "left" in said:
        return Ending(LEFT, "asked to leave: saved, and left")
    if code == 0:
        return Ending(FINISHED, "the last step is reached")
    return Ending(LAUNCHER, f"the launcher ended with code {code} before any rank did; its output is above")


def _lost(gone: Sequence[RankEvent], ranks_by_host: dict[str, set[int]]) -> Ending:
    """One rank, or a whole host: all its ranks at about the same time, while there are others."""
    first = gone[0]
    together = {event.rank for event in gone if event.host == first.host and event.time - first.time < 2.0}
    whole = len(ranks_by_host) > 1 and together >= ranks_by_host.get(first.host, set()) and first.kind == "silent"
    if whole:
        return Ending(HOST_LOST, f"host {first.host} with ranks {sorted(together)}: {first.detail}", (first.host,))
    how = first.detail or "killed without a last word"
    return Ending(RANK_LOST, f"rank {first.rank} on {first.host}: {how}", (first.host,))
