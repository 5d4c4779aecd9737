"""Runs beside each rank of a supervised run and connects it to tools/supervise. Standard library only.

It reports to the supervisor that the rank is alive, and how it ended; it passes on the supervisor's requests. When the supervisor
is gone or silent for SILENCE_SECONDS (killed, its host dead, the network broken), it kills the rank. Being a process of its own,
it answers for a rank that hangs, is stopped, or holds Python's lock for minutes.

    python rank_guard.py HOST:PORT:TOKEN RANK PID STACKS_FD    # standard input: the rank's exit report, then its end
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time

SIGN_OF_LIFE_SECONDS = 1.0  # between two messages to the supervisor
SILENCE_SECONDS = 10.0  # without a message from the other side, the connection is lost
CONNECT_SECONDS = 900.0  # pods of one job may start minutes apart
REPORT_FD = 0


def main() -> None:
    address, rank, pid, stacks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the rank decides
    host, port, token = address.rsplit(":", 2)
    link = _connect(host, int(port), pid)
    if link is None:
        _kill(pid, rank, f"no supervisor answered at {host}:{port} in {CONNECT_SECONDS:.0f} s")
        return
    hello = {"hello": token, "rank": rank, "host": socket.gethostname(), "pid": pid}
    serve(link, hello, pid, rank, stacks)


def _connect(host: str, port: int, pid: int) -> socket.socket | None:
    end = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < end:
        gone = os.getppid() != pid  # still try to deliver its exit report
        try:
            link = socket.create_connection((host, port), timeout=SILENCE_SECONDS)
            link.settimeout(SILENCE_SECONDS)
            return link
        except OSError:
            if gone:
                break
            time.sleep(SIGN_OF_LIFE_SECONDS)
    return None


def serve(link: socket.socket, hello: dict, pid: int, rank: int, stacks: int) -> None:
    """Serve until the rank has ended or must be killed. stacks: the file that the rank writes its stacks to."""
    watch = selectors.DefaultSelector()
    for source in (link, REPORT_FD, stacks):
        watch.register(source, selectors.EVENT_READ)
    heard = woken = time.monotonic()
    report, heard_line = b"", b""
    message = hello
    while True:
        try:
            link.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            return _kill(pid, rank, f"the connection to the supervisor broke ({error})")
        message = {}
        ready = {key.fileobj for key, _ in watch.select(SIGN_OF_LIFE_SECONDS)}
        now = time.monotonic()
        if now - woken > 5 * SIGN_OF_LIFE_SECONDS:  # this machine slept: nobody was silent
            heard = now
        woken = now
        if REPORT_FD in ready:
            read = os.read(REPORT_FD, 65536)
            report += read
            if not read:  # the rank is gone
                with contextlib.suppress(OSError):
                    link.sendall(json.dumps({"end": report.decode(errors="replace")}).encode() + b"\n")
                return None
        if stacks in ready:
            read = os.read(stacks, 65536)
            message = {"stacks": read.decode(errors="replace")}
            if not read:
                watch.unregister(stacks)
        if link in ready:
            try:
                read = link.recv(4096)
            except OSError:
                read = b""
            if not read:
                return _kill(pid, rank, "the supervisor closed the connection")
            heard = now
            *lines, heard_line = (heard_line + read).split(b"\n")
            for line in lines:
                message |= _obey(line, pid)
        if now - heard > SILENCE_SECONDS:
            return _kill(pid, rank, f"no message from the supervisor in {SILENCE_SECONDS:.0f} s")


def _obey(line: bytes, pid: int) -> dict:
    if line == b"stop":
        os.kill(pid, signal.SIGUSR1)
    elif line == b"stacks":
        os.kill(pid, signal.SIGUSR2)
        return {"state": _state(pid)}
    elif line == b"die":
        os.kill(pid, signal.SIGKILL)
    return {}


def _state(pid: int) -> str:
    """Return the kernel's letter for a process's state: R runs, S sleeps, D waits for a disk or device, T is stopped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def _kill(pid: int, rank: int, why: str) -> None:
    if os.getppid() == pid:  # else the rank is gone, and its number may be another's
        print(f"rank {rank} killed: {why}", file=sys.stderr, flush=True)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
