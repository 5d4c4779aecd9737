"""Runs two hosts on one machine: network namespaces joined by a cable, with own names, addresses and sshds. Needs root.

As on many real machines, each host's own name resolves to loopback; interfaces are called net0 on one and fast0 on the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "unshare", "pdsh", "ssh", "ssh-keygen", "sshd")
NAMES, ADDRESSES, INTERFACES = ("alpha", "beta"), ("10.77.0.1", "10.77.0.2"), ("net0", "fast0")


def missing() -> str:
    """Return why the hosts cannot run here; empty if they can."""
    lacking = [name for name in PROGRAMS if _which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "this machine allows no new namespaces"
    return ""


@dataclass(frozen=True)
class TwoHosts:
    spaces: tuple[str, str]  # names of the network namespaces
    folder: Path

    def command(self, host: int, *words: object) -> list[str]:
        """Return the command that starts `words` on a host."""
        name = f'hostname {NAMES[host]} && exec "$@"'
        inside = ["ip", "netns", "exec", self.spaces[host], "unshare", "--uts", "sh", "-c", name, "sh"]
        return [*inside, *(str(word) for word in words)]

    def environment(self) -> dict[str, str]:
        """Return variables whose `ssh` knows the key and asks nothing."""
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def hostfile(self, slots: int, *names: str) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return path

    def set_link(self, host: int, state: str) -> None:
        """Set a host's link "up" or "down"."""
        _ip("-n", self.spaces[host], "link", "set", INTERFACES[host], state)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    with tempfile.TemporaryDirectory(prefix="trifold-hosts-") as name, contextlib.ExitStack() as undo:
        folder = Path(name)
        spaces = tuple(f"trifold{os.getpid()}{host}" for host in NAMES)
        for index, space in enumerate(spaces):
            _ip("netns", "add", space)
            undo.callback(_ip, "netns", "delete", space)
            etc = Path("/etc/netns") / space  # `ip netns exec` puts these files over /etc's
            etc.mkdir(parents=True)
            undo.callback(shutil.rmtree, etc)
            other = f"{ADDRESSES[1 - index]} {NAMES[1 - index]}"
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {NAMES[index]}\n{other}\n")
        _ip("link", "add", INTERFACES[0], "netns", spaces[0], "type", "veth", "peer", "name", INTERFACES[1], "netns", spaces[1])
        hosts = TwoHosts(spaces, folder)
        _write_ssh(folder)
        for index, space in enumerate(spaces):
            _ip("-n", space, "addr", "add", f"{ADDRESSES[index]}/24", "dev", INTERFACES[index])
            for interface in ("lo", INTERFACES[index]):
                _ip("-n", space, "link", "set", interface, "up")
            daemon = subprocess.Popen(hosts.command(index, _which("sshd"), "-D", "-e", "-f", folder / "sshd_config"),
                                      stderr=(folder / f"sshd_{index}.log").open("w"))  # fmt: skip
            undo.callback(daemon.wait)
            undo.callback(daemon.kill)
        yield hosts


def _write_ssh(folder: Path) -> None:
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder}/user_key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {_which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
