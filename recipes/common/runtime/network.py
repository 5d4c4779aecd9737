"""Chooses the network interface that a rank uses, where the host's name does not give it; and a free port for a rendezvous.

gloo binds to what the host name resolves to: 127.0.1.1 on many machines, nothing in some containers. The interface by which this
host reaches rank 0's is right on every host, whatever its name there. NCCL chooses by itself.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import MutableMapping

import psutil

_PORTS = range(10240, 32768)  # from 32768 on the kernel gives them to outgoing connections: free when asked, taken when used
_ELSEWHERE = "192.0.2.1"  # RFC 5737, for documentation; asking for the route to it sends nothing


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set GLOO_SOCKET_IFNAME, unless the user has. Reads what a launcher sets: MASTER_ADDR, WORLD_SIZE, LOCAL_(WORLD_)SIZE."""
    if environment.get("GLOO_SOCKET_IFNAME") or not {"MASTER_ADDR", "WORLD_SIZE"} <= set(environment):
        return
    world = int(environment["WORLD_SIZE"])
    here = int(environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or world)
    for target in (environment["MASTER_ADDR"], _ELSEWHERE):
        name = interface_towards(target)
        # on rank 0's own host its name may resolve to loopback, which the others cannot reach
        if name is not None and (here == world or name != "lo"):
            environment["GLOO_SOCKET_IFNAME"] = name
            return


def interface_towards(target: str) -> str | None:
    """Return the interface whose address this host would use to reach `target`; None without a route or a name for it."""
    try:
        own = address_towards(target)
    except OSError:
        return None
    if _is_loopback(own):
        return "lo" if "lo" in psutil.net_if_addrs() else None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            return name
    return None


def address_towards(target: str) -> str:
    """Return this host's own address on the route to `target`, a name or an address. Raises OSError without a route."""
    family, kind, protocol, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def address_to_listen(name: str) -> str:
    """Return the address of the interface here that others reach by `name`; "" (all interfaces) where that cannot be told.

    A host's own name may resolve to loopback on itself, which the others cannot reach, or to an address that a router translates.
    """
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return ""
    if name == "localhost" or (found[0] == name and _is_loopback(name)):
        return next((address for address in found if "." in address), found[0])
    own = {address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    return next((address for address in found if address in own and not _is_loopback(address)), "")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def free_port() -> int:
    """Return a port on which nobody listens, drawn so that two callers at one time differ. Raises OSError if there is none."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port among 100 of {_PORTS.start} to {_PORTS.stop - 1}")
