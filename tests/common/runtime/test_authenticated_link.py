"""Both sides of a connection prove themselves; whatever else arrives is a LinkError and nothing more."""

import json
import random

import pytest

from recipes.common.runtime import authenticated_link
from recipes.common.runtime.authenticated_link import (
    LONGEST_BODY,
    SECRET,
    SECRET_FILE,
    AuthenticatedLink,
    LinkError,
    SecretError,
    new_secret,
    read_secret,
)


def proven_pair(secret: str = "s" * 32) -> tuple[AuthenticatedLink, AuthenticatedLink]:
    """A supervisor's side and a guard's, connected a byte at a time."""
    supervisor = AuthenticatedLink(secret, is_supervisor=True)
    guard = AuthenticatedLink(secret, is_supervisor=False)
    to_guard, to_supervisor = supervisor.greeting(), b""
    while to_guard or to_supervisor:
        for byte in to_guard:
            to_supervisor += guard.receive(bytes([byte]))[1]
        to_guard = b""
        for byte in to_supervisor:
            to_guard += supervisor.receive(bytes([byte]))[1]
        to_supervisor = b""
    assert supervisor.is_proven and guard.is_proven
    return supervisor, guard


def test_messages_cross_in_order_however_they_are_cut():
    supervisor, guard = proven_pair()
    sent = [{"rank": 3, "host": "höst\n"}, {}, {"stacks": "x" * 50_000}]
    data, received = b"".join(guard.pack(message) for message in sent), []
    for begin in range(0, len(data), 1000):
        received += supervisor.receive(data[begin : begin + 1000])[0]
    assert received == sent
    assert guard.receive(supervisor.pack({"do": "stop"}) + supervisor.pack({}))[0] == [{"do": "stop"}, {}]


def test_a_side_without_the_secret_proves_nothing():
    supervisor = AuthenticatedLink(new_secret(), is_supervisor=True)
    stranger = AuthenticatedLink(new_secret(), is_supervisor=False)
    _, proof = stranger.receive(supervisor.greeting())
    with pytest.raises(LinkError, match="does not know this job's secret"):
        supervisor.receive(proof)

    guard = AuthenticatedLink("s" * 32, is_supervisor=False)
    impostor = AuthenticatedLink(new_secret(), is_supervisor=True)
    guard.receive(impostor.greeting())
    for answer in (b"\0" * 32, guard._own_nonce):
        with pytest.raises(LinkError, match="does not know this job's secret"):
            guard.receive(answer)
    assert not guard.is_proven


def test_a_proof_serves_on_one_connection_and_in_one_direction():
    secret = "s" * 32
    first, second = (AuthenticatedLink(secret, is_supervisor=True) for _ in range(2))
    _, proof = AuthenticatedLink(secret, is_supervisor=False).receive(first.greeting())
    with pytest.raises(LinkError, match="does not know"):  # replayed: the other connection has another nonce
        second.receive(proof)
    guard = AuthenticatedLink(secret, is_supervisor=False)
    _, own = guard.receive(first.greeting())
    with pytest.raises(LinkError, match="does not know"):  # reflected
        guard.receive(own[-32:])


@pytest.mark.parametrize("change", ["repeat", "skip", "flip", "reflect", "other connection"])
def test_a_message_that_was_meddled_with_is_refused(change):
    supervisor, guard = proven_pair()
    first, second = guard.pack({"a": 1}), guard.pack({"b": 2})
    data = {
        "repeat": first + first,
        "skip": second,
        "flip": first[:8] + bytes([first[8] ^ 1]) + first[9:],
        "reflect": supervisor.pack({"a": 1}),
        "other connection": proven_pair()[1].pack({"a": 1}),
    }[change]
    with pytest.raises(LinkError, match="changed, repeated or left out"):
        supervisor.receive(data)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"5", b'["hello"]', b"1" * 10_000, b"\xff\xfe", b"", b"nul", b'{"a":'])
def test_a_body_that_is_no_object_is_refused_even_with_its_proof(body):
    supervisor, guard = proven_pair()
    mac = authenticated_link._mac(guard._send_key, bytes(8), body)
    with pytest.raises(LinkError, match="is not"):
        supervisor.receive(len(body).to_bytes(4, "big") + body + mac)


def test_a_length_is_bounded_before_anything_is_kept():
    supervisor, _ = proven_pair()
    with pytest.raises(LinkError, match=f"more than {LONGEST_BODY}"):
        supervisor.receive((LONGEST_BODY + 1).to_bytes(4, "big"))


def test_whatever_arrives_a_side_raises_nothing_but_its_error():
    """Random bytes, and what a true side sends, cut and flipped, against every state of both sides."""
    draw = random.Random(0)
    for trial in range(600):
        supervisor, guard = proven_pair()
        true = [b"", b"GET / HTTP/1.1\r\n\r\n", json.dumps({"hello": "x"}).encode() + b"\n", supervisor.greeting()]
        true += [guard.pack({"end": "finished"}), supervisor.pack({"do": "die"})]
        sides = [supervisor, guard, *(AuthenticatedLink("s" * 32, is_supervisor=yes) for yes in (True, False))]
        side = sides[trial % len(sides)]
        was_proven, data = side.is_proven, bytearray(draw.choice(true) + draw.randbytes(draw.choice([0, 1, 40, 3000])))
        for _ in range(draw.randrange(3)):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            messages, _ = side.receive(bytes(data[: draw.randrange(len(data) + 1)]))
        except LinkError:
            continue
        assert side.is_proven == was_proven
        assert was_proven or messages == []
        assert len(side._unread) <= LONGEST_BODY + 36


def test_the_secret_is_read_from_the_environment_or_a_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("f" * 40 + "\n")
    assert read_secret({SECRET: "e" * 32, SECRET_FILE: str(path)}, 0) == "e" * 32
    assert read_secret({SECRET_FILE: str(path)}, 0) == "f" * 40
    for variables, message in (
        ({}, "neither TRIFOLD_SECRET nor TRIFOLD_SECRET_FILE is set"),
        ({SECRET: "short"}, "the secret of TRIFOLD_SECRET is shorter than 32 characters"),
        ({SECRET_FILE: str(tmp_path / "none")}, "must be on a file system that all hosts share"),
    ):
        with pytest.raises(SecretError, match=message):
            read_secret(variables, 0)
