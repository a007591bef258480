"""Each command, setting, default, code, call and link on the pages exists, and the reference of the site has all."""

from __future__ import annotations

import ast
import json
import re
from fnmatch import fnmatch
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from core.loading import describe, load_settings
from core.metrics import declared
from core.settings import Settings
from docs.site import cli_reference, pictures
from docs.site.__main__ import build, collect
from ops.cli.main import app
from ratchet_client.records import REASONS
from serving.errors import ServingError
from serving.http.app import openapi
from serving.http.errors import KNOWN
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
def test_each_command_stands_in_a_code_block_and_exists_with_its_arguments(page: Page) -> None:
    for line in page.commands("ratchet"):
        flags = resolve(line).find_root().params["settings"] or []
        assert {flag.split("=")[0] for flag in flags} <= set(DEFAULTS), line
    assert not re.findall(r"^ *(?:ratchet|curl|kcat|prometheus|kubectl|helm|docker) .*$", page.prose, re.M)


@pages
def test_each_name_of_a_setting_and_each_name_in_code_exists(page: Page) -> None:
    for span in page.spans:
        name = span.split("=")[0].removeprefix("settings.")
        if re.fullmatch(r"[a-z]+(\.[A-Za-z_*]+)+", name) and name.split(".")[0] in SECTIONS | set(VALUES):
            assert any(fnmatch(each, name) for each in DEFAULTS) or is_value(name), span
        if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", span) and span not in OF_OTHERS:
            reasons = {span, span.replace("image_url_", "uri_", 1)}  # the client's names of the records' uri_... codes
            assert reasons & WORDS or any(word.startswith(f"{span}_") for word in WORDS), span


@pages
def test_each_default_in_a_table_is_that_of_the_setting(page: Page) -> None:
    for table in re.findall(r"^\| setting \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.prose, re.M):
        for row in table.splitlines():
            names, told = row.split("|")[1:3]
            values = [DEFAULTS[name] for name in re.findall(r"`([a-z_.]+)`", names)]
            if isinstance(values[0], list):
                assert {told.strip("` ")} == {f"[{', '.join(value)}]" if value else "none" for value in values}, row
            else:
                shown = [each.strip("` ") for each in told.split(",")]
                assert [type(value)(text) for text, value in zip(shown, values, strict=True)] == values, row


@pages
def test_each_block_is_well_formed_and_its_settings_are_accepted(page: Page, tmp_path: Path) -> None:
    for block in page.blocks:
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            json.loads(block.text)
        told = yaml.safe_load(block.text) if block.language == "yaml" else None
        if isinstance(told, dict) and set(told) <= set(Settings.model_fields):
            file = tmp_path / "ratchet.yaml"
            file.write_text(block.text)
            load_settings(file, environ={})


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


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_each_picture_is_the_one_that_the_script_draws(name: str) -> None:
    """``python -m docs.site.pictures`` writes them."""
    assert (pictures.FOLDER / f"{name}.svg").read_text() == pictures.PICTURES[name]()


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once. Raises SiteError for a warning, such as a dead link."""
    config = collect(tmp_path_factory.mktemp("site") / "build")
    build(config)
    return config.parent / "site"


def commands(command: object, path: str = "ratchet") -> list[str]:
    children = getattr(command, "commands", {})
    return [path, *(each for name, child in children.items() for each in commands(child, f"{path} {name}"))]


def test_the_site_fetches_nothing_from_elsewhere_and_code_stays_code(site: Path) -> None:
    """A block or a table that the site takes for a paragraph has its commands or bars in running text."""
    source = r"<(?:script|img|iframe|source)[^>]* src=\"?(?:https?:)?//[^\">]+"
    link = r"<link(?=[^>]* rel=\"?(?:stylesheet|preconnect|icon))[^>]* href=\"?(?:https?:)?//[^>]+"
    made = list(site.rglob("*.html"))
    assert len(made) > 40
    for page in made:
        text = page.read_text()
        assert re.findall(f"{source}|{link}", text) == [], page
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.S)
        assert not re.findall(r"<(?:p|li)>\s*(?:ratchet |kubectl |curl |kcat |\|).*", prose) and "```" not in prose, (
            page
        )


def test_the_reference_has_every_setting_command_call_error_and_metric(site: Path, tmp_path: Path) -> None:
    settings = list(describe(Settings()))
    assert all(meaning for _, _, _, meaning in settings)
    calls = [f"{method.upper()} {path}" for path, item in openapi()["paths"].items() for method in item]
    codes = {kind.code for kind in ServingError.__subclasses__()} | {code for _, code, _ in KNOWN.values()}
    expected = {
        "settings": {each for name, *_ in settings for each in (name, f"RATCHET_{name.upper().replace('.', '__')}")},
        "cli": set(commands(typer.main.get_command(app))),
        "api": set(calls),
        "errors": {*codes, *REASONS, "LedgerUnavailable"},
        "metrics": {re.sub(r"_(bucket|sum|count)$", "", name) for name in declared.names()},
    }
    assert len(expected["cli"]) > 40
    for name, words in expected.items():
        text = unescape(re.sub(r"<[^>]+>", "", (site / "reference" / f"{name}.html").read_text()))
        assert [word for word in words if word not in text] == [], name
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", cli_reference.page(), re.S) for line in block.splitlines()
    ]
    assert len(lines) > 50 and len({line for page in ALL for line in page.commands("ratchet")}) > 60
    for line in lines:
        here = line.replace("/var/run/ratchet-metrics", str(tmp_path))  # a folder that must exist
        resolve(re.split(r"\s[|>]", here)[0])
