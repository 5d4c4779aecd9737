"""The supervisor's end of the ranks' lines (recipes/common/runtime/rank_guard.py): who is there, who ended how.

Plain TCP, so that it needs neither a shared file system nor a launcher's help: a rank whose line breaks is ended by its guard,
and a rank that the supervisor hears no more is lost. Both sides wait SILENCE_SECONDS.
"""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from recipes.common.runtime.rank_guard import SILENCE_SECONDS

_ANSWER_SECONDS = 1.0  # between the supervisor's own words


@dataclass(frozen=True)
class RankEvent:
    """What a rank's line told. kind: "hello", "end", "lost" (no last words), "silent", "stacks", "state"."""

    kind: str
    rank: int
    host: str
    word: str = ""  # of "end": one of recipes.common.runtime.supervisor_link's words. Of "state": the kernel's letter
    detail: str = ""
    time: float = 0.0  # Unix seconds


@dataclass
class _Line:
    """One connection; `rank` is None until it has said hello with the token."""

    link: socket.socket
    heard: float
    rank: int | None = None
    host: str = "?"
    pid: int = 0
    text: bytes = b""
    ended: list[str] = field(default_factory=list)


class RankLinks:
    """Listens for the ranks' guards, which know this machine's address, `port` and `token` from TRIFOLD_SUPERVISOR."""

    def __init__(self, token: str | None = None, port: int = 0) -> None:
        """token: what a rank must say to be heard (None: drawn). port: 0 for any free one."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one file a rank: the usual 1024 are soon used up
        self._listening = socket.create_server(("", port), backlog=4096)
        self.token = token or secrets.token_hex(8)
        self.port = self._listening.getsockname()[1]
        self._watch = selectors.DefaultSelector()
        self._watch.register(self._listening, selectors.EVENT_READ)
        self._lines: dict[socket.socket, _Line] = {}
        self._told = self._polled = time.monotonic()

    def ranks(self) -> dict[int, str]:
        """Rank -> host of those on the line now."""
        return {line.rank: line.host for line in self._lines.values() if line.rank is not None}

    def tell(self, word: str) -> None:
        """To every rank: "leave", "stacks" or "die"; "" is a sign of life."""
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):  # the next poll finds it closed
                line.link.sendall(f"{word}\n".encode())

    def poll(self, seconds: float) -> list[RankEvent]:
        """Wait up to `seconds` for news."""
        events = []
        for key, _ in self._watch.select(seconds):
            if key.fileobj is self._listening:
                self._accept()
            else:
                events += self._read(self._lines[key.fileobj])
        now = time.monotonic()
        if now - self._polled > SILENCE_SECONDS / 2:  # this machine slept, or this process was stopped: nobody was silent
            for line in self._lines.values():
                line.heard = now
        self._polled = now
        if now - self._told > _ANSWER_SECONDS:
            self._told = now
            self.tell("")
        for line in [line for line in self._lines.values() if now - line.heard > SILENCE_SECONDS]:
            if line.rank is not None:
                detail = f"no word in {SILENCE_SECONDS:.0f} s"
                events.append(RankEvent("silent", line.rank, line.host, detail=detail, time=time.time()))
            self._drop(line)
        return events

    def hang_up(self) -> None:
        """Close every line: guards end their ranks at once."""
        for line in list(self._lines.values()):
            self._drop(line)

    def close(self) -> None:
        self.hang_up()
        self._watch.close()
        self._listening.close()

    def _accept(self) -> None:
        link, _ = self._listening.accept()
        link.settimeout(1.0)  # a full send buffer means that the other side has gone silent
        self._lines[link] = _Line(link, time.monotonic())
        self._watch.register(link, selectors.EVENT_READ)

    def _read(self, line: _Line) -> list[RankEvent]:
        try:
            read = line.link.recv(1 << 16)
        except OSError:
            read = b""
        if not read:
            self._drop(line)
            return [] if line.rank is None else [RankEvent("lost", line.rank, line.host, time=time.time())]
        line.heard = time.monotonic()
        *texts, line.text = (line.text + read).split(b"\n")
        events = []
        for text in texts:
            try:
                message = json.loads(text)
                events += self._understand(line, message)
            except (ValueError, TypeError, KeyError):
                self._drop(line)  # not one of ours
                break
        return events

    def _understand(self, line: _Line, message: dict[str, Any]) -> list[RankEvent]:
        now = time.time()
        if "hello" in message:
            if message["hello"] != self.token:
                raise ValueError("a rank of another job")
            line.rank, line.host, line.pid = message["rank"], message["host"], message["pid"]
            return [RankEvent("hello", line.rank, line.host, time=now)]
        if line.rank is None:
            raise ValueError("no hello")
        if "end" in message:
            self._drop(line)
            word, _, detail = message["end"].partition("\n")
            kind = "end" if word else "lost"
            return [RankEvent(kind, line.rank, line.host, word, detail.strip(), now)]
        events = []
        if "state" in message:
            events.append(RankEvent("state", line.rank, line.host, message["state"], time=now))
        if message.get("stacks"):
            events.append(RankEvent("stacks", line.rank, line.host, detail=message["stacks"], time=now))
        return events

    def _drop(self, line: _Line) -> None:
        if self._lines.pop(line.link, None) is not None:
            self._watch.unregister(line.link)
            line.link.close()
