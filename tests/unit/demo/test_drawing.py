from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from demo.data import render
from demo.data.render import SIDE, Unfit, decode, draw_svg, on_canvas
from tests.support.pictures import png

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {}>{}</svg>'
SQUARE = '<rect x="40" y="40" width="20" height="20" fill="#ff0000"/>'


def svg(size: str, content: str) -> bytes:
    return SVG.format(size, content).encode()


def test_a_picture_is_centred_on_a_white_square() -> None:
    canvas = on_canvas(decode(png("red", (40, 20))))
    assert (canvas.size, canvas.mode) == ((SIDE, SIDE), "RGB")
    assert canvas.getpixel((64, 64)) == (255, 0, 0)
    assert canvas.getpixel((64, 10)) == canvas.getpixel((64, 118)) == (255, 255, 255)


def test_what_is_transparent_becomes_white_without_a_dark_rim() -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (4, 4, 12, 12))
    assert on_canvas(image).getextrema() == ((255, 255),) * 3


def test_pixel_art_keeps_its_colours() -> None:
    image = Image.new("RGBA", (17, 17), (255, 0, 0, 255))
    image.putpixel((8, 8), (0, 0, 255, 255))
    colours = {colour for _, colour in on_canvas(image, crisp=True).getcolors(99) or []}
    assert colours == {(255, 0, 0), (0, 0, 255), (255, 255, 255)}


def test_trimming_enlarges_what_is_small_on_its_paper() -> None:
    page = svg('width="100" height="100"', SQUARE)
    assert on_canvas(draw_svg(page)).getpixel((20, 20)) == (255, 255, 255)
    assert on_canvas(draw_svg(page, trim=True)).getpixel((20, 20)) == (255, 0, 0)


@pytest.mark.parametrize("reference", ["{file}", "file://{file}", "http://127.0.0.1:9/secret.png"])
def test_an_svg_does_not_look_at_this_machine(tmp_path: Path, reference: str) -> None:
    (tmp_path / "secret.png").write_bytes(png("blue", (64, 64)))
    link = reference.format(file=tmp_path / "secret.png")
    page = svg('width="64" height="64"', f'<image xlink:href="{link}" width="64" height="64"/>')
    with pytest.raises(Unfit, match="blank"):
        on_canvas(draw_svg(page))


def test_a_picture_inside_the_svg_is_drawn() -> None:
    import base64

    inside = base64.b64encode(png("blue", (64, 64))).decode()
    image = f'<image xlink:href="data:image/png;base64,{inside}" width="64" height="64"/>'
    assert on_canvas(draw_svg(svg('width="64" height="64"', image))).getpixel((64, 64)) == (0, 0, 255)


@pytest.mark.parametrize("data", [b"", b"<svg", b"not a picture", png()[:40]])
def test_a_broken_picture_is_unfit(data: bytes) -> None:
    with pytest.raises(Unfit):
        draw_svg(data)
    with pytest.raises(Unfit):
        decode(data)


def test_bounds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MAX_PIXELS", 99)
    with pytest.raises(Unfit, match="pixel limit"):
        decode(png(size=(10, 10)))
    monkeypatch.setattr(render, "MAX_SVG_BYTES", 10)
    with pytest.raises(Unfit, match="size limit"):
        draw_svg(svg("", SQUARE))
