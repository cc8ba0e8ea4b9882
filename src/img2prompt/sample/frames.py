"""Frames: each function maps a finished RGB image to a framed one of the same size."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from img2prompt.sample.media import coordinates, gold, grain, luminance, saturated, sepia, to_image, toned
from img2prompt.sample.scenery import graded
from img2prompt.sample.sprites import Rgb, artwork, paste

Frame = Callable[[Image.Image, Random], Image.Image]


def _inset(image: Image.Image, ground: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The image scaled into a box (left, top, right, bottom as shares of the side) of `ground`."""
    left, top, right, bottom = (round(share * ground.width) for share in box)
    ground.paste(image.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    return ground


def _sheet(image: Image.Image, colour: Rgb) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    ground = Image.new("RGB", image.size, colour)
    return ground, ImageDraw.Draw(ground), image.width


def _masked(image: Image.Image, colour: Rgb, *ellipses: tuple[float, float, float, float]) -> Image.Image:
    """The image inside ellipses, `colour` outside of them."""
    mask = Image.new("L", image.size)
    for box in ellipses:
        ImageDraw.Draw(mask).ellipse([share * image.width for share in box], fill=255)
    return Image.composite(image, Image.new("RGB", image.size, colour), mask)


def _lettered(draw: ImageDraw.ImageDraw, text: str, y: float, size: int, colour: Rgb) -> None:
    draw.text((size / 2, y * size), text, fill=colour, font=ImageFont.load_default(size * 0.13), anchor="mm")


def _stamp(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (250, 250, 246))
    for step in range(13):
        for x, y in ((step / 12, 0), (step / 12, 1), (0, step / 12), (1, step / 12)):
            r = 0.028
            draw.ellipse([size * v for v in (x - r, y - r, x + r, y + r)], fill=(60, 64, 72))
    return _inset(image, ground, (0.1, 0.1, 0.9, 0.9))


def _polaroid(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (92, 78, 66))
    draw.rectangle([size * v for v in (0.08, 0.03, 0.92, 0.98)], fill=(252, 251, 247))
    return _inset(graded(image, (255, 240, 200), (255, 236, 190), 0.12), ground, (0.14, 0.09, 0.86, 0.8))


def _card(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (36, 22, 62))
    draw.rounded_rectangle([size * v for v in (0.13, 0.01, 0.87, 0.99)], size * 0.06, fill=(232, 204, 120))
    draw.rectangle([size * v for v in (0.17, 0.05, 0.83, 0.95)], outline=(120, 70, 20), width=max(size // 64, 1))
    for glyph, y in (("☀", 0.13), ("🌙", 0.89)):
        paste(ground, artwork(glyph), (0.5, y, 0.13))
    return _inset(image, ground, (0.2, 0.21, 0.8, 0.81))


def _painting(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (150, 44, 44))
    for step, colour in enumerate(((120, 78, 16), (226, 178, 60), (250, 216, 110), (150, 100, 24))):
        inner = 0.05 + 0.025 * step
        draw.rectangle([size * v for v in (inner, inner, 1 - inner, 1 - inner)], fill=colour)
    return _inset(image, ground, (0.16, 0.16, 0.84, 0.84))


def _porthole(image: Image.Image, rng: Random) -> Image.Image:
    framed = _masked(image, (74, 92, 108), (0.08, 0.08, 0.92, 0.92))
    draw, size = ImageDraw.Draw(framed), image.width
    draw.ellipse([size * v for v in (0.04, 0.04, 0.96, 0.96)], outline=(196, 154, 76), width=size // 16)
    for turn in range(8):
        x, y = 0.5 + 0.43 * math.cos(turn * math.tau / 8), 0.5 + 0.43 * math.sin(turn * math.tau / 8)
        draw.ellipse([size * v for v in (x - 0.015, y - 0.015, x + 0.015, y + 0.015)], fill=(84, 58, 18))
    return framed


def _keyhole(image: Image.Image, rng: Random) -> Image.Image:
    mask = Image.new("L", image.size)
    draw, size = ImageDraw.Draw(mask), image.width
    draw.ellipse([size * v for v in (0.16, 0.04, 0.84, 0.72)], fill=255)
    draw.polygon([(size * x, size * y) for x, y in ((0.36, 0.6), (0.64, 0.6), (0.8, 0.98), (0.2, 0.98))], fill=255)
    return Image.composite(image, Image.new("RGB", image.size, (48, 30, 18)), mask)


def _tv(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (204, 190, 160))
    draw.rounded_rectangle([size * v for v in (0.03, 0.08, 0.97, 0.94)], size * 0.08, fill=(104, 66, 38))
    draw.line([size * 0.3, 0, size * 0.5, size * 0.1, size * 0.74, 0], fill=(60, 60, 64), width=max(size // 50, 1))
    for y in (0.28, 0.46):
        draw.ellipse([size * v for v in (0.83, y, 0.93, y + 0.1)], fill=(226, 206, 160))
    lines = Image.fromarray((np.asarray(image) * np.where(coordinates(size)[0] % 3 < 1, 0.7, 1)).astype(np.uint8))
    return _inset(lines, ground, (0.09, 0.15, 0.79, 0.87))


def _phone(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (226, 228, 234))
    draw.rounded_rectangle([size * v for v in (0.14, 0.0, 0.86, 1.0)], size * 0.09, fill=(22, 22, 26))
    draw.ellipse([size * v for v in (0.46, 0.91, 0.54, 0.99)], outline=(150, 150, 156), width=max(size // 80, 1))
    return _inset(image, ground, (0.18, 0.09, 0.82, 0.89))


def _film(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (18, 16, 16))
    for step in range(9):
        for y in (0.03, 0.91):
            draw.rectangle([size * v for v in (step / 9 + 0.03, y, step / 9 + 0.08, y + 0.06)], fill=(236, 232, 222))
    return _inset(image, ground, (0.1, 0.12, 0.9, 0.88))


def _sticker(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (128, 138, 150))
    draw.rounded_rectangle([size * v for v in (0.06, 0.06, 0.94, 0.94)], size * 0.2, fill=(255, 255, 255))
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rounded_rectangle([size * v for v in (0.11, 0.11, 0.89, 0.89)], size * 0.16, fill=255)
    framed = Image.composite(image, ground, mask)
    curl = [(size * x, size * y) for x, y in ((0.94, 0.7), (0.7, 0.94), (0.7, 0.72))]
    ImageDraw.Draw(framed).polygon(curl, fill=(226, 228, 232))
    return framed


def _coin(image: Image.Image, rng: Random) -> Image.Image:
    metal = to_image(gold(np.asarray(image, np.float32), rng)).filter(ImageFilter.SHARPEN)
    framed = _masked(metal, (40, 44, 52), (0.06, 0.06, 0.94, 0.94))
    draw, size = ImageDraw.Draw(framed), image.width
    draw.ellipse([size * v for v in (0.04, 0.04, 0.96, 0.96)], outline=(214, 160, 40), width=size // 22)
    return framed


def _badge(image: Image.Image, rng: Random) -> Image.Image:
    framed = _masked(image, (248, 248, 248), (0.08, 0.08, 0.92, 0.92))
    draw, size = ImageDraw.Draw(framed), image.width
    draw.ellipse([size * v for v in (0.02, 0.02, 0.98, 0.98)], outline=(24, 60, 130), width=size // 16)
    return framed


def _wall(image: Image.Image, rng: Random) -> Image.Image:
    pixels, (y, x) = np.asarray(saturated(np.asarray(image, np.float32), 1.5)), coordinates(image.width)
    joint = (y % 10 < 1.2) | ((x + 10 * (y // 10 % 2)) % 20 < 1.2)
    brick = np.where(joint, np.array([206, 196, 186]), np.array([164, 76, 56]) + 30 * (grain(len(pixels), 40) - 0.5))
    paper = (luminance(pixels) > 215) & (np.ptp(pixels, axis=2, keepdims=True) < 40)
    return to_image(np.where(paper, brick, np.where(joint, 0.75, 1) * (0.82 * pixels + 0.18 * brick)))


def _window(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (216, 200, 176))
    draw.rectangle([size * v for v in (0.07, 0.05, 0.93, 0.9)], fill=(248, 246, 240), outline=(128, 112, 92))
    framed = _inset(image, ground, (0.12, 0.1, 0.88, 0.85))
    draw.rectangle([size * v for v in (0.485, 0.08, 0.515, 0.87)], fill=(248, 246, 240), outline=(128, 112, 92))
    draw.rectangle([size * v for v in (0.02, 0.88, 0.98, 0.95)], fill=(236, 228, 214), outline=(128, 112, 92))
    for x in (0.0, 0.86):
        draw.rectangle([size * v for v in (x, 0, x + 0.14, 0.96)], fill=(176, 60, 68))
    return framed


def _comic(image: Image.Image, rng: Random) -> Image.Image:
    ground, _, size = _sheet(image, (255, 255, 255))
    middle = image.crop([round(size * v) for v in (0.2, 0.2, 0.8, 0.8)])
    panels = (image, middle, ImageOps.mirror(image), image)
    for i, panel in enumerate(panels):
        left, top = 0.02 + 0.49 * (i % 2), 0.02 + 0.49 * (i // 2)
        ground = _inset(ImageOps.expand(panel, size // 24, (0, 0, 0)), ground, (left, top, left + 0.47, top + 0.47))
    return ground


def _kaleido(image: Image.Image, rng: Random) -> Image.Image:
    size = image.width
    half = image.resize((size // 2, size), Image.Resampling.BILINEAR)
    mirrored = Image.new("RGB", image.size)
    mirrored.paste(half, (0, 0))
    mirrored.paste(ImageOps.mirror(half), (size - size // 2, 0))
    return mirrored


def _wanted(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (222, 190, 132))
    _lettered(draw, "WANTED", 0.1, size, (70, 36, 14))
    _lettered(draw, "REWARD", 0.92, size, (70, 36, 14))
    return _inset(to_image(sepia(np.asarray(image, np.float32), rng)), ground, (0.16, 0.2, 0.84, 0.84))


def _sign(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (150, 190, 220))
    draw.rectangle([size * v for v in (0.47, 0.9, 0.53, 1)], fill=(110, 110, 116))
    draw.polygon([(size * x, size * y) for x, y in ((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5))], fill=(20, 20, 20))
    draw.polygon(
        [(size * x, size * y) for x, y in ((0.5, 0.04), (0.96, 0.5), (0.5, 0.96), (0.04, 0.5))],
        fill=(255, 206, 30),
    )
    tinted = ImageChops.multiply(image, Image.new("RGB", image.size, (255, 214, 36)))
    return _inset(tinted, ground, (0.24, 0.24, 0.76, 0.76))


def _plan(image: Image.Image, rng: Random) -> Image.Image:
    old = to_image(toned((84, 48, 20), (238, 208, 150), np.asarray(image, np.float32), rng))
    draw, size = ImageDraw.Draw(old), image.width
    trail = [(rng.random(), 0.95), (0.1, 0.75), (0.3, 0.9), (0.6, 0.8), (0.9, 0.9)]
    for (x0, y0), (x1, y1) in pairwise(trail):
        for step in range(0, 10, 2):
            a, b = step / 10, (step + 1) / 10
            ends = (x0 + (x1 - x0) * a, y0 + (y1 - y0) * a, x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)
            draw.line([size * v for v in ends], fill=(160, 24, 20), width=max(size // 50, 1))
    paste(old, artwork("❌"), (0.9, 0.88, 0.14))
    paste(old, artwork("🧭"), (0.12, 0.12, 0.2))
    return old


def _globe(image: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(image, (120, 44, 52))
    draw.rounded_rectangle([size * v for v in (0.18, 0.82, 0.82, 0.99)], size * 0.04, fill=(110, 66, 30))
    _inset(image, ground, (0.12, 0.06, 0.88, 0.82))
    ball = _masked(ground, (120, 44, 52), (0.08, 0.02, 0.92, 0.87))
    base = [round(size * v) for v in (0, 0.83, 1, 1)]
    ball.paste(ground.crop(base), base[:2])
    draw = ImageDraw.Draw(ball)
    draw.ellipse([size * v for v in (0.08, 0.02, 0.92, 0.87)], outline=(226, 240, 250), width=max(size // 40, 1))
    for _ in range(26):
        x, y = rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.78)
        draw.ellipse([size * v for v in (x - 0.01, y - 0.01, x + 0.01, y + 0.01)], fill=(255, 255, 255))
    return ball


def _cover(image: Image.Image, rng: Random) -> Image.Image:
    colour = rng.choice(((150, 30, 40), (30, 60, 120), (26, 96, 70), (96, 50, 110)))
    ground, draw, size = _sheet(image, (214, 208, 198))
    draw.rectangle([size * v for v in (0.1, 0.02, 0.92, 0.98)], fill=colour)
    draw.rectangle([size * v for v in (0.1, 0.02, 0.15, 0.98)], fill=tuple(channel // 2 for channel in colour))
    for y, width in ((0.07, 0.5), (0.12, 0.34), (0.9, 0.3)):
        x = 0.535 - width / 2
        draw.rectangle([size * v for v in (x, y, x + width, y + 0.03)], fill=(250, 236, 190))
    return _inset(image, ground, (0.19, 0.19, 0.88, 0.86))


FRAMES: dict[str, Frame] = {
    "stamp": _stamp,
    "polaroid": _polaroid,
    "card": _card,
    "painting": _painting,
    "porthole": _porthole,
    "keyhole": _keyhole,
    "binoculars": lambda image, rng: _masked(image, (6, 6, 8), (0, 0.16, 0.68, 0.84), (0.32, 0.16, 1, 0.84)),
    "tv": _tv,
    "phone": _phone,
    "film": _film,
    "sticker": _sticker,
    "coin": _coin,
    "badge": _badge,
    "wall": _wall,
    "window": _window,
    "comic": _comic,
    "kaleido": _kaleido,
    "wanted": _wanted,
    "sign": _sign,
    "plan": _plan,
    "globe": _globe,
    "cover": _cover,
}
