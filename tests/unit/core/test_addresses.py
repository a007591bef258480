from __future__ import annotations

import socket

import pytest

from core.addresses import free_port, is_loopback, local_url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("ratchet.internal", "http://ratchet.internal:80"),
    ],
)
def test_a_server_on_all_addresses_is_reached_over_loopback(host: str, url: str) -> None:
    assert local_url(host, 80) == url


def test_only_addresses_of_this_machine_are_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "ratchet.internal", "")))


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[1] > 0
