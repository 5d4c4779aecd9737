"""Carries JSON messages between a supervisor and the guards of its ranks, once each side has proven that it knows the secret.

    supervisor -> guard    a nonce
    guard -> supervisor    its own nonce, HMAC(secret, "guard", both nonces)
    supervisor -> guard    HMAC(secret, "supervisor", both nonces)
    both ways from then    length, body, HMAC(key, number of the message, body); each direction of each connection has its key

The secret is never sent. What was changed, repeated, left out, or recorded on another connection does not fit and ends the
connection that it arrived on, nothing else; a length is bounded before anything is kept. Bodies are not encrypted. Standard
library only: rank_guard.py runs without site-packages.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

SECRET = "TRIFOLD_SECRET"  # the secret itself, where the environment reaches the ranks unseen
SECRET_FILE = "TRIFOLD_SECRET_FILE"  # or a file of mode 0600, where a launcher writes the environment on command lines
SHORTEST_SECRET = 32  # characters
LONGEST_BODY = 1 << 18  # bytes
_MAGIC = b"trifold 1 supervisor"
_NONCE = _MAC = 32  # bytes
_LENGTH = 4
_FILE_SECONDS = 30.0  # for a new file to appear on a network file system


class LinkError(ValueError):
    """What arrived is not from the other side of this job."""


class SecretError(ValueError):
    """The job's secret is missing; the message says where it was looked for."""


def new_secret() -> str:
    return secrets.token_hex(32)


def read_secret(environment: Mapping[str, str], wait_seconds: float = _FILE_SECONDS) -> str:
    """Return the job's secret from the environment or from the file named there."""
    secret, path = environment.get(SECRET, "").strip(), environment.get(SECRET_FILE, "")
    if not secret and not path:
        raise SecretError(f"neither {SECRET} nor {SECRET_FILE} is set; the launcher must hand on the supervisor's environment")
    end = time.monotonic() + wait_seconds
    while not secret:
        try:
            with open(path, encoding="ascii") as file:
                secret = file.read(4096).strip()
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > end:
                raise SecretError(f"{SECRET_FILE}={path}: {error}; it must be on a file system that all hosts share") from None
            time.sleep(0.5)
    if len(secret) < SHORTEST_SECRET:
        raise SecretError(
            f"the secret of {SECRET if SECRET in environment else path} is shorter than {SHORTEST_SECRET} characters"
        )
    return secret


class AuthenticatedLink:
    """One side of a connection, without its socket: takes the bytes that arrived, returns messages and what to send back."""

    def __init__(self, secret: str, *, is_supervisor: bool) -> None:
        self.is_proven = False  # the other side knows the secret
        self._secret, self._is_supervisor = secret.encode(), is_supervisor
        self._own_nonce = secrets.token_bytes(_NONCE)
        self._unread = bytearray()
        self._nonces = b""  # a guard's: both, once it has sent its proof
        self._sent = self._received = 0  # messages
        self._send_key = self._receive_key = b""

    def greeting(self) -> bytes:
        """Return what the supervisor sends first."""
        return _MAGIC + self._own_nonce

    def receive(self, data: bytes) -> tuple[list[dict[str, Any]], bytes]:
        """Return the messages that are complete, and bytes to send back. Raises LinkError: then close the connection."""
        self._unread += data
        reply = b""
        if not self.is_proven:
            reply = self._answer_guard() if self._is_supervisor else self._answer_supervisor()
        messages = []
        while self.is_proven and (body := self._next_body()) is not None:
            messages.append(_parse(body))
        return messages, reply

    def pack(self, message: Mapping[str, Any]) -> bytes:
        """Return the bytes of a message. Only once the other side is proven."""
        assert self.is_proven
        body = json.dumps(message).encode()
        assert len(body) <= LONGEST_BODY, len(body)
        mac = _mac(self._send_key, self._sent.to_bytes(8, "big"), body)
        self._sent += 1
        return len(body).to_bytes(_LENGTH, "big") + body + mac

    def _take(self, count: int) -> bytes | None:
        if len(self._unread) < count:
            return None
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken

    def _answer_guard(self) -> bytes:
        """Check a guard's proof and return ours."""
        proof = self._take(_NONCE + _MAC)
        if proof is None:
            return b""
        nonces = self._own_nonce + proof[:_NONCE]
        if not hmac.compare_digest(proof[_NONCE:], _mac(self._secret, b"guard", nonces)):
            raise LinkError("the other side does not know this job's secret")
        self._begin(nonces)
        return _mac(self._secret, b"supervisor", nonces)

    def _answer_supervisor(self) -> bytes:
        """Answer the supervisor's nonce with our proof; check its proof when that has arrived."""
        reply = b""
        if not self._nonces:
            if not _MAGIC.startswith(self._unread[: len(_MAGIC)]):
                raise LinkError("the other side is no supervisor")
            greeting = self._take(len(_MAGIC) + _NONCE)
            if greeting is None:
                return b""
            self._nonces = greeting[len(_MAGIC) :] + self._own_nonce
            reply = self._own_nonce + _mac(self._secret, b"guard", self._nonces)
        proof = self._take(_MAC)
        if proof is None:
            return reply
        if not hmac.compare_digest(proof, _mac(self._secret, b"supervisor", self._nonces)):
            raise LinkError("the other side does not know this job's secret")
        self._begin(self._nonces)
        return reply

    def _begin(self, nonces: bytes) -> None:
        to_guard, to_supervisor = (_mac(self._secret, word, nonces) for word in (b"to guard", b"to supervisor"))
        self._send_key, self._receive_key = (to_guard, to_supervisor) if self._is_supervisor else (to_supervisor, to_guard)
        self.is_proven = True

    def _next_body(self) -> bytes | None:
        if len(self._unread) < _LENGTH:
            return None
        length = int.from_bytes(self._unread[:_LENGTH], "big")
        if length > LONGEST_BODY:
            raise LinkError(f"a message of {length} bytes, more than {LONGEST_BODY}")
        frame = self._take(_LENGTH + length + _MAC)
        if frame is None:
            return None
        body = frame[_LENGTH:-_MAC]
        if not hmac.compare_digest(frame[-_MAC:], _mac(self._receive_key, self._received.to_bytes(8, "big"), body)):
            raise LinkError("a message was changed, repeated or left out")
        self._received += 1
        return body


def _mac(key: bytes, *parts: bytes) -> bytes:
    """Return the HMAC of the parts. Every first part has a fixed length or is one of the words above: no two inputs are alike."""
    return hmac.digest(key, b"\0".join(parts), "sha256")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LinkError(f"a message is not JSON ({error})") from None
    if not isinstance(message, dict):
        raise LinkError("a message is not a JSON object")
    return message
