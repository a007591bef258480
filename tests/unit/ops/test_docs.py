"""Each command, call and link on the pages exists."""

from __future__ import annotations

import re

import pytest

from core.loading import describe
from core.settings import Settings
from tests.support.pages import PAGES, ROOT, Page, resolve

ALL = [Page(path) for path in PAGES]
BY_PATH = {page.path: page for page in ALL}
DEFAULTS = {name: value for name, value, _, _ in describe(Settings())}
SOURCE = "\n".join(
    path.read_text()
    for folder in ("client/src", "methods/src", "core", "demo", "ops", "serving", "streams", "updater", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".html")
)
CALLS = set(re.findall(r"\"(/(?:v1|admin/v1|health)/[a-z_/]+?)/?[\"{]", SOURCE))
WITH_MODEL = set(re.findall(r"\"(/[a-z0-9/]+/\{model\})\"", SOURCE))

pages = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)


@pages
def test_each_command_stands_in_a_code_block_and_exists_with_its_arguments(page: Page) -> None:
    for line in page.commands("ratchet"):
        flags = resolve(line).find_root().params["settings"] or []
        assert {flag.split("=")[0] for flag in flags} <= set(DEFAULTS), line
    assert not re.findall(r"^ *(?:ratchet|curl|kcat|prometheus|kubectl|helm|docker) .*$", page.prose, re.M)


@pages
def test_each_link_leads_to_a_file_and_a_heading_and_each_call_exists(page: Page) -> None:
    for link in page.links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        assert target.is_file(), link
        assert not anchor or anchor in BY_PATH[target].headings, link
    for path in re.findall(r"(/(?:v1|admin/v1|health)/[a-z_/]+)", page.path.read_text()):
        call = path.rstrip("/")
        assert call in CALLS or f"{call.rpartition('/')[0]}/{{model}}" in WITH_MODEL, path
