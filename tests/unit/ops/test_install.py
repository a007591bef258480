"""uv installs from where pip would: what pip was told is passed on."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "install.py"))


def test_what_pip_was_told_of_an_index_wheels_and_constraints_is_passed_on(script: dict[str, Any]) -> None:
    listing = r"""
:env:.find-links='/opt/wheels'
global.cert='/etc/ssl/ca.crt'
global.constraint='/etc/a.txt /etc/b.txt'
global.find-links='/other'
global.index-url='https://one.example/simple'
install.index-url='https://mirror.example/simple'
install.extra-index-url='\nhttps://two.example/simple\nhttps://three.example/simple'
global.progress-bar='off'
list.format='json'
"""
    assert script["uv_variables"](listing) == {
        "UV_FIND_LINKS": "/opt/wheels",
        "SSL_CERT_FILE": "/etc/ssl/ca.crt",
        "UV_CONSTRAINT": "/etc/a.txt /etc/b.txt",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://two.example/simple https://three.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_where_pip_was_told_nothing_uv_is_told_nothing(script: dict[str, Any]) -> None:
    assert script["uv_variables"]("") == {}
