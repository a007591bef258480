from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import typer

from core.loading import describe
from core.metrics import declared
from core.settings import Settings
from docs.site import __main__ as site_builder
from docs.site import cli_reference
from docs.site.__main__ import SiteError, build, collect
from ops.cli.main import app
from ratchet_client.records import REASONS
from serving.errors import ServingError
from serving.http.app import openapi
from serving.http.errors import KNOWN
from tests.support.pages import resolve


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once. Raises SiteError for a warning, such as a dead link."""
    config = collect(tmp_path_factory.mktemp("site") / "build")
    build(config)
    return config.parent / "site"


def text(site: Path, page: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", (site / page).read_text()))


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    config = collect(tmp_path / "build")
    (config.parent / "docs" / "events.md").write_text("# Events\n\n[nothing](operator.md#no-such-heading)\n")
    with pytest.raises(SiteError, match="anchor does not exist"):
        build(config)


def test_a_page_that_the_navigation_does_not_name_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(site_builder.MADE, "reference/more.md", lambda: "# More")
    with pytest.raises(SiteError, match=r"reference/more\.md"):
        collect(tmp_path / "build")


def test_a_browser_fetches_nothing_from_elsewhere(site: Path) -> None:
    source = r"<(?:script|img|iframe|source)[^>]* src=\"?(?:https?:)?//[^\">]+"
    link = r"<link(?=[^>]* rel=\"?(?:stylesheet|preconnect|icon))[^>]* href=\"?(?:https?:)?//[^>]+"
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    assert {page.name: found for page in pages if (found := re.findall(f"{source}|{link}", page.read_text()))} == {}


def test_code_stays_code(site: Path) -> None:
    """A block that the site takes for a paragraph has its commands in running text."""
    for page in site.rglob("*.html"):
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text(), flags=re.S)
        assert not re.findall(r"<(?:p|li)>\s*(?:ratchet|kubectl|curl|kcat) .*", prose), page
        assert "```" not in prose, page


def test_the_settings_page_has_every_setting_with_its_meaning(site: Path) -> None:
    page = text(site, "reference/settings.html")
    for name, _, _, meaning in describe(Settings()):
        assert name in page, name
        assert f"RATCHET_{name.upper().replace('.', '__')}" in page, name
        assert meaning, name


def test_the_command_line_page_has_every_command(site: Path) -> None:
    page = text(site, "reference/cli.html")

    def paths(command: object, path: str) -> list[str]:
        children = getattr(command, "commands", {})
        return [path, *(each for name, child in children.items() for each in paths(child, f"{path} {name}"))]

    commands = paths(typer.main.get_command(app), "ratchet")
    assert len(commands) > 40
    assert [command for command in commands if command not in page] == []


def test_the_api_page_has_every_call(site: Path) -> None:
    page = text(site, "reference/api.html")
    calls = [f"{method.upper()} {path}" for path, item in openapi()["paths"].items() for method in item]
    assert [call for call in calls if call not in page] == []


def test_the_pages_of_errors_and_metrics_have_every_one(site: Path) -> None:
    errors = text(site, "reference/errors.html")
    codes = {kind.code for kind in ServingError.__subclasses__()} | {code for _, code, _ in KNOWN.values()}
    assert [name for name in (*codes, *REASONS, "LedgerUnavailable") if name not in errors] == []
    metrics = text(site, "reference/metrics.html")
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in declared.names()}
    assert [name for name in names if name not in metrics] == []


def test_each_example_on_the_command_line_page_is_a_command(tmp_path: Path) -> None:
    page = cli_reference.page()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(lines) > 50
    for line in lines:
        here = line.replace("/var/run/ratchet-metrics", str(tmp_path))  # a folder that must exist
        resolve(re.split(r"\s[|>]", here)[0])
