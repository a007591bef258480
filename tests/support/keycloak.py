"""Keycloak on this machine, from Maven Central (159 MB, unpacked and built once), with its data in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import httpx

from core.addresses import free_port
from core.child_process import reaped, stop_reaped
from tests.support.downloads import NotHere, answers, from_maven, launched

VERSION: Final = "26.4.7"
UNPACK: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:unpack"
"""Older versions, which Maven 3.8 uses by default, truncate long file names."""
BUILD_SECONDS: Final = 600.0
START_SECONDS: Final = 300.0
CALL_SECONDS: Final = 60.0
ADMIN: Final = "admin"
JAVA: Final = {"JAVA_OPTS": "-Xms128m -Xmx768m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
"""Tests are over before the better compiler pays off."""


class Keycloak:
    """An identity provider. A context manager. It is called ``localhost``: to a browser a different site than a console
    at 127.0.0.1. Raises NotHere on construction, when Java or Maven is missing, or Maven cannot download it.
    """

    def __init__(self) -> None:
        made = from_maven(
            f"keycloak-{VERSION}", f"unpacked/keycloak-{VERSION}", UNPACK,
            f"-Dartifact=org.keycloak:keycloak-quarkus-dist:{VERSION}:tar.gz", "-DoutputDirectory=unpacked",
            prepare=_build,
        )  # fmt: skip
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        self.root = Path(tempfile.mkdtemp(prefix="ratchet-keycloak-"))
        self.log = self.root / "server.log"
        self._home = self.root / "home"
        shutil.copytree(made, self._home, ignore=shutil.ignore_patterns("lib"))
        (self._home / "lib").symlink_to(made / "lib")  # read only, and nearly all of it
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Keycloak:
        """Start it and wait until it answers. It ends with this process, however that ends."""
        command = [
            "bash", str(self._home / "bin" / "kc.sh"), "start", "--optimized", "--http-enabled=true",
            "--http-host=127.0.0.1", f"--http-port={self.port}", "--hostname-strict=false", "--cache=local",
        ]  # fmt: skip
        environ = {**os.environ, **JAVA, "KC_BOOTSTRAP_ADMIN_USERNAME": ADMIN, "KC_BOOTSTRAP_ADMIN_PASSWORD": ADMIN}
        page = f"{self.issuer('master')}/.well-known/openid-configuration"
        self._process = launched(reaped(command), self.log, lambda: answers(page), START_SECONDS, env=environ)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            stop_reaped(self._process)
        shutil.rmtree(self.root)

    def issuer(self, realm: str) -> str:
        return f"{self.url}/realms/{realm}"

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """Call the admin REST API below ``/admin/realms``. Raises ``HTTPStatusError``."""
        grant = {"grant_type": "password", "client_id": "admin-cli", "username": ADMIN, "password": ADMIN}
        with httpx.Client(trust_env=False, timeout=CALL_SECONDS) as http:
            given = http.post(f"{self.issuer('master')}/protocol/openid-connect/token", data=grant).raise_for_status()
            bearer = {"authorization": f"Bearer {given.json()['access_token']}"}
            answer = http.request(method, f"{self.url}/admin/realms{path}", json=body, headers=bearer)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None


def _build(home: Path) -> None:
    """Do once what ``start-dev`` does at each start (half a minute or more)."""
    command = ["bash", str(home / "bin" / "kc.sh"), "build", "--db=dev-mem"]
    environ = {**os.environ, **JAVA}
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, env=environ)
    if done.returncode != 0:
        raise NotHere(f"Keycloak {VERSION} could not be built: {done.stdout[-1000:]}{done.stderr[-1000:]}")
