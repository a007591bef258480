from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from core.addresses import free_port, listens
from tests.support.downloads import installed, running

BINARY: Final = installed("nginx")
OPERATOR: Final = Path(__file__).parents[2] / "docs" / "operator"
START_SECONDS: Final = 20.0


@contextmanager
def nginx(folder: Path, server: str, *, port: int = 0, tls: bool = False) -> Iterator[str]:
    """Run a real nginx on loopback until the end of the block, at a free port unless one is named. Yields its URL.
    ``server``: directives of its only server, such as its locations. ``tls``: with an untrusted certificate.
    """
    assert BINARY
    port, key, certificate = port or free_port(), folder / "key.pem", folder / "certificate.pem"
    if tls:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
             "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True,
        )  # fmt: skip
        server = f"ssl_certificate {certificate}; ssl_certificate_key {key};\n{server}"
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/nginx.log;\nevents {{}}\nhttp {{\n"
        f"access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f"server {{ listen 127.0.0.1:{port}{' ssl' if tls else ''};\n{server}\n}}\n}}\n"
    )
    with running(
        [BINARY, "-c", str(config)], folder / "nginx.log", lambda: listens(f"127.0.0.1:{port}"), START_SECONDS
    ):
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"


def documented(port: str, real: int) -> str:
    """The example in docs/operator whose upstream is at ``port`` (as in ``:8001``), with the real port."""
    pages = "\n".join(page.read_text() for page in sorted(OPERATOR.glob("*.md")))
    (found,) = (each for each in re.findall(r"```nginx\n(.*?)```", pages, re.DOTALL) if port in each)
    return str(found).replace(f"127.0.0.1{port}", f"127.0.0.1:{real}")
