"""Draws a `Scene` from OpenMoji artwork: background, subjects, weather, medium, frame."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from img2prompt.sample.frames import FRAMES
from img2prompt.sample.media import MEDIA, to_image
from img2prompt.sample.scenery import background, draw_weather, graded, spotlight
from img2prompt.sample.scenes import Scene, Thing, words
from img2prompt.sample.sprites import BASE, Box, artwork, dressed, paste, shadow_of, stickered, with_halo


def render(scene: Scene, size: int = 128) -> Image.Image:
    """The image of a scene: RGB, `size` x `size` pixels. The same scene gives the same pixels."""
    rng = Random(scene.seed)
    canvas = background(scene, size, rng)
    if scene.act == "spotlight":
        canvas = spotlight(canvas)
    shadows = scene.medium == "silhouette"
    if shadows:  # a shadow shows on a bright ground only
        canvas = graded(canvas, (255, 255, 255), (255, 255, 255), 0.6)
    for sprite, box in _staged(scene, rng):
        paste(canvas, shadow_of(sprite, (0, 0, 0)) if shadows and sprite.width == BASE else sprite, box)
    if scene.weather:
        draw_weather(canvas, scene.weather, rng)
    if scene.medium:
        canvas = to_image(MEDIA[scene.medium](np.asarray(canvas, np.float32), rng))
    return FRAMES[scene.frame](canvas, rng) if scene.frame else canvas


def jpeg(scene: Scene, size: int = 128, quality: int = 90) -> bytes:
    """The image of a scene as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    render(scene, size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# The boxes of a relation's two subjects, and the order in which they are drawn: "ba" puts the first one in front.
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
# A glyph that shows the relation between the two subjects.
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
# The box of the subject and the boxes of an act's glyphs; those of some layouts are drawn before the subject.
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
        third = [(dressed(thing), moved(_THIRD)) for thing in others[1:]]
        return _pair(scene.relation, first, others[0], moved) + third
    sprite = dressed(first)
    if scene.act:
        layout, glyphs = words().acts[scene.act].draw
        box, spots = _ACTS[layout]
        extras = [(stickered(glyphs[i % len(glyphs)]), moved(spot)) for i, spot in enumerate(spots)]
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
    sprite, second = dressed(first), dressed(other)
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
            return [(_made(artwork(first.glyph), second), moved((0.5, 0.52, 0.88)))]
        case "hybrid":
            joined = sprite.copy()
            joined.paste(second.crop((BASE // 2, 0, BASE, BASE)), (BASE // 2, 0))
            return [(joined, moved((0.5, 0.53, 0.8)))]
    if layout == "shadow":
        second = shadow_of(second, (30, 26, 44))
    near, far, order = _PAIRS[layout]
    drawn = {"a": (sprite, moved(near)), "b": (second, moved(far))}
    staged = [drawn[name] for name in order]
    if layout in ("dream", "speak", "screen", "picture", "mirror"):
        staged.insert(0, (_furniture(layout), (0.5, 0.5, 1.0)))
    if layout in _SIGNS:
        glyph, box = _SIGNS[layout]
        staged.append((stickered(glyph), moved(box)))
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
    return with_halo(with_halo(tiles, (20, 20, 24), 1), reach=4)


@lru_cache(maxsize=16)
def _furniture(name: str) -> Image.Image:
    """What some layouts draw around a subject, as a transparent RGBA layer that covers the whole canvas."""
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
