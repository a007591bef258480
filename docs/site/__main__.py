"""Builds the documentation site, ``build/documentation/site``: ``make docs``, which is ``python -m docs.site``.

The pages are those of ``docs/``, some files of the repository's root, and references that are made from the code. They
are put together in ``build/documentation/docs``; Zensical makes the site of them, in strict mode, without the network.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from docs.site import api_reference, cli_reference, errors_reference, metrics_reference, settings_reference
from serving.http.app import openapi

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).parent / "site.yml"
COPIES = {
    "client/README.md": "python-client.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files that are where GitHub and package registries show them, and the pages that they become."""
HOME = {"README.md": "index.md"}
"""GitHub's front page and the site's: links to the one lead to the other, ``docs/index.md``."""
MADE = {
    "reference/api.md": api_reference.page,
    "reference/cli.md": cli_reference.page,
    "reference/settings.md": settings_reference.page,
    "reference/errors.md": errors_reference.page,
    "reference/metrics.md": metrics_reference.page,
}
OUT = ROOT / "build" / "documentation"
ASSETS = ("*.png", "*.svg", "*.css")
EXAMPLES = "examples"
"""The folder of examples is a folder of the site: its page, and the files that the page links to."""


class SiteError(Exception):
    """The pages and the navigation do not fit together."""


def collect(folder: Path) -> Path:
    """Put all pages and their configuration into a folder.

    Returns:
        The configuration.

    Raises:
        SiteError: a page is in no place of the navigation, or a name there has no page.
    """
    docs = folder / "docs"
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in ASSETS:
        for source in (ROOT / "docs").rglob(pattern):
            _write(docs / source.relative_to(ROOT / "docs"), source.read_bytes())
    for source in filter(Path.is_file, (ROOT / EXAMPLES).rglob("*")):
        _write(docs / source.relative_to(ROOT), source.read_bytes())
    for source in [*(ROOT / "docs").rglob("*.md"), *(ROOT / EXAMPLES).rglob("*.md"), *(ROOT / n for n in COPIES)]:
        name = source.relative_to(ROOT).as_posix()
        _write(docs / page_of(name), relinked(source.read_text(), name).encode())
    for page, make in MADE.items():
        _write(docs / page, make().encode())
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    pages = sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    config["nav"] = _expanded(config["nav"], pages)
    if wrong := set(pages) ^ set(_names(config["nav"])):
        raise SiteError(f"{', '.join(sorted(wrong))}: name each page once in `nav` of docs/site/site.yml.")
    path = folder / "site.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return path


def build(config: Path) -> str:
    """Make the site next to its configuration, in ``site``.

    Returns:
        What Zensical printed.

    Raises:
        SiteError: there is a warning.
    """
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SiteError(done.stdout)
    return done.stdout


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _expanded(nav: Any, pages: list[str]) -> Any:
    """A navigation with the pages that a pattern stands for (``runbooks/Ratchet*.md``) in its place."""
    if isinstance(nav, dict):
        return {title: _expanded(child, pages) for title, child in nav.items()}
    if isinstance(nav, list):
        items = [_expanded(item, pages) for item in nav]
        return [each for item in items for each in (item if isinstance(item, list) else [item])]
    return [page for page in pages if fnmatch(page, nav)] if "*" in nav else nav


def _names(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for child in nav.values() if isinstance(nav, dict) else nav:
            yield from _names(child)


def page_of(name: str) -> str:
    """Where the site has a file of the repository: what lies in ``docs/`` is at its top."""
    return (COPIES | HOME).get(name, name.removeprefix("docs/"))


def relinked(text: str, name: str) -> str:
    """The text of the file ``name`` of the repository, with its links to other files as they are on the site."""
    folder, page_folder = posixpath.dirname(name), posixpath.dirname(page_of(name))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        return f"]({posixpath.relpath(page_of(target), page_folder or '.')}{match[2]}"

    return re.sub(r"\]\((?![a-z]+:|#|/)([^)#\s]+)([#)])", link, text)


def main() -> None:
    """Write ``docs/openapi.json`` and the site."""
    api_reference.FILE.write_text(json.dumps(openapi(), indent=1, ensure_ascii=False) + "\n")
    try:
        build(collect(OUT))
    except SiteError as error:
        sys.exit(str(error))
    print(OUT / "site" / "index.html")


if __name__ == "__main__":
    main()
