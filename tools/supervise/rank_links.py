"""The supervisor's end of the ranks' connections (recipes/common/runtime/rank_guard.py): which ranks are alive, how each ended.

Plain TCP, so it needs neither a shared file system nor the launcher: a guard whose connection breaks kills its rank, and a rank
that sends nothing for SILENCE_SECONDS counts as lost.
"""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

from recipes.common.runtime.rank_guard import SIGN_OF_LIFE_SECONDS, SILENCE_SECONDS


@dataclass(frozen=True)
class RankEvent:
    """One report from a rank. kind: "hello", "end", "lost" (ended without an exit report), "silent", "stacks", "state"."""

    kind: str
    rank: int
    host: str
    word: str = ""  # "end": one of recipes.common.runtime.supervisor_link's words; "state": the kernel's letter
    detail: str = ""
    time: float = 0.0  # Unix seconds


@dataclass
class _Connection:
    """One guard's connection; `rank` is None until it has said hello with the token."""

    socket: socket.socket
    last_heard: float  # monotonic
    rank: int | None = None
    host: str = "?"
    unread: bytes = b""  # the beginning of a line whose end has not arrived


class RankLinks:
    """Listens for the ranks' guards, which know this machine's address, `port` and `token` from TRIFOLD_SUPERVISOR."""

    def __init__(self, token: str | None = None, port: int = 0) -> None:
        """token: what a guard must send to be accepted (None: a random one). port: 0 for any free one."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one file a rank: the usual 1024 are soon used up
        self._listener = socket.create_server(("", port), backlog=4096)
        self.token = token or secrets.token_hex(8)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}
        self._last_sign = self._last_poll = time.monotonic()

    def ranks(self) -> dict[int, str]:
        """Return rank -> host of the ranks that are connected now."""
        return {each.rank: each.host for each in self._connections.values() if each.rank is not None}

    def send(self, word: str) -> None:
        """Send "stop", "stacks" or "die" to every rank; "" is a sign of life."""
        for each in list(self._connections.values()):
            with contextlib.suppress(OSError):  # the next poll finds it closed
                each.socket.sendall(f"{word}\n".encode())

    def poll(self, seconds: float) -> list[RankEvent]:
        """Wait up to `seconds` for events and return them."""
        events = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            else:
                events += self._read(self._connections[key.fileobj])
        now = time.monotonic()
        if now - self._last_poll > SILENCE_SECONDS / 2:  # this machine slept, or this process was stopped: no rank was silent
            for each in self._connections.values():
                each.last_heard = now
        self._last_poll = now
        if now - self._last_sign > SIGN_OF_LIFE_SECONDS:
            self._last_sign = now
            self.send("")
        for each in [each for each in self._connections.values() if now - each.last_heard > SILENCE_SECONDS]:
            if each.rank is not None:
                detail = f"no message for {SILENCE_SECONDS:.0f} s"
                events.append(RankEvent("silent", each.rank, each.host, detail=detail, time=time.time()))
            self._drop(each)
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
        accepted, _ = self._listener.accept()
        accepted.settimeout(1.0)  # a send buffer that stays full means that the other side is silent
        self._connections[accepted] = _Connection(accepted, time.monotonic())
        self._selector.register(accepted, selectors.EVENT_READ)

    def _read(self, connection: _Connection) -> list[RankEvent]:
        try:
            read = connection.socket.recv(1 << 16)
        except OSError:
            read = b""
        if not read:
            self._drop(connection)
            return [] if connection.rank is None else [RankEvent("lost", connection.rank, connection.host, time=time.time())]
        connection.last_heard = time.monotonic()
        *lines, connection.unread = (connection.unread + read).split(b"\n")
        events = []
        for line in lines:
            try:
                message = json.loads(line)
                events += self._parse(connection, message)
            except (ValueError, TypeError, KeyError):
                self._drop(connection)  # not a guard of this job
                break
        return events

    def _parse(self, connection: _Connection, message: dict[str, Any]) -> list[RankEvent]:
        now = time.time()
        if "hello" in message:
            if message["hello"] != self.token:
                raise ValueError("a rank of another job")
            connection.rank, connection.host = message["rank"], message["host"]
            return [RankEvent("hello", connection.rank, connection.host, time=now)]
        rank, host = connection.rank, connection.host
        if rank is None:
            raise ValueError("no hello")
        if "end" in message:
            self._drop(connection)
            word, _, detail = message["end"].partition("\n")
            return [RankEvent("end" if word else "lost", rank, host, word, detail.strip(), now)]
        events = []
        if "state" in message:
            events.append(RankEvent("state", rank, host, message["state"], time=now))
        if message.get("stacks"):
            events.append(RankEvent("stacks", rank, host, detail=message["stacks"], time=now))
        return events

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.socket, None) is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()
