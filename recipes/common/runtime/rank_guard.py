"""Runs beside each rank of a supervised run and connects it to tools/supervise. Standard library only.

It reports to the supervisor that the rank is alive, and how it ended; it passes on the supervisor's requests. When the supervisor
is gone or silent for SILENCE_SECONDS (killed, its host dead, the network broken), it kills the rank. Being a process of its own,
it answers for a rank that hangs, is stopped, or holds Python's lock for minutes.

    python rank_guard.py HOST:PORT RANK PID STACKS_FD    # standard input: the rank's exit report, then its end

The secret is in its environment (authenticated_link.py). Who answers at that address without it is left, and ends nothing.
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

if not __package__:  # it runs as a script, without site-packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from recipes.common.runtime.authenticated_link import AuthenticatedLink, LinkError, SecretError, read_secret
from recipes.common.runtime.processes import KnownProcess, open_process

SIGN_OF_LIFE_SECONDS = 1.0  # between two messages to the supervisor
SILENCE_SECONDS = 10.0  # without a message from the other side, the connection is lost
CONNECT_SECONDS = 900.0  # pods of one job may start minutes apart
REPORT_FD = 0
REPORT_BYTES = 1 << 14  # of a report or of a part of the stacks: JSON may make 6 bytes of one


def main() -> None:
    address, rank, pid, stacks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the rank decides
    process = open_process(pid)
    if process is None or os.getppid() != pid:  # it ended before it was opened: there is only its report to deliver
        process = KnownProcess(pid, None, None)
    try:
        secret = read_secret(os.environ)
    except SecretError as error:
        return _kill(process, rank, f"it cannot report to its supervisor: {error}")
    host, _, port = address.rpartition(":")
    found = connect(host, int(port), secret, pid)
    if isinstance(found, str):
        return _kill(process, rank, found)
    serve(*found, {"rank": rank, "host": socket.gethostname()}, process, rank, stacks)


def connect(host: str, port: int, secret: str, pid: int) -> tuple[socket.socket, AuthenticatedLink] | str:
    """Return a connection to the supervisor, which has proven itself; or why there is none."""
    end, strangers = time.monotonic() + CONNECT_SECONDS, 0
    while time.monotonic() < end:
        gone = os.getppid() != pid  # still try to deliver its exit report
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, port), timeout=SILENCE_SECONDS)
            link = AuthenticatedLink(secret, is_supervisor=False)
            if _prove(connection, link):
                connection.settimeout(SILENCE_SECONDS)
                return connection, link
            connection.close()
            strangers += 1
        if gone:
            break
        time.sleep(SIGN_OF_LIFE_SECONDS)
    others = f"; what answered {strangers} times did not know this job's secret" if strangers else ""
    return f"no supervisor answered at {host}:{port} in {CONNECT_SECONDS:.0f} s{others}"


def _prove(connection: socket.socket, link: AuthenticatedLink) -> bool:
    """Return whether the other side proves itself, in the time of one silence."""
    end = time.monotonic() + SILENCE_SECONDS
    try:
        while not link.is_proven:
            connection.settimeout(max(end - time.monotonic(), 0.001))
            read = connection.recv(64)  # less than its proof and a message: nothing of it is lost
            if not read:
                return False
            _, reply = link.receive(read)
            connection.sendall(reply)
    except (OSError, LinkError):
        return False
    return True


def serve(connection: socket.socket, link: AuthenticatedLink, hello: dict, process: KnownProcess, rank: int, stacks: int) -> None:
    """Serve until the rank has ended or must be killed. stacks: the file that the rank writes its stacks to."""
    watch = selectors.DefaultSelector()
    for source in (connection, REPORT_FD, stacks):
        watch.register(source, selectors.EVENT_READ)
    heard = woken = time.monotonic()
    report = b""
    message = hello
    while True:
        try:
            connection.sendall(link.pack(message))
        except OSError as error:
            return _kill(process, rank, f"the connection to the supervisor broke ({error})")
        message = {}
        ready = {key.fileobj for key, _ in watch.select(SIGN_OF_LIFE_SECONDS)}
        now = time.monotonic()
        if now - woken > 5 * SIGN_OF_LIFE_SECONDS:  # this machine slept: nobody was silent
            heard = now
        woken = now
        if REPORT_FD in ready:
            read = os.read(REPORT_FD, 65536)
            report = (report + read)[:REPORT_BYTES]
            if not read:  # the rank is gone
                with contextlib.suppress(OSError):
                    connection.sendall(link.pack({"end": report.decode(errors="replace")}))
                return None
        if stacks in ready:
            read = os.read(stacks, REPORT_BYTES)
            message = {"stacks": read.decode(errors="replace")}
            if not read:
                watch.unregister(stacks)
        if connection in ready:
            try:
                read = connection.recv(4096)
                orders, _ = link.receive(read)
            except LinkError as error:
                return _kill(process, rank, f"the connection to the supervisor was tampered with: {error}")
            except OSError:
                read = b""
            if not read:
                return _kill(process, rank, "the supervisor closed the connection")
            for order in orders:
                heard = now
                message |= _obey(order.get("do"), process)
        if now - heard > SILENCE_SECONDS:
            return _kill(process, rank, f"no message from the supervisor in {SILENCE_SECONDS:.0f} s")


def _obey(order: object, process: KnownProcess) -> dict:
    if order == "stop":
        process.send(signal.SIGUSR1)
    elif order == "stacks":
        process.send(signal.SIGUSR2)
        return {"state": _state(process.pid)}
    elif order == "die":
        process.send(signal.SIGKILL)
    return {}


def _state(pid: int) -> str:
    """Return the kernel's letter for a process's state: R runs, S sleeps, D waits for a disk or device, T is stopped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def _kill(process: KnownProcess, rank: int, why: str) -> None:
    if os.getppid() == process.pid and process.send(signal.SIGKILL):  # one that has ended keeps its number until it is reaped
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a screen that is closed
            print(f"rank {rank} killed: {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
