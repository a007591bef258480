"""The demo domains, their packages and licences (NOTICE repeats the attributions)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ops.errors import ConfigError
from streams.demo import emoji
from streams.demo.domain import DomainInfo, build
from streams.demo.packages import Package
from streams.demo.render import draw_svg

_EMOJIBASE: Final = Package("npm", "emojibase-data", "17.0.0")

_ALL: Final = (
    DomainInfo(
        name="noto",
        title="Noto emoji",
        packages=(_EMOJIBASE, Package("npm", "emoji-datasource-google", "16.0.0")),
        licence="Apache-2.0",
        attribution="Noto Emoji, Google; packaged by Cal Henderson (emoji-data)",
        builder=emoji.by_code("package/img/google/64/"),
    ),
    DomainInfo(
        name="twemoji",
        title="Twemoji",
        packages=(_EMOJIBASE, Package("npm", "emoji-datasource-twitter", "16.0.0")),
        licence="CC-BY-4.0",
        attribution="Twemoji, Twitter, Inc. and other contributors; packaged by Cal Henderson (emoji-data)",
        builder=emoji.by_code("package/img/twitter/64/"),
    ),
    DomainInfo(
        name="openmoji",
        title="OpenMoji",
        packages=(_EMOJIBASE, Package("npm", "openmoji", "17.0.0")),
        licence="CC-BY-SA-4.0",
        attribution="OpenMoji, the open-source emoji and icon project (openmoji.org)",
        builder=emoji.by_code("package/color/svg/", draw_svg),
    ),
    DomainInfo(
        name="fluent3d",
        title="Fluent emoji, 3D",
        packages=(_EMOJIBASE, Package("npm", "@lobehub/fluent-emoji-3d", "1.1.0")),
        licence="MIT",
        attribution="Fluent Emoji, Microsoft Corporation; packaged by LobeHub",
        builder=emoji.by_code("package/assets/"),
    ),
    DomainInfo(
        name="fluent_mono",
        title="Fluent emoji, high contrast",
        packages=(_EMOJIBASE, Package("npm", "fluentui-emoji", "1.3.0")),
        licence="MIT",
        attribution="Fluent Emoji, Microsoft Corporation",
        builder=emoji.by_label("package/icons/high-contrast/"),
    ),
)

DOMAINS: Final[dict[str, DomainInfo]] = {info.name: info for info in _ALL}


def prepare_domain(name: str, home: Path | str) -> Path:
    """The folder dataset of domain `name` in `home`/data/`name`; downloads and draws it where it is missing.

    Takes seconds; safe to call again and from several processes. Raises `ConfigError` for a name that is not in
    `DOMAINS`, `PackageError` when a package cannot be had.
    """
    if name not in DOMAINS:
        raise ConfigError(f"there is no demo domain {name!r}.", f"Known: {', '.join(DOMAINS)}.")
    return build(DOMAINS[name], Path(home))
