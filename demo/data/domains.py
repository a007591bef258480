"""The demo domains, their packages and licences (NOTICE repeats the attributions)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from core.errors import ConfigError
from demo.data import clipart, emoji, pixel, small_sets
from demo.data.domain import DomainInfo, build
from demo.data.packages import Package
from demo.data.render import draw_svg

_EMOJIBASE: Final = Package("npm", "emojibase-data", "17.0.0")
_ISO_CODES: Final = Package("deb", "iso-codes")


def _pixels(name: str, title: str, folder: str) -> DomainInfo:
    return DomainInfo(
        name=name,
        packages=(Package("deb", "cataclysm-dda-data"),),
        licence="CC-BY-SA-3.0",
        attribution=f"{title} tileset and game data, Cataclysm: Dark Days Ahead contributors",
        builder=pixel.tileset(folder),
        crisp=True,
        templates=("pixel art of {}.", "a video game sprite of {}.", "a small pixel picture of {}."),
    )


def _stamps(name: str, drawings: bool, templates: tuple[str, ...]) -> DomainInfo:
    return DomainInfo(
        name=name,
        packages=(Package("deb", "tuxpaint-stamps-default"),),
        licence="GPL-2",
        attribution="Tux Paint stamps, Bill Kendrick and contributors",
        builder=small_sets.stamps(drawings),
        suffix="png" if drawings else "jpg",
        templates=templates,
    )


_ALL: Final = (
    DomainInfo(
        name="noto",
        packages=(_EMOJIBASE, Package("npm", "emoji-datasource-google", "16.0.0")),
        licence="Apache-2.0",
        attribution="Noto Emoji, Google; packaged by Cal Henderson (emoji-data)",
        builder=emoji.by_code("package/img/google/64/"),
    ),
    DomainInfo(
        name="twemoji",
        packages=(_EMOJIBASE, Package("npm", "emoji-datasource-twitter", "16.0.0")),
        licence="CC-BY-4.0",
        attribution="Twemoji, Twitter, Inc. and other contributors; packaged by Cal Henderson (emoji-data)",
        builder=emoji.by_code("package/img/twitter/64/"),
    ),
    DomainInfo(
        name="openmoji",
        packages=(_EMOJIBASE, Package("npm", "openmoji", "17.0.0")),
        licence="CC-BY-SA-4.0",
        attribution="OpenMoji, the open-source emoji and icon project (openmoji.org)",
        builder=emoji.by_code("package/color/svg/", draw_svg),
    ),
    DomainInfo(
        name="fluent3d",
        packages=(_EMOJIBASE, Package("npm", "@lobehub/fluent-emoji-3d", "1.1.0")),
        licence="MIT",
        attribution="Fluent Emoji, Microsoft Corporation; packaged by LobeHub",
        builder=emoji.by_code("package/assets/"),
    ),
    DomainInfo(
        name="fluent_mono",
        packages=(_EMOJIBASE, Package("npm", "fluentui-emoji", "1.3.0")),
        licence="MIT",
        attribution="Fluent Emoji, Microsoft Corporation",
        builder=emoji.by_label("package/icons/high-contrast/"),
    ),
    DomainInfo(
        name="game_icons",
        packages=(Package("npm", "@iconify-json/game-icons", "1.2.4"),),
        licence="CC-BY-3.0",
        attribution="Game-icons.net: Lorc, Delapouite and contributors; packaged by Iconify",
        builder=clipart.icons,
    ),
    DomainInfo(
        name="tabler",
        packages=(Package("npm", "@iconify-json/tabler", "1.2.41"),),
        licence="MIT",
        attribution="Tabler Icons, Pawel Kuna and contributors; packaged by Iconify",
        builder=clipart.icons,
    ),
    DomainInfo(
        name="logos",
        packages=(Package("npm", "@iconify-json/logos", "1.2.19"),),
        licence="CC0-1.0",
        attribution="SVG Logos, Gil Barbara; packaged by Iconify; the logos are trademarks of their owners",
        builder=clipart.icons,
    ),
    DomainInfo(
        name="openclipart",
        packages=(_ISO_CODES, Package("deb", "openclipart-svg")),
        licence="public domain",
        attribution="Open Clip Art Library and its contributors",
        builder=clipart.openclipart,
    ),
    _pixels("pixel_ultica", "Ultica", "UltimateCataclysm"),
    _pixels("pixel_mshock", "MSXotto+", "MshockXotto+"),
    _pixels("pixel_retro", "RetroDays", "RetroDaysTileset"),
    _stamps("stamp_photo", False, ("a photo of {}.", "a picture of {}, on white.")),
    _stamps("stamp_draw", True, ("a drawing of {}.", "a cartoon of {}.")),
    DomainInfo(
        name="flags",
        packages=(_ISO_CODES, Package("deb", "iso-flags-png-320x240")),
        licence="public domain",
        attribution="flags by Brett Roper, packaged by Linux Mint; names from iso-codes (LGPL-2.1+)",
        builder=small_sets.flags,
    ),
    DomainInfo(
        name="fashion",
        packages=(Package("deb", "dataset-fashion-mnist"),),
        licence="MIT",
        attribution="Fashion-MNIST, Zalando SE",
        builder=small_sets.fashion,
        templates=("a photo of {}.", "a grey product photo of {}."),
    ),
    DomainInfo(
        name="digits",
        packages=(Package("deb", "python3-sklearn"),),
        licence="CC-BY-4.0",
        attribution="E. Alpaydin and C. Kaynak, UCI Machine Learning Repository; packaged by scikit-learn",
        builder=small_sets.digits,
        crisp=True,
        templates=("the digit {}.", "a handwritten {}."),
    ),
)

DOMAINS: Final[dict[str, DomainInfo]] = {info.name: info for info in _ALL}


def prepare_domain(name: str, home: Path | str, split: str | None = None) -> Path:
    """The folder dataset of domain `name` in `home`/data/`name`, downloaded and drawn if missing (seconds). `split`
    (`train` or `test`): only that part is needed. Safe to call repeatedly and from several processes. Raises
    `ConfigError` for an unknown name, `PackageError` when a package is unavailable."""
    if name not in DOMAINS:
        raise ConfigError(f"there is no demo domain {name!r}.", f"Known: {', '.join(DOMAINS)}.")
    return build(DOMAINS[name], Path(home), split)
