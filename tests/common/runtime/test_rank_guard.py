"""The process beside a rank kills it when its supervisor is gone."""

import json
import os
import socket

from recipes.common.runtime import rank_guard


def test_a_rank_whose_supervisor_is_silent_is_killed(monkeypatch):
    monkeypatch.setattr(rank_guard, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(rank_guard, "SIGN_OF_LIFE_SECONDS", 0.1)
    killed = []
    monkeypatch.setattr(rank_guard, "_kill", lambda pid, rank, why: killed.append((pid, rank, why)))
    ours, theirs = socket.socketpair()
    stdin, stacks = os.pipe(), os.pipe()
    monkeypatch.setattr(rank_guard, "REPORT_FD", stdin[0])
    rank_guard.serve(ours, {"hello": "t"}, pid=77, rank=5, stacks=stacks[0])
    assert killed == [(77, 5, "no message from the supervisor in 0 s")]
    assert json.loads(theirs.recv(100).split(b"\n")[0]) == {"hello": "t"}
    for file in (*stdin, *stacks):
        os.close(file)
