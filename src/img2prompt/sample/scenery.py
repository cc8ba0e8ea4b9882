"""What is behind and in front of the subjects: places, times, weather."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from img2prompt.sample.scenes import Scene, words
from img2prompt.sample.sprites import Rgb, artwork, hues, paste, rgb, stickered, swatch_of

_PLACE_VARIANTS = 8  # a place's props stand in this many arrangements, so that backgrounds can be cached
_PAPERS: tuple[Rgb, ...] = (
    (250, 248, 242),
    (238, 240, 243),
    (244, 238, 228),
    (232, 238, 232),
    (242, 236, 240),
)


def background(scene: Scene, size: int, rng: Random) -> Image.Image:
    """The canvas (RGB, `size` x `size`) behind a scene's subjects: place, look or paper, then time and weather."""
    if scene.place:
        canvas = _place(scene.place, size, scene.seed % _PLACE_VARIANTS).copy()
    elif scene.backdrop:
        swatch = Image.fromarray(swatch_of(scene.backdrop).clip(0, 255).astype(np.uint8))
        canvas = swatch.resize((size, size), Image.Resampling.BILINEAR)
    else:
        canvas = Image.new("RGB", (size, size), rng.choice(_PAPERS))
    if scene.time:
        canvas = _TIMES[scene.time](canvas, rng)
    return _SKIES[scene.weather](canvas) if scene.weather in _SKIES else canvas


@lru_cache(maxsize=1024)
def _place(name: str, size: int, variant: int) -> Image.Image:
    top, bottom, ground, horizon, props = words().places[name].draw
    rng = Random(f"{name}/{variant}")
    level = int(horizon) * size // 100
    canvas = _gradient(size, rgb(top), rgb(bottom), level).copy()
    haze = rgb(bottom)
    if ground != "none":
        near = tuple(channel * 7 // 10 for channel in rgb(ground))
        canvas.paste(_gradient(size, rgb(ground), near, size - level).crop((0, 0, size, size - level)), (0, level))
        spots = [(0.12, 0.3), (0.88, 0.3), (0.36, 0.22), (0.66, 0.22)]
        boxes = [(x + rng.uniform(-0.05, 0.05), level / size - 0.36 * side, side) for x, side in spots]
        boxes += [(rng.choice((0.1, 0.9)) + rng.uniform(-0.03, 0.03), 0.88, 0.3)]
    else:
        boxes = [(x, y, 0.24) for x in (0.14, 0.86) for y in (0.16, 0.5, 0.84)] + [(0.5, 0.1, 0.2)]
        boxes = [(x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.06, 0.06), side) for x, y, side in boxes]
    for i, box in enumerate(boxes):
        paste(canvas, _hazy(props[i % len(props)], haze), box)
    return canvas


@lru_cache(maxsize=512)
def _hazy(glyph: str, haze: Rgb) -> Image.Image:
    """A prop's sprite, faded towards the sky's colour: it must not be taken for a subject."""
    sprite = artwork(glyph)
    faded = Image.blend(sprite.convert("RGB"), Image.new("RGB", sprite.size, haze), 0.38)
    faded.putalpha(sprite.getchannel("A"))
    return faded


@lru_cache(maxsize=256)
def _gradient(size: int, top: Rgb, bottom: Rgb, height: int) -> Image.Image:
    """A square image whose first `height` rows go from one colour to the other."""
    share = np.linspace(0, 1, max(height, 1), dtype=np.float32)[:, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])[:, None]
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))


def graded(canvas: Image.Image, top: Rgb, bottom: Rgb, share: float) -> Image.Image:
    """The canvas blended with a vertical gradient from `top` to `bottom`, which has the weight `share` in [0, 1]."""
    return Image.blend(canvas, _gradient(canvas.width, top, bottom, canvas.width), share)


def _night(canvas: Image.Image, rng: Random) -> Image.Image:
    canvas = graded(canvas.point(lambda value: value * 0.45), (8, 10, 48), (26, 24, 70), 0.6)
    for _ in range(14):
        paste(canvas, artwork("⭐"), (rng.random(), rng.uniform(0, 0.5), 0.04))
    paste(canvas, artwork("🌙"), (0.88, 0.13, 0.2))
    return canvas


def _sunset(canvas: Image.Image, rng: Random) -> Image.Image:
    canvas = graded(canvas, (120, 40, 110), (255, 140, 40), 0.62)
    x, y, r = canvas.width * rng.uniform(0.7, 0.85), canvas.width * 0.5, canvas.width * 0.16
    ImageDraw.Draw(canvas).ellipse((x - r, y - r, x + r, y + r), fill=(255, 70, 40))
    return canvas


def _dawn(canvas: Image.Image, rng: Random) -> Image.Image:
    canvas = graded(canvas, (150, 190, 250), (255, 205, 190), 0.55)
    x, r = canvas.width * rng.uniform(0.15, 0.3), canvas.width * 0.2
    ImageDraw.Draw(canvas).pieslice((x - r, r, x + r, 3 * r), 180, 360, fill=(255, 226, 90))
    return canvas


def _sunny(canvas: Image.Image) -> Image.Image:
    canvas = graded(canvas, (120, 205, 255), (255, 250, 200), 0.3)
    paste(canvas, stickered("☀"), (0.15, 0.15, 0.34))
    return canvas


def _rainbow(canvas: Image.Image) -> Image.Image:
    draw, size = ImageDraw.Draw(canvas), canvas.width
    for band in range(6):
        edge = size * (0.03 + band * 0.035)
        colour = tuple(int(channel) for channel in hues(np.float32(band / 6)))
        draw.arc((edge, edge, size - edge, 2 * size - edge), 180, 360, fill=colour, width=max(size // 24, 2))
    return canvas


_TIMES = {"night": _night, "sunset": _sunset, "dawn": _dawn}
_SKIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rain": lambda canvas: graded(canvas, (80, 92, 112), (140, 150, 166), 0.55),
    "snow": lambda canvas: graded(canvas, (196, 214, 236), (250, 252, 255), 0.6),
    "fog": lambda canvas: graded(canvas, (206, 210, 214), (226, 228, 230), 0.72),
    "storm": lambda canvas: graded(canvas, (30, 28, 54), (84, 84, 110), 0.7),
    "rainbow": _rainbow,
    "sunny": _sunny,
}


def spotlight(canvas: Image.Image) -> Image.Image:
    """The canvas in the dark, but for a cone of light from above."""
    size = canvas.width
    cone = Image.new("L", canvas.size, 60)
    draw = ImageDraw.Draw(cone)
    draw.polygon([(size * 0.44, 0), (size * 0.56, 0), (size * 0.88, size * 0.86), (size * 0.12, size * 0.86)], fill=225)
    draw.ellipse((size * 0.12, size * 0.74, size * 0.88, size * 0.98), fill=255)
    return Image.composite(graded(canvas, (255, 250, 190), (255, 250, 190), 0.5), Image.new("RGB", canvas.size), cone)


def draw_weather(canvas: Image.Image, weather: str, rng: Random) -> None:
    """Draw, in place, what falls or blows in front of the subjects."""
    draw, size = ImageDraw.Draw(canvas), canvas.width
    width = max(size // 96, 1)
    if weather in ("rain", "storm"):
        for _ in range(46):
            x, y = rng.random() * size, rng.random() * size
            draw.line((x, y, x - size * 0.03, y + size * 0.09), fill=(150, 196, 250), width=width)
    if weather == "storm":
        bolt = [(0.2, 0), (0.1, 0.24), (0.17, 0.24), (0.07, 0.5), (0.29, 0.18), (0.21, 0.18), (0.31, 0)]
        draw.polygon([(x * size, y * size) for x, y in bolt], fill=(255, 236, 80), outline=(255, 255, 255))
    if weather == "snow":
        for _ in range(60):
            x, y, r = rng.random() * size, rng.random() * size, size * rng.uniform(0.006, 0.017)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255), outline=(190, 206, 230))
    if weather == "fog":
        canvas.paste(graded(canvas, (225, 228, 230), (236, 238, 240), 0.4))
    if weather == "wind":
        for _ in range(5):
            x, y = rng.uniform(-0.1, 0.6) * size, rng.random() * size
            draw.arc((x, y, x + size * 0.5, y + size * 0.14), 200, 340, fill=(255, 255, 255), width=2 * width)
            paste(canvas, artwork("🍃"), (rng.random(), rng.random(), 0.13))
