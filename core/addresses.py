"""Listening addresses and their URLs, and an operator's rules for where images may be fetched from:

cdn.example.org                      that host, http and https on their own ports
cdn.example.org:8443                 that host on that port
*.example.net                        every host below example.net, not example.net itself
https://cdn.example.org/images/      only https, only below that path
*                                    every host; its address is still checked
s3://bucket/photos/                  that prefix of that bucket (also gs://)
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

PORTS = {"http": 80, "https": 443}
OBJECT_SCHEMES = ("s3", "gs")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def is_loopback(host: str) -> bool:
    """True if an address is only reachable from this machine. Names other than ``localhost`` count as public."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def local_url(host: str, port: int) -> str:
    """URL by which a local process reaches a server listening on this host and port."""
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(address: str, timeout: float = 1.0) -> bool:
    """True if a TCP connection to ``host:port`` is accepted within ``timeout`` seconds."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=timeout):
            return True
    except (OSError, ValueError, OverflowError):  # a port above 65535 overflows
        return False


@dataclass(frozen=True, slots=True)
class AllowRule:
    scheme: str
    """``http``, ``https``, or empty: both."""
    host: str
    port: int | None
    path: str

    @classmethod
    def parse(cls, text: str) -> AllowRule:
        parts = urlsplit(text if "://" in text else f"//{text}")
        if parts.scheme not in ("", *PORTS):
            raise ValueError(f"{text!r}: only http and https are fetched from a host")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"{text!r}: give a host, and perhaps a port and a path, nothing more")
        host = (parts.hostname or "").encode("idna").decode() if parts.hostname else ""
        if not host or any(c.isspace() for c in text) or "*" in host.removeprefix("*.").removeprefix("*"):
            raise ValueError(f"{text!r}: expected a host like cdn.example.org, *.example.net or *")
        if host.startswith("*") and host != "*" and not host.startswith("*."):
            raise ValueError(f"{text!r}: a star stands for whole names: *.example.net")
        return cls(parts.scheme, host, parts.port, parts.path)

    def covers(self, scheme: str, host: str, port: int | None, path: str) -> bool:
        """True if the rule matches. ``host`` is in lower case, international names in their ASCII form."""
        if scheme not in PORTS or self.scheme not in ("", scheme) or not self._names(host):
            return False
        if (port or PORTS[scheme]) != (self.port or PORTS[scheme]):
            return False
        # Some servers decode "%2e%2e" and "\\" after the path has been compared.
        steps = unquote(path).replace("\\", "/").split("/")
        folder = self.path if self.path.endswith("/") else f"{self.path}/"
        return ".." not in steps and (path == self.path or path.startswith(folder))

    def _names(self, host: str) -> bool:
        if self.host == "*":
            return True
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host


@dataclass(frozen=True, slots=True)
class ObjectRule:
    """An allow-list entry for objects of a store, or one object's address. Keys are compared literally: object stores
    decode no ``%20`` and resolve no ``..``, but some gateways do, so keys with such steps are rejected."""

    scheme: str
    bucket: str
    key: str
    """A prefix that ends with a slash, or at one; empty: the whole bucket."""

    @classmethod
    def parse(cls, text: str) -> ObjectRule:
        scheme, _, rest = text.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme not in OBJECT_SCHEMES or not _BUCKET.fullmatch(bucket):
            raise ValueError(f"{text!r}: expected s3://bucket/prefix/ or gs://bucket/prefix/")
        if len(key.encode()) > 1024 or not key.isprintable() or {".", ".."} & set(key.replace("\\", "/").split("/")):
            raise ValueError(f"{text!r}: the key is longer than 1024 bytes, or has steps or characters not taken")
        return cls(scheme, bucket, key)

    def covers(self, other: ObjectRule) -> bool:
        folder = self.key if not self.key or self.key.endswith("/") else f"{self.key}/"
        inside = other.key == self.key or other.key.startswith(folder)
        return (other.scheme, other.bucket) == (self.scheme, self.bucket) and inside


def is_object(uri: str) -> bool:
    return uri.partition("://")[0] in OBJECT_SCHEMES


def _host(text: str) -> str:
    AllowRule.parse(text)
    return text


def _uri(text: str) -> str:
    if is_object(text):
        ObjectRule.parse(text)
    elif not text.startswith("file:///"):
        AllowRule.parse(text)
    return text


def _network(text: str) -> str:
    ipaddress.ip_network(text)  # raises for invalid input, also "has host bits set"
    return text


HostRule = Annotated[str, AfterValidator(_host)]
"""A setting that is an allow-list entry."""
UriRule = Annotated[str, AfterValidator(_uri)]
"""The same, or a folder (``file:///data/photos``), or objects (``s3://bucket/photos/``)."""
NetworkRule = Annotated[str, AfterValidator(_network)]
"""A setting that is a network or an address: ``10.1.0.0/16``, ``fd00::/8``, ``192.0.2.7``."""
