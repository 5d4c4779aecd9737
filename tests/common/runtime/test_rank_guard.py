"""The process beside a rank kills it when its supervisor is gone, or is no longer the one that proved itself."""

import contextlib
import os
import socket
import threading
import time

import pytest

from recipes.common.runtime import rank_guard
from recipes.common.runtime.authenticated_link import AuthenticatedLink, new_secret
from recipes.common.runtime.processes import KnownProcess


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no message from the supervisor in 0 s"),
        (
            b"\0\0\0\2{}" + bytes(32),
            "the connection to the supervisor was tampered with: a message was changed, repeated or left out",
        ),
    ],
    ids=["silent", "tampered with"],
)
def test_a_rank_whose_supervisor_is_gone_is_killed(monkeypatch, data, why):
    monkeypatch.setattr(rank_guard, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(rank_guard, "SIGN_OF_LIFE_SECONDS", 0.1)
    killed = []
    monkeypatch.setattr(rank_guard, "_kill", lambda process, rank, why: killed.append((process.pid, rank, why)))
    ours, theirs = socket.socketpair()
    stdin, stacks = os.pipe(), os.pipe()
    monkeypatch.setattr(rank_guard, "REPORT_FD", stdin[0])
    supervisor, guard = (AuthenticatedLink("s" * 32, is_supervisor=yes) for yes in (True, False))
    guard.receive(supervisor.receive(guard.receive(supervisor.greeting())[1])[1])
    theirs.send(data)
    rank_guard.serve(ours, guard, {"rank": 5}, KnownProcess(77, None, None), 5, stacks[0])
    assert killed == [(77, 5, why)]
    assert supervisor.receive(theirs.recv(100))[0][0] == {"rank": 5}
    for file in (*stdin, *stacks):
        os.close(file)


GREETING = AuthenticatedLink(new_secret(), is_supervisor=True).greeting()


BEGINNINGS = {
    "nothing": b"",
    "half a greeting": GREETING[:30],
    "greeting": GREETING,
    "orders": b"die\n" * 40,
    "no proof": GREETING + bytes(32),
    "noise": b"\xff" * 70_000,
}


@pytest.mark.parametrize("begins", BEGINNINGS.values(), ids=BEGINNINGS)  # a greeting is another each time
@pytest.mark.parametrize("goes_on", ["silent", "slow", "closed"])
def test_who_answers_without_the_secret_is_left_in_time(monkeypatch, begins, goes_on):
    """Whatever it sends, however slowly: the guard neither waits for ever nor raises nor believes it."""
    monkeypatch.setattr(rank_guard, "SILENCE_SECONDS", 0.2)
    guards, theirs = socket.socketpair()
    sender = threading.Thread(target=answer, args=(theirs, begins, goes_on), daemon=True)
    sender.start()
    assert not rank_guard._prove(guards, AuthenticatedLink("s" * 32, is_supervisor=False))
    guards.close()
    sender.join(10)
    theirs.close()
    assert not sender.is_alive()


def answer(connection: socket.socket, begins: bytes, goes_on: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(begins)
        for _ in range(200 if goes_on == "slow" else 0):
            connection.sendall(b"x")
            time.sleep(0.02)
        if goes_on == "closed":
            connection.shutdown(socket.SHUT_RDWR)
