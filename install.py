"""Install Ratchet with extras where the Python that runs this lives: ``.venv/bin/python install.py demo``.

The extras are those of pyproject.toml: ``demo`` for `ratchet demo`, ``dev`` (the default) for the tests as well.

uv does it: pip resolves, downloads and unpacks one package after another, which takes minutes. uv reads no
configuration of pip: what pip has been told of indexes, folders of wheels, constraints, certificates and time-outs is
passed on in uv's variables, unless those are set already.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

UV = "uv>=0.13,<1"
RANK = {"global": 0, "install": 1, ":env:": 2}
"""Sections of pip's configuration; a later one wins."""
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
"""pip's option: uv's variable, and what stands there between several values (pip has white space)."""


def run(*command: str, **environment: str) -> str:
    """What a command prints; one that fails ends this program."""
    done = subprocess.run([sys.executable, "-m", *command], env={**os.environ, **environment}, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")
    return done.stdout.decode()


def uv_variables(listing: str) -> dict[str, str]:
    """uv's variables for what ``pip config list`` prints: lines such as ``global.index-url='https://…'``."""
    settings: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.strip().rpartition(".")
        if section in RANK and option in VARIABLES and RANK[section] >= settings.get(option, (0, ""))[0]:
            settings[option] = RANK[section], str(ast.literal_eval(value))
    variables = {}
    for option, (_, value) in settings.items():
        name, separator = VARIABLES[option]
        variables[name] = separator.join(value.split())
    if "UV_INDEX" in variables:  # pip takes the best version of all indexes; uv's default is the first index
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return variables


def main(*extras: str) -> None:
    """Install with these extras."""
    run("pip", "install", "-q", "--disable-pip-version-check", UV)
    variables = uv_variables(run("pip", "config", "list"))
    pip_settings = {name: value for name, value in variables.items() if name not in os.environ}
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    command = [str(uv), "pip", "install", "-q", "--python", sys.executable, "-e", f".[{','.join(extras or ('dev',))}]"]
    sys.exit(subprocess.run(command, env={**os.environ, **pip_settings}).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
