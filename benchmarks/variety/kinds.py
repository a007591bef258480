"""Twelve kinds of generated streams: each record differs from all others of its kind, often slightly."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ratchet_client import Sample

Drawn = tuple[bytes, str]
LONG_CHARS: Final = 2000
ANSWER_CHARS: Final = 200
"""Length that fits the context of the small models."""
SCRIPTS: Final = (
    "Ein Bild von {}", "画像 {} です", "صورة رقم {}", "תמונה {}", "चित्र {}", "รูปภาพ {}", "изображение {}", "εικόνα {}",
    "사진 {}", "🚌🌳👩‍👩‍👧‍👦 {} 🏳️‍🌈", "e\u0301té no {}", "ꦒꦩ꧀ꦧꦂ {}",
)  # fmt: skip


def invoice(number: int) -> Drawn:
    drawn, page = _random(number), Image.new("L", (620, 877), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((40, 40, 250, 80), fill=60)
    draw.text((350, 50), f"INVOICE {10_000 + number}", 0, _font(28))
    for y in range(150, 150 + 30 * drawn.randint(4, 22), 30):
        draw.line((40, y + 24, 580, y + 24), fill=180)
        draw.text((45, y), drawn.choice(["Bolt M8", "Nut M8", "Labour", "Freight", "Cable 3x1.5"]), 0, _font(14))
        draw.text((500, y), f"{drawn.uniform(1, 999):.2f}", 0, _font(14))
    return _encoded(page), "an invoice"


def scan(number: int) -> Drawn:
    drawn = np.random.default_rng(number)
    y, x = np.mgrid[0:256, 0:256]
    lobes = sum(np.exp(-(((x - c - drawn.normal(0, 4)) / 45) ** 2 + ((y - 128) / 85) ** 2)) for c in (80, 176))
    return _encoded(_picture(230 - 200 * lobes + drawn.normal(0, 6, (256, 256)))), "an X-ray of a chest"


def frame(number: int) -> Drawn:
    drawn = np.random.default_rng(number)
    street = np.random.default_rng(5).integers(60, 180, (9, 16, 3)).astype(np.uint8)
    scene = Image.fromarray(street).resize((320, 180), Image.Resampling.BICUBIC)
    for _ in range(drawn.integers(0, 3)):
        x, y = int(drawn.integers(0, 290)), int(drawn.integers(70, 160))
        ImageDraw.Draw(scene).rectangle((x, y, x + 20, y + 18), tuple(drawn.integers(0, 255, 3).tolist()))
    seen = np.asarray(scene, np.float64) * drawn.normal(1, 0.03) + drawn.normal(0, 2, (180, 320, 3))
    return _encoded(_picture(seen), "JPEG"), "a street"


def screenshot(number: int) -> Drawn:
    drawn, page = _random(number), Image.new("RGB", (640, 400), (245, 245, 247))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 640, 28), fill=(40, 44, 52))
    draw.rectangle((0, 28, 140, 400), fill=(225, 228, 232))
    for row in range(drawn.randint(3, 15)):
        y = 40 + 23 * row
        draw.rectangle((150, y, 150 + drawn.randint(60, 460), y + 14), fill=drawn.choice(["#888", "#bbb", "#36c"]))
    draw.text((160, 6), f"Inbox ({number})", "white", _font(14))
    return _encoded(page), "a screenshot"


def line_drawing(number: int) -> Drawn:
    drawn, page = _random(number), Image.new("1", (300, 300), 1)
    for _ in range(drawn.randint(3, 8)):
        points = [(drawn.randint(10, 290), drawn.randint(10, 290)) for _ in range(6)]
        ImageDraw.Draw(page).line(points, fill=0, width=2)
    return _encoded(page), "a line drawing"


def panorama(number: int) -> Drawn:
    hills = np.random.default_rng(number).integers(0, 256, (2, 24, 3)).astype(np.uint8)
    return _encoded(Image.fromarray(hills).resize((1600, 100), Image.Resampling.BICUBIC), "JPEG"), "a panorama"


def extreme_size(number: int) -> Drawn:
    """1 x 1, 8 x 2,000 and 2,000 x 8."""
    drawn = np.random.default_rng(number)
    size = ((1, 1), (8, 2000), (2000, 8))[number % 3]
    pixels = drawn.integers(0, 256, (1, 1, 3) if size == (1, 1) else (4, 4, 3)).astype(np.uint8)
    return _encoded(Image.fromarray(pixels).resize(size)), f"a picture of {size[0]} by {size[1]} pixels"


def unusual_mode(number: int) -> Drawn:
    """CMYK, 16 bits a pixel, with an alpha channel, and animated."""
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8))
    picture = picture.resize((96, 96), Image.Resampling.BICUBIC)
    match number % 5:
        case 0:
            return _encoded(picture.convert("CMYK"), "JPEG"), "a printed page"
        case 1:
            deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
            return _encoded(Image.fromarray(deep)), "a scan of 16 bits"
        case 2:
            picture.putalpha(picture.convert("L"))
            return _encoded(picture), "a sticker"
        case 3:
            return _encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]), "a moving picture"
        case _:
            return _encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]), "a moving picture"


def one_colour(number: int) -> Drawn:
    colour = (number % 7 * 40, number // 7 * 5, 128)
    return _encoded(Image.new("RGB", (64, 64), colour)), "a plain picture"


def long_text(number: int) -> Drawn:
    """A text as long as ingest accepts, whose last words differ."""
    image, _ = _texture(number)
    end = f" and at its end number {number}"
    return image, ("a text that goes on and on, " * 100)[: LONG_CHARS - len(end)] + end


def other_script(number: int) -> Drawn:
    return _texture(number + 10_000)[0], SCRIPTS[number % len(SCRIPTS)].format(number)


def question(number: int) -> Drawn:
    """Squares to count; see :func:`samples`."""
    count, scene = number % 6 + 1, Image.new("RGB", (128, 96), "white")
    drawn = _random(number)
    for _ in range(count):
        x, y = drawn.randint(0, 110), drawn.randint(0, 80)
        ImageDraw.Draw(scene).rectangle((x, y, x + 12, y + 12), drawn.choice(["red", "green", "blue"]))
    return _encoded(scene), f"{count} squares"


KINDS: Final[dict[str, Callable[[int], Drawn]]] = {
    "invoices": invoice, "scans": scan, "fixed camera": frame, "screenshots": screenshot,
    "line drawings": line_drawing, "panoramas": panorama, "extreme sizes": extreme_size,
    "unusual modes": unusual_mode, "one colour": one_colour, "long texts": long_text, "other scripts": other_script,
    "questions": question,
}  # fmt: skip


def samples(kind: str, count: int) -> Iterator[Sample]:
    """Different records of a kind, each with a text, and a question with its answer, so that both models learn."""
    for number in range(count):
        image, text = KINDS[kind](number)
        asked, answer = "what is this?", text[-ANSWER_CHARS:]
        if kind == "questions":
            asked, answer = "how many squares?", str(number % 6 + 1)
        source = f"urn:bench:{kind.replace(' ', '-')}"
        yield Sample(image=image, text=text, question=asked, answer=answer, domain=kind, source=source)


def _random(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  (it draws pictures)


def _texture(number: int) -> Drawn:
    noise = np.random.default_rng(number).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return _encoded(Image.fromarray(noise).resize((80, 80), Image.Resampling.BICUBIC)), "a texture"


def _picture(values: Any) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
