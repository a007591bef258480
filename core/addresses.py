"""Addresses to listen on and the URLs that lead there; and rules for where images may be fetched from, as an operator
writes them:

cdn.example.org                      that host, http and https on their own ports
cdn.example.org:8443                 that host on that port
*.example.net                        every host below example.net, not example.net itself
https://cdn.example.org/images/      only https, only what lies under that path
*                                    every host; the check of its address stays
s3://bucket/photos/                  what lies under that prefix of that bucket (also gs://)
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
    """True if an address to listen on is of this machine alone. A name other than ``localhost`` counts as the world."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def local_url(host: str, port: int) -> str:
    """URL under which a process of the same machine reaches a server that listens on this host and port."""
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
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
    """One entry of an allow-list."""

    scheme: str
    """``http``, ``https``, or empty: both."""
    host: str
    port: int | None
    path: str

    @classmethod
    def parse(cls, text: str) -> AllowRule:
        """Read one entry. Raises ValueError saying what is wrong with it."""
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
        """True if an address lies here. ``host`` is in lower case, international names in their ASCII form."""
        if scheme not in PORTS or self.scheme not in ("", scheme) or not self._names(host):
            return False
        if (port or PORTS[scheme]) != (self.port or PORTS[scheme]):
            return False
        # "%2e%2e" and "\\" are decoded by some servers after the path has been compared.
        steps = unquote(path).replace("\\", "/").split("/")
        folder = self.path if self.path.endswith("/") else f"{self.path}/"
        return ".." not in steps and (path == self.path or path.startswith(folder))

    def _names(self, host: str) -> bool:
        if self.host == "*":
            return True
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host


@dataclass(frozen=True, slots=True)
class ObjectRule:
    """One entry of an allow-list that names objects of a store. Also an address of one object.

    Keys are compared as they are written: object stores decode no ``%20`` and resolve no ``..``, but some gateways do,
    so keys with such steps are refused.
    """

    scheme: str
    bucket: str
    key: str
    """A prefix that ends with a slash, or at one; empty: all of the bucket."""

    @classmethod
    def parse(cls, text: str) -> ObjectRule:
        """Read one entry. Raises ValueError saying what is wrong with it."""
        scheme, _, rest = text.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme not in OBJECT_SCHEMES or not _BUCKET.fullmatch(bucket):
            raise ValueError(f"{text!r}: expected s3://bucket/prefix/ or gs://bucket/prefix/")
        if len(key.encode()) > 1024 or not key.isprintable() or {".", ".."} & set(key.replace("\\", "/").split("/")):
            raise ValueError(f"{text!r}: the key is longer than 1024 bytes, or has steps or characters not taken")
        return cls(scheme, bucket, key)

    def covers(self, other: ObjectRule) -> bool:
        """True if an object lies here."""
        folder = self.key if not self.key or self.key.endswith("/") else f"{self.key}/"
        inside = other.key == self.key or other.key.startswith(folder)
        return (other.scheme, other.bucket) == (self.scheme, self.bucket) and inside


def is_object(uri: str) -> bool:
    """True if a URI is one of an object store."""
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
    ipaddress.ip_network(text)  # says what is wrong, also "has host bits set"
    return text


HostRule = Annotated[str, AfterValidator(_host)]
"""A setting that is one entry of an allow-list."""
UriRule = Annotated[str, AfterValidator(_uri)]
"""The same, or a folder (``file:///data/photos``), or objects (``s3://bucket/photos/``)."""
NetworkRule = Annotated[str, AfterValidator(_network)]
"""A setting that is a network or an address: ``10.1.0.0/16``, ``fd00::/8``, ``192.0.2.7``."""
