"""A DNS server for Services, as a pod: only A records of ``<service>.<namespace>.svc.cluster.local``."""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
KNOWS_NO_SUCH_NAME = 3


class Names:
    """Addresses of each Service; of a headless one those of its pods, which are ready unless it asks for all."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self._context = ssl.create_default_context(cafile=str(FOLDER / "ca.crt"))

    def follow(self) -> None:
        while True:
            try:
                self.addresses = self._asked()
            except (OSError, ValueError) as error:
                print(error, flush=True)
            time.sleep(1)

    def _asked(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        of_pods: dict[str, bool] = {}
        for service in self._items("/api/v1/services"):
            name, spec = _name(service["metadata"]["name"], service), service["spec"]
            if spec.get("clusterIP") == "None":
                found[name], of_pods[name] = [], spec.get("publishNotReadyAddresses", False)
            elif spec.get("clusterIP"):
                found[name] = [spec["clusterIP"]]
        for piece in self._items("/apis/discovery.k8s.io/v1/endpointslices"):
            name = _name(piece["metadata"].get("labels", {}).get("kubernetes.io/service-name"), piece)
            if name in of_pods:
                for pod in piece.get("endpoints") or []:
                    if of_pods[name] or pod.get("conditions", {}).get("ready"):
                        found[name] += pod["addresses"]
        return found

    def _items(self, path: str) -> list[dict[str, Any]]:
        headers = {"authorization": f"Bearer {(FOLDER / 'token').read_text()}"}
        request = urllib.request.Request(API + path, headers=headers)
        with urllib.request.urlopen(request, context=self._context, timeout=10) as answer:
            items: list[dict[str, Any]] = json.load(answer)["items"]
        return items


def _name(service: str | None, of: dict[str, Any]) -> str:
    return f"{service}.{of['metadata']['namespace']}.svc.cluster.local"


def answer(query: bytes, names: dict[str, list[str]]) -> bytes:
    """The answer to a query of one question (RFC 1035, section 4)."""
    position, labels = 12, []
    while length := query[position]:
        labels.append(query[position + 1 : position + 1 + length].decode("ascii", "replace"))
        position += length + 1
    (kind,) = struct.unpack("!H", query[position + 1 : position + 3])
    addresses = names.get(".".join(labels).lower())
    records = addresses if addresses and kind == 1 else []
    code = KNOWS_NO_SUCH_NAME if addresses is None else 0
    head = query[:2] + struct.pack("!HHHHH", 0x8580 | code, 1, len(records), 0, 0)
    told = [b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 2, 4) + socket.inet_aton(each) for each in records]
    return b"".join([head, query[12 : position + 5], *told])


def main() -> None:
    names = Names()
    threading.Thread(target=names.follow, daemon=True).start()
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", 53))
    while True:
        query, peer = server.recvfrom(512)
        server.sendto(answer(query, names.addresses), peer)


if __name__ == "__main__":
    main()
