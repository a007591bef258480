"""Pods' network: a bridge, one address for each pod, and the names of services."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from core.errors import RatchetError

BRIDGE: Final = "ratchet0"
NETWORK: Final = IPv4Network("10.77.0.0/16")
HOST: Final = NETWORK[1]
HOSTS_BYTES: Final = 16 * 1024
"""Fixed size of the file of names, so that it can be rewritten in place with one write while processes read it."""


class Network:
    """Network of one runner, in its own network namespace, which ends with it."""

    def __init__(self, hosts: Path) -> None:
        """``hosts``: a file to write, each container's /etc/hosts."""
        self.hosts = hosts
        self._last = HOST
        self._lock = threading.Lock()
        hosts.write_bytes(b"\n" * HOSTS_BYTES)
        ip("link", "set", "lo", "up")
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("address", "add", f"{HOST}/{NETWORK.prefixlen}", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def join(self, process: int) -> IPv4Address:
        with self._lock:
            self._last += 1
            address = self._last
        inside = ["nsenter", f"--target={process}", "--net"]
        link = f"pod{int(address) - int(HOST)}"
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(process))
        ip("link", "set", link, "master", BRIDGE, "up")
        for words in (
            ["address", "add", f"{address}/{NETWORK.prefixlen}", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "via", str(HOST)],
        ):
            subprocess.run([*inside, "ip", *words], check=True)
        return address

    def name(self, names: Mapping[str, Iterable[IPv4Address]]) -> None:
        lines = ["127.0.0.1 localhost", *(f"{one} {name}" for name, all_ in names.items() for one in all_)]
        text = "".join(f"{line}\n" for line in lines).encode()
        if len(text) > HOSTS_BYTES:
            raise RatchetError(f"the names of {len(lines)} addresses do not fit.", "Raise HOSTS_BYTES.")
        with self.hosts.open("r+b", buffering=0) as file:
            file.write(text.ljust(HOSTS_BYTES, b"\n"))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
