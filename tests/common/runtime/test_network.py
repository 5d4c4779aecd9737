"""Interfaces and ports that a run finds by itself."""

import socket
from types import SimpleNamespace

import pytest

from recipes.common.runtime import network
from recipes.common.runtime.network import address_to_listen, choose_interface, free_port, interface_towards


@pytest.mark.skipif("lo" not in dict(map(reversed, socket.if_nameindex())), reason="no loopback interface called lo")
def test_gloo_gets_the_interface_that_reaches_rank_0():
    assert interface_towards("127.0.0.1") == "lo"
    alone = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4"}
    choose_interface(alone)
    assert alone["GLOO_SOCKET_IFNAME"] == "lo"
    several = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    choose_interface(several)
    assert several.get("GLOO_SOCKET_IFNAME") != "lo"  # the others could not come there
    users = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "ib0"}
    choose_interface(users)
    assert users["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("localhost", ["::1", "127.0.0.1"], "127.0.0.1"),
        ("own-name", ["127.0.1.1"], ""),  # as Debian has it: the others resolve it to something else
        ("own-name", ["127.0.1.1", "10.1.2.3"], "10.1.2.3"),
        ("translated", ["203.0.113.9"], ""),  # a router's address, which is not ours
    ],
)
def test_a_supervisor_listens_where_the_others_reach_it_and_nowhere_else(monkeypatch, name, found, expected):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(0, 0, 0, "", (address, 0)) for address in found])
    here = [SimpleNamespace(address=address) for address in ("127.0.0.1", "127.0.1.1", "10.1.2.3", "fe80::1%eth0")]
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: {"all": here})
    assert address_to_listen(name) == expected


def test_a_free_port_is_none_that_outgoing_connections_get():
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert max(ports) < 32768  # Linux begins there (ip(7), ip_local_port_range)
    with socket.create_server(("127.0.0.1", ports.pop())):
        pass
