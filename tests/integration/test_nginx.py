"""The console behind a real nginx, set up as docs/operator.md says: TLS that ends there, a path, and large pictures."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from ops.addresses import free_port
from ops.console.app import build_console
from ops.settings import Settings
from tests.unit.console.test_behind_a_proxy import Links

BINARY = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
OPERATOR = Path(__file__).parents[2] / "docs" / "operator.md"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BINARY is None, reason="needs nginx: apt-get install nginx-light"),
]


def documented(port: int) -> str:
    """The locations of the documentation's example, with another port of the console."""
    examples = re.findall(r"```nginx\n(.*?)```", OPERATOR.read_text(), re.DOTALL)
    (console,) = (str(each) for each in examples if ":8001" in each)
    return console.replace("127.0.0.1:8001", f"127.0.0.1:{port}")


@pytest.fixture(params=["loopback", "world"])
def console(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Settings, int]]:
    port = free_port()
    settings = Settings.model_validate(
        {
            "home": tmp_path,
            "base": {"vlm": ""},
            "serve": {"port": 1},
            "console": {"host": "127.0.0.1" if request.param == "loopback" else "0.0.0.0", "path_prefix": "/ratchet"},
        }
    )
    server = uvicorn.Server(uvicorn.Config(build_console(settings), "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield settings, port
    server.should_exit = True
    thread.join()


@pytest.fixture
def nginx(console: tuple[Settings, int], tmp_path: Path) -> Iterator[str]:
    """Its URL. It connects from an address that is not 127.0.0.1, as one on another machine does."""
    assert BINARY
    port, key, certificate = free_port(), tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True,
    )  # fmt: skip
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr;\nevents {{}}\nhttp {{\n"
        f"access_log off; client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;\n"
        f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};\n"
        f"proxy_bind 127.0.0.9;\n{documented(console[1])}\n}}\n}}\n"
    )
    process = subprocess.Popen([BINARY, "-c", str(config)], stderr=subprocess.DEVNULL)
    url = f"https://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                httpx.get(f"{url}/ratchet/health/live", verify=False, trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None
                threading.Event().wait(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_a_visitor_signs_in_and_uses_it(console: tuple[Settings, int], nginx: str) -> None:
    key = console[0].operator_key().get_secret_value()
    with httpx.Client(base_url=nginx, verify=False, trust_env=False) as client:
        assert client.get("/ratchet/audit").headers["location"] == "/ratchet/sign-in?next=%2Faudit"
        form = client.get("/ratchet/sign-in").text
        assert "not encrypted" not in form
        token = re.findall(r'"x-csrf-token": "([^"]+)"', form)[0]
        answer = client.post("/ratchet/sign-in", data={"key": key, "csrf": token, "next": "/audit"})
        assert answer.status_code == 303 and "Secure" in answer.headers["set-cookie"]
        page = client.get(answer.headers["location"])
        assert page.status_code == 200
        for link in {each for each in Links(page.text).found if "/static/" in each}:
            assert client.get(link).status_code == 200, link
        token = re.findall(r'"x-csrf-token": "([^"]+)"', page.text)[0]
        picture = {"picture": ("big.png", bytes(5 << 20), "image/png")}
        assert client.post("/ratchet/playground/similar", data={"csrf": token}, files=picture).status_code != 413
