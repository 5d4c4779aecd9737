"""The supervisor's end of the ranks' connections (recipes/common/runtime/rank_guard.py): which ranks are alive, how each ended.

TCP, so it needs no launcher's help: a guard whose connection breaks kills its rank, and a rank that sends nothing for
SILENCE_SECONDS counts as lost. Whoever else connects learns nothing, waits in a bounded place for a bounded time, and ends
nothing but its own connection.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.common.runtime.authenticated_link import AuthenticatedLink, LinkError, new_secret
from recipes.common.runtime.rank_guard import SIGN_OF_LIFE_SECONDS, SILENCE_SECONDS
from tools.common.console import printable

PROOF_SECONDS = 10.0  # from the first byte to the proof, however slowly the bytes come
MOST_UNPROVEN = 512  # connections; the oldest makes way, since a guard proves itself within milliseconds
MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class RankEvent:
    """One report from a rank. kind: "hello", "end", "lost" (ended without an exit report), "silent", "stacks", "state"."""

    kind: str
    rank: int
    host: str
    word: str = ""  # "end": one of recipes.common.runtime.supervisor_link's words; "state": the kernel's letter
    detail: str = ""
    time: float = 0.0  # monotonic, of this machine


@dataclass
class _Connection:
    """One guard's connection; `rank` is None until it has proven itself and said which it is."""

    socket: socket.socket
    link: AuthenticatedLink
    last_heard: float  # monotonic; until it has proven itself, when it came
    rank: int | None = None
    host: str = "?"


class RankLinks:
    """Listens for the ranks' guards, which know this machine's address, `port` and `secret` from their environment."""

    def __init__(self, address: str, port: int = 0, secret: str | None = None) -> None:
        """address: of the interface to listen on, "" for all. port: 0 for any free one. secret: None for a new one."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one file a rank: the usual 1024 are soon used up
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, backlog=4096)
        self._listener.setblocking(False)
        self.secret = secret or new_secret()
        self.port = self._listener.getsockname()[1]
        self._most_unproven = MOST_UNPROVEN if most == resource.RLIM_INFINITY else min(MOST_UNPROVEN, most // 4)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}  # in the order in which they came
        self._last_sign = self._last_poll = time.monotonic()

    def ranks(self) -> dict[int, str]:
        """Return rank -> host of the ranks that are connected now."""
        return {each.rank: each.host for each in self._connections.values() if each.rank is not None}

    def is_idle(self) -> bool:
        """Return whether nobody is connected, not even someone who has yet to say which rank it is."""
        return not self._connections

    def send(self, word: str) -> None:
        """Send "stop", "stacks" or "die" to every rank; "" is a sign of life."""
        for each in list(self._connections.values()):
            if each.link.is_proven:
                self._write(each, each.link.pack({"do": word} if word else {}))

    def poll(self, seconds: float) -> list[RankEvent]:
        """Wait up to `seconds` for events and return them."""
        events = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj in self._connections:  # not dropped in this round
                events += self._read(self._connections[key.fileobj])
        now = time.monotonic()
        if now - self._last_poll > SILENCE_SECONDS / 2:  # this machine slept, or this process was stopped: no rank was silent
            for each in self._connections.values():
                each.last_heard = now
        self._last_poll = now
        if now - self._last_sign > SIGN_OF_LIFE_SECONDS:
            self._last_sign = now
            self.send("")
        for each in list(self._connections.values()):
            if now - each.last_heard > (PROOF_SECONDS if each.rank is None else SILENCE_SECONDS):
                events += self._lose(each, "silent", f"no message for {SILENCE_SECONDS:.0f} s")
        return events

    def disconnect(self) -> None:
        """Close every connection: guards then kill their ranks at once."""
        for each in list(self._connections.values()):
            self._drop(each)

    def close(self) -> None:
        self.disconnect()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        unproven = [each for each in self._connections.values() if each.rank is None]
        if len(unproven) >= self._most_unproven:
            self._drop(unproven[0])
        try:
            accepted, _ = self._listener.accept()
        except OSError:  # it is gone again, or this process may open no more files
            if unproven:
                self._drop(unproven[0])
            else:
                time.sleep(0.01)
            return
        accepted.setblocking(False)
        connection = _Connection(accepted, AuthenticatedLink(self.secret, is_supervisor=True), time.monotonic())
        self._connections[accepted] = connection
        self._selector.register(accepted, selectors.EVENT_READ)
        self._write(connection, connection.link.greeting())

    def _read(self, connection: _Connection) -> list[RankEvent]:
        try:
            read = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            read = b""
        if not read:
            return self._lose(connection, "lost")
        events = []
        try:
            messages, reply = connection.link.receive(read)
            for message in messages:
                connection.last_heard = time.monotonic()
                events += self._parse(connection, message)
        except LinkError as error:
            return events + self._lose(connection, "lost", f"its connection was closed: {error}")
        if reply:
            self._write(connection, reply)
        return events

    def _parse(self, connection: _Connection, message: Mapping[str, Any]) -> list[RankEvent]:
        """Return what a message reports. Raises LinkError for one that no guard sends."""
        now = time.monotonic()
        if connection.rank is None:
            rank, host = message.get("rank"), _text(message, "host")
            if type(rank) is not int or not 0 <= rank < MOST_RANKS or rank in self.ranks() or not host:
                raise LinkError(f"rank {str(rank)[:20]} is no rank, or is connected already")
            connection.rank, connection.host = rank, host[:255]
            return [RankEvent("hello", rank, connection.host, time=now)]
        rank, host = connection.rank, connection.host
        if "end" in message:
            self._drop(connection)
            word, _, detail = _text(message, "end").partition("\n")
            return [RankEvent("end" if word else "lost", rank, host, word, detail.strip(), now)]
        events = []
        if state := _text(message, "state"):
            events.append(RankEvent("state", rank, host, state, time=now))
        if stacks := _text(message, "stacks"):
            events.append(RankEvent("stacks", rank, host, detail=stacks, time=now))
        return events

    def _write(self, connection: _Connection, data: bytes) -> None:
        """Send without waiting. One whose buffers are full has read nothing for long: cut short, it would read nonsense."""
        sent = 0
        with contextlib.suppress(OSError):
            sent = connection.socket.send(data)
        if sent < len(data):
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)  # the next poll reads its end

    def _lose(self, connection: _Connection, kind: str, detail: str = "") -> list[RankEvent]:
        """Drop a connection; return the event that it is, if it was a rank's."""
        self._drop(connection)
        if connection.rank is None:
            return []
        return [RankEvent(kind, connection.rank, connection.host, detail=detail, time=time.monotonic())]

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.socket, None) is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()


def _text(message: Mapping[str, Any], name: str) -> str:
    """Return a text of a message, as a terminal may get it; empty where there is none."""
    value = message.get(name, "")
    if not isinstance(value, str):
        raise LinkError(f"{name} is no text")
    return printable(value)
