"""Real ranks with real guards, connected to a supervisor; and strangers at its port."""

import os
import random
import socket
import struct
import subprocess
import sys
import time

import psutil

from recipes.common.recipe import ROOT
from recipes.common.runtime.authenticated_link import SECRET, AuthenticatedLink
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.supervise import rank_links
from tools.supervise.rank_links import RankEvent, RankLinks

RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from recipes.common.runtime.supervisor_link import SupervisorLink
link = SupervisorLink(3)
{work}
"""


def start_rank(links: RankLinks, work: str, secret: str | None = None) -> subprocess.Popen:
    program = RANK.format(root=str(ROOT), work=work)
    variables = {SUPERVISOR: f"127.0.0.1:{links.port}", SECRET: secret or links.secret}
    return subprocess.Popen([sys.executable, "-c", program], env=os.environ | variables, stderr=subprocess.PIPE, text=True)


def collect(links: RankLinks, kind: str, seconds: float = 20.0) -> RankEvent:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for found in links.poll(0.1):
            if found.kind == kind:
                return found
    raise AssertionError(f"no {kind} in {seconds} s")


def test_a_rank_reports_its_exit_and_stacks_and_dies_with_its_supervisor():
    links = RankLinks("127.0.0.1")
    ended = start_rank(links, "link.report_exit('training_error', 'loss is \\x1b[1mnan'); os._exit(3)")
    found = collect(links, "end")
    assert (found.rank, found.word, found.detail) == (3, "training_error", "loss is \\x1b[1mnan")  # as a terminal may get it
    assert ended.wait() == 3

    stuck = start_rank(links, "def stuck_here(): assert 'TRIFOLD_SECRET' not in os.environ; time.sleep(1000)\nstuck_here()")
    collect(links, "hello")
    (guard,) = psutil.Process(stuck.pid).children()
    assert not any(links.secret in word for word in [*guard.cmdline(), *psutil.Process(stuck.pid).cmdline()])
    time.sleep(0.5)  # into the sleep
    links.send("stacks")
    assert "in stuck_here" in collect(links, "stacks").detail
    links.close()
    assert stuck.wait(timeout=5) == -9


def test_who_is_connected_is_waited_for_before_it_has_said_which_rank_it_is():
    """A rank's report may come after its launcher has ended."""
    links = RankLinks("127.0.0.1")
    assert links.is_idle()
    with socket.create_connection(("127.0.0.1", links.port)):
        assert links.poll(5.0) == [] and links.ranks() == {}
        assert not links.is_idle()
    links.poll(5.0)
    assert links.is_idle()
    links.close()


def test_a_stranger_at_the_supervisors_address_ends_no_rank():
    """It knows another secret, and says what it likes: the rank's guard leaves it and finds its own supervisor there later."""
    stranger = RankLinks("127.0.0.1", secret="x" * 32)
    rank = start_rank(stranger, "time.sleep(1000)", secret="s" * 32)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        assert stranger.poll(0.1) == []
        for each in stranger._connections.values():
            each.socket.send(b"die\n" * 8 + struct.pack(">I", 2**31))
    assert stranger.ranks() == {}
    stranger.close()
    assert rank.poll() is None
    links = RankLinks("127.0.0.1", stranger.port, secret="s" * 32)
    assert collect(links, "hello").rank == 3
    links.send("die")
    assert rank.wait(timeout=5) == -9
    links.close()


class Guard:
    """A guard of this test's own, to say what it likes after a true proof."""

    def __init__(self, links: RankLinks, rank: object) -> None:
        self.links, self.events = links, []
        self.link = AuthenticatedLink(links.secret, is_supervisor=False)
        self.socket = connect(links)
        while not self.link.is_proven:
            self.exchange()
        self.say({"rank": rank, "host": "here"})

    def exchange(self) -> None:
        self.events += self.links.poll(0.01)
        try:
            data = self.socket.recv(64)
            self.socket.sendall(self.link.receive(data)[1])
        except BlockingIOError:
            pass

    def say(self, message: dict) -> None:
        self.socket.sendall(self.link.pack(message))
        for _ in range(3):
            self.events += self.links.poll(0.01)

    def is_dropped(self) -> bool:
        return ended(self.socket)


def connect(links: RankLinks) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", links.port))
    connection.setblocking(False)
    return connection


def ended(connection: socket.socket) -> bool:
    """Whether the other side closed it, whatever it sent before."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def test_what_strangers_send_touches_their_own_connection_only():
    draw = random.Random(1)
    links = RankLinks("127.0.0.1")
    true = Guard(links, 7)
    kinds = [b"[" * 100_000 + b"\n", b"\xff\xfe\0GET / HTTP/1.1\r\n\r\n", b'{"end": "user_error"}\n', b"5\n", b"\0" * 64]
    kinds += [
        b'{"hello": "x", "rank": 0, "host": "h"}\n',
        struct.pack(">I", 2**32 - 1),
        b"",
        *(draw.randbytes(n) for n in (1, 63, 64, 5000)),
    ]
    strangers = []
    for data in kinds:
        stranger = connect(links)
        stranger.send(data)
        strangers.append((data, stranger))
    events = [event for _ in range(60) for event in links.poll(0.005)]
    for data, stranger in strangers:
        assert ended(stranger) == (len(data) >= 64), data[:30]  # a shorter one waits for the rest of a proof, for PROOF_SECONDS
    assert events == []
    assert links.ranks() == {7: "here"}
    true.say({"end": "finished\n"})
    assert [(event.kind, event.rank, event.word) for event in true.events] == [("hello", 7, ""), ("end", 7, "finished")]
    links.close()


def test_a_proven_guard_that_talks_nonsense_is_lost_and_no_other():
    links = RankLinks("127.0.0.1")
    true = Guard(links, 0)
    for rank in (0, -1, True, 2**40, "1", None, [1]):  # rank 0 is connected already
        assert Guard(links, rank).is_dropped(), rank
    for number, message in enumerate([{"end": 5}, {"stacks": ["a"]}, {"state": {}}, {"end": None}], start=1):
        odd = Guard(links, number)
        odd.say(message)
        assert odd.is_dropped(), message
        assert [event.kind for event in odd.events if event.rank == number] == ["hello", "lost"]
    replayed = Guard(links, 9)
    frame = replayed.link.pack({"state": "S"})
    replayed.socket.sendall(frame + frame)
    lost = [event for _ in range(5) for event in links.poll(0.01) if event.kind == "lost"]
    assert "a message was changed, repeated or left out" in lost[0].detail
    assert links.ranks() == {0: "here"}
    assert not true.is_dropped()
    links.close()


def test_connections_without_proof_are_bounded_in_number_and_time(monkeypatch):
    monkeypatch.setattr(rank_links, "MOST_UNPROVEN", 4)
    links = RankLinks("127.0.0.1")
    true = Guard(links, 1)
    held = [connect(links) for _ in range(10)]
    for _ in range(40):
        links.poll(0.005)
    assert [ended(each) for each in held] == [True] * 6 + [False] * 4
    late = Guard(links, 2)
    assert late.events[0].rank == 2  # the oldest makes way
    slow = held[-1]
    monkeypatch.setattr(rank_links, "PROOF_SECONDS", 0.3)
    for _ in range(8):  # a byte now and then is no sign of life
        if not ended(slow):
            slow.send(b"x")
        time.sleep(0.05)
        links.poll(0.01)
    assert all(ended(each) for each in held)
    assert set(links.ranks()) == {1, 2}
    assert not (true.is_dropped() or late.is_dropped())
    links.close()
