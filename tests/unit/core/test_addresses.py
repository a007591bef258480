from __future__ import annotations

from core.addresses import is_loopback, local_url


def test_a_server_on_all_addresses_is_reached_over_loopback_and_only_addresses_of_this_machine_are_that() -> None:
    hosts = ("0.0.0.0", "::", "::1", "ratchet.internal")
    assert [local_url(host, 80) for host in hosts] == [
        "http://127.0.0.1:80", "http://127.0.0.1:80", "http://[::1]:80", "http://ratchet.internal:80",
    ]  # fmt: skip
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "ratchet.internal", "")))
