"""A pod's volumes on one machine: folders, in-memory file systems, and the files of Secrets and ConfigMaps."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cluster.container import Mount
from benchmarks.cluster.image import USER
from core.errors import RatchetError

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigObjects:
    """Secrets and ConfigMaps, by name."""

    secrets: Mapping[str, Mapping[str, str]]
    config_maps: Mapping[str, Mapping[str, str]]

    def values(self, volume: Manifest) -> Mapping[str, str]:
        """Contents of the files of a volume. Raises RatchetError for an unknown kind."""
        if "configMap" in volume:
            return self.config_maps[volume["configMap"]["name"]]
        if "secret" in volume:
            return self.secrets[volume["secret"]["secretName"]]
        raise RatchetError(f"volume {volume['name']} is of a kind that is not known here.", "Add it to the runner.")


class Volumes:
    """Volumes of one pod, in a folder. They belong to the pod's group (``fsGroup``), as a kubelet makes them."""

    def __init__(self, volumes: Sequence[Manifest], objects: ConfigObjects, folder: Path) -> None:
        self._folders: dict[str, Path] = {}
        self._mounted: list[Path] = []
        for volume in volumes:
            place = folder / volume["name"]
            place.mkdir(parents=True)
            self._folders[volume["name"]] = place
            if "emptyDir" in volume:
                self._make_empty(place, volume["emptyDir"])
            else:
                _write(place, objects.values(volume))

    def mounts(self, container: Manifest) -> list[Mount]:
        return [
            Mount(self._folders[each["name"]] / each.get("subPath", ""), each["mountPath"], each.get("readOnly", False))
            for each in container["volumeMounts"]
        ]

    def remove(self) -> None:
        for place in self._mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=False)
        for place in self._folders.values():
            shutil.rmtree(place, ignore_errors=True)

    def _make_empty(self, place: Path, empty: Manifest) -> None:
        if empty.get("medium") == "Memory":
            size = empty["sizeLimit"].replace("i", "").lower()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "volume", str(place)], check=True)
            self._mounted.append(place)
        os.chown(place, 0, USER)
        place.chmod(0o2777)


def _write(place: Path, values: Mapping[str, str]) -> None:
    for name, text in values.items():
        (place / name).write_text(text)
        os.chown(place / name, 0, USER)
        (place / name).chmod(0o440)
    os.chown(place, 0, USER)
    place.chmod(0o750)


def mount_points(templates: Sequence[Manifest]) -> tuple[set[str], set[str]]:
    folders: set[str] = set()
    files: set[str] = set()
    for template in templates:
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            for mount in container["volumeMounts"]:
                (files if "subPath" in mount else folders).add(mount["mountPath"])
    return folders, files
