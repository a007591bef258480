"""Packs a folder as an OCI image of one layer, for ``ctr images import``.

``oci_image.py FOLDER NAME:TAG OUT.tar [KEY=VALUE...]``, with the keys entrypoint, user and env (several).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import sys
import tarfile
from pathlib import Path
from typing import Any

KIND = "application/vnd.oci.image."
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def image(folder: Path, name: str, options: list[tuple[str, str]]) -> bytes:
    """The image as a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for entry in sorted(folder.iterdir()):
            tar.add(entry, arcname=entry.name)
    layer = out.getvalue()
    variables = [value for key, value in options if key == "env"]
    settings: dict[str, Any] = {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin", *variables]}
    for key, value in options:
        if key == "user":
            settings["User"] = value
        elif key == "entrypoint":
            settings["Entrypoint"] = value.split()
    config = {
        "architecture": ARCHITECTURES[platform.machine()], "os": "linux", "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
    }  # fmt: skip
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        blobs[f"blobs/sha256/{digest(data).removeprefix('sha256:')}"] = data
        return {"mediaType": KIND + kind, "digest": digest(data), "size": len(data)}

    manifest = {
        "schemaVersion": 2, "mediaType": f"{KIND}manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(gzip.compress(layer, 1), "layer.v1.tar+gzip")],
    }  # fmt: skip
    listed = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    listed["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = {"schemaVersion": 2, "manifests": [listed]}
    return packed({"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode(), **blobs})


if __name__ == "__main__":
    source, name, target, *rest = sys.argv[1:]
    keyed = [(key, value) for key, _, value in (each.partition("=") for each in rest)]
    Path(target).write_bytes(image(Path(source), name, keyed))
