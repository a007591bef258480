"""Each command, setting, default, code, call and link on the pages exists."""

from __future__ import annotations

import ast
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.loading import describe, load_settings
from core.settings import Settings
from tests.support.pages import PAGES, ROOT, Page, resolve

ALL = [Page(path) for path in PAGES]
BY_PATH = {page.path: page for page in ALL}
DEFAULTS = {name: value for name, value, _, _ in describe(Settings())}
SECTIONS = {name.split(".")[0] for name in DEFAULTS if "." in name}
VALUES: dict[str, Any] = yaml.safe_load((ROOT / "helm" / "ratchet" / "values.yaml").read_text())
SOURCE = "\n".join(
    path.read_text()
    for folder in ("client/src", "methods/src", "core", "demo", "ops", "serving", "streams", "updater", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".html")
)
WORDS = set(re.findall(r"\w+", SOURCE))
CALLS = set(re.findall(r"\"(/(?:v1|admin/v1|health)/[a-z_/]+?)/?[\"{]", SOURCE))
WITH_MODEL = set(re.findall(r"\"(/[a-z0-9/]+/\{model\})\"", SOURCE))
OF_OTHERS = {"load_inplace"}
"""Words with an underscore that belong to other programs."""

pages = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)


def is_value(name: str) -> bool:
    """Whether the chart has a value of this name; keys below an empty mapping are free."""
    node: Any = VALUES
    for part in name.split("."):
        if not isinstance(node, dict) or (node and part not in node and part != "*"):
            return False
        node = node.get(part, {})
    return True


@pages
def test_each_command_exists_with_its_arguments(page: Page) -> None:
    for line in page.commands("ratchet"):
        context = resolve(line)
        flags = context.find_root().params["settings"] or []
        assert {flag.split("=")[0] for flag in flags} <= set(DEFAULTS), line


def test_tables_of_settings_are_found() -> None:
    (page,) = [page for page in ALL if page.name == "docs/operator.md"]
    assert page.prose.count("| setting | default | |") > 3


def test_commands_are_found_in_blocks_in_lists_in_prose_and_inside_of_others() -> None:
    found = {line for page in ALL for line in page.commands("ratchet")}
    assert len(found) > 60
    assert {
        "ratchet status --watch",
        "ratchet keys create ann --scope infer --scope operate",
        "ratchet --set serve.vlm_batch=32 serve",
        "ratchet up",
    } <= found


@pages
def test_a_command_stands_in_a_code_block(page: Page) -> None:
    assert not re.findall(r"^ *(?:ratchet|curl|kcat|prometheus|kubectl|helm|docker) .*$", page.prose, re.M)


@pages
def test_each_setting_exists(page: Page) -> None:
    for span in page.spans:
        name = span.split("=")[0].removeprefix("settings.")
        if not re.fullmatch(r"[a-z]+(\.[A-Za-z_*]+)+", name) or name.split(".")[0] not in SECTIONS | set(VALUES):
            continue
        assert any(fnmatch(each, name) for each in DEFAULTS) or is_value(name), span


@pages
def test_each_default_in_a_table_is_that_of_the_setting(page: Page) -> None:
    for table in re.findall(r"^\| setting \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.prose, re.M):
        for row in table.splitlines():
            names, told = row.split("|")[1:3]
            values = [DEFAULTS[name] for name in re.findall(r"`([a-z_.]+)`", names)]
            if isinstance(values[0], list):
                assert (told.strip(), values) == ("none", [[]] * len(values)), row
            else:
                shown = [each.strip("` ") for each in told.split(",")]
                assert [type(value)(text) for text, value in zip(shown, values, strict=True)] == values, row


@pages
def test_each_setting_of_a_yaml_block_is_accepted(page: Page, tmp_path: Path) -> None:
    for block in page.blocks:
        told = yaml.safe_load(block.text) if block.language == "yaml" else None
        if isinstance(told, dict) and set(told) <= set(Settings.model_fields):
            file = tmp_path / "ratchet.yaml"
            file.write_text(block.text)
            load_settings(file, environ={})


@pages
def test_each_link_leads_to_a_file_and_a_heading(page: Page) -> None:
    for link in page.links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        assert target.is_file(), link
        assert not anchor or anchor in BY_PATH[target].headings, link


@pages
def test_each_call_exists(page: Page) -> None:
    for path in re.findall(r"(/(?:v1|admin/v1|health)/[a-z_/]+)", page.path.read_text()):
        call = path.rstrip("/")
        assert call in CALLS or f"{call.rpartition('/')[0]}/{{model}}" in WITH_MODEL, path


@pages
def test_each_name_in_code_is_in_the_source(page: Page) -> None:
    for span in page.spans:
        if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", span) and span not in OF_OTHERS:
            reasons = {span, span.replace("image_url_", "uri_", 1)}  # the client's names of the records' uri_... codes
            assert reasons & WORDS or any(word.startswith(f"{span}_") for word in WORDS), span


@pages
def test_python_and_json_are_well_formed(page: Page) -> None:
    for block in page.blocks:
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            json.loads(block.text)
