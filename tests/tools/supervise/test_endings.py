"""Which ending an attempt had, and whether and when it is restarted."""

import pytest

from tools.supervise.endings import RestartPolicy, is_restarted, judge
from tools.supervise.rank_links import RankEvent

HOSTS = {"a": {0, 1}, "b": {2, 3}}


def event(kind: str, rank: int, word: str = "", detail: str = "", at: float = 0.0) -> RankEvent:
    return RankEvent(kind, rank, "ab"[rank // 2], word, detail, at)


@pytest.mark.parametrize(
    ("events", "code", "cause", "detail", "hosts"),
    [
        ([event("end", r, "finished") for r in range(4)], 0, "finished", "reached the last step", ()),
        ([event("end", r, "stopped") for r in range(4)], 143, "stopped", "stopped on request", ()),
        ([event("end", 0, "user_error")], 2, "user_error", "see the message above", ()),
        ([], 2, "user_error", "see the message above", ()),
        ([event("end", 1, "disk_error"), event("lost", 0, at=1.0)], 2, "disk_error", "see the message above", ()),
        ([], 255, "launcher_failed", "the launcher exited with code 255", ()),
        ([event("end", 1, "training_error", "loss is nan"), event("lost", 0)], 3, "training_error", "loss is nan", ()),
        ([event("lost", 1), event("end", 0, "unsaved", "step 8 is not on disk", 1.0)], 4, "unsaved", "step 8 is not", ()),
        ([], 0, "launcher_failed", "the launcher exited with code 0 before any rank", ()),
        # the first that fails is the cause, and what the others say is not
        ([event("lost", 1), event("end", 0, "peer_lost", "reset", 1.0)], 247, "rank_lost", "rank 1 on a: killed", ("a",)),
        ([event("end", 2, "failed", "LookupError: x"), event("lost", 0, at=1.0)], 1, "rank_failed", "rank 2 on b: Look", ("b",)),
        ([event("lost", 3), event("end", 0, "failed", "RuntimeError", 2.0)], 1, "rank_lost", "rank 3 on b", ("b",)),
        ([event("end", 0, "peer_lost", "reset")], 1, "rank_lost", "rank 0 on a lost a peer: reset", ()),
        ([event("silent", 2, detail="no message"), event("silent", 3, at=0.1)], None, "host_lost", "b with ranks [2, 3]", ("b",)),
        ([event("silent", 2, detail="no message")], None, "rank_lost", "rank 2 on b: no message", ("b",)),
    ],
)  # fmt: skip
def test_the_first_that_fails_is_the_cause(events, code, cause, detail, hosts):
    ending = judge(events, code, HOSTS)
    assert (ending.cause, ending.hosts) == (cause, hosts)
    assert detail in ending.detail


def test_waits_double_up_to_a_bound_and_end():
    policy = RestartPolicy(limit=5, first_wait_seconds=5.0, longest_wait_seconds=30.0)
    assert [policy.wait_seconds(count) for count in range(1, 7)] == [5.0, 10.0, 20.0, 30.0, 30.0, None]
    assert RestartPolicy(limit=0).wait_seconds(1) is None
    assert not any(is_restarted(cause) for cause in ("finished", "stopped", "user_error", "training_error", "unsaved"))
    assert is_restarted("disk_error")
