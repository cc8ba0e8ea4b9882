"""Media: each function maps float32 pixels (h, w, 3) in [0, 255] to (h, w, 3); `to_image` clips the results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from img2prompt.sample.sprites import Rgb, hues

Pixels = np.ndarray
Medium = Callable[[Pixels, Random], Pixels]


def to_image(pixels: Pixels) -> Image.Image:
    """Pixels (h, w, 3) as an RGB image: clipped to [0, 255] and truncated to uint8."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _filtered(pixels: Pixels, kind: ImageFilter.Filter) -> Pixels:
    return np.asarray(to_image(pixels).filter(kind), np.float32)


def luminance(pixels: Pixels) -> Pixels:
    """Luminance of pixels (h, w, 3): (h, w, 1), in the same units."""
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _edges(pixels: Pixels) -> Pixels:
    """How strong an edge runs through each pixel: (h, w, 1) in [0, 1]."""
    light = luminance(pixels)
    across = np.abs(np.diff(light, axis=0, prepend=light[:1]))
    along = np.abs(np.diff(light, axis=1, prepend=light[:, :1]))
    return ((across + along) / 110).clip(0, 1)


@lru_cache(maxsize=32)
def grain(size: int, cells: int, seed: int = 0) -> Pixels:
    """Smooth noise with `cells` bumps along each side: (size, size, 1) float32, mostly in [0, 1]."""
    noise = np.random.default_rng(seed).random((cells, cells), np.float32)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))[..., None]


def _mixed(dark: Rgb, bright: Rgb, share: Pixels) -> Pixels:
    return np.array(dark, np.float32) * (1 - share) + np.array(bright, np.float32) * share


def _blocks(pixels: Pixels, cells: int) -> Pixels:
    image = to_image(pixels)
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
def coordinates(size: int) -> tuple[Pixels, Pixels]:
    """Each pixel's y and x, (size, size, 1) float32 each, scaled as if the image were 128 pixels wide."""
    y, x = np.mgrid[:size, :size].astype(np.float32)[..., None] * (128 / size)
    return y, x


def saturated(pixels: Pixels, gain: float) -> Pixels:
    """Pixels (h, w, 3) of the same luminance, with colours `gain` times as strong; may leave [0, 255]."""
    light = luminance(pixels)
    return light + (pixels - light) * gain


def _outlined(blocks: Pixels, pixels: Pixels) -> Pixels:
    """A coarse version of the image with its edges kept, so that a subject can still be told."""
    return blocks * (1 - 0.55 * _edges(pixels))


def _watercolor(pixels: Pixels, rng: Random) -> Pixels:
    size = len(pixels)
    wash = _filtered(_filtered(pixels, ImageFilter.MedianFilter(5)), ImageFilter.BoxBlur(size / 100))
    stain = grain(size, 9, rng.randrange(4))
    wet = 255 - (255 - saturated(wash, 1.25)) * (0.5 + 0.45 * stain)
    return wet - 70 * _edges(pixels)


def _oil(pixels: Pixels, rng: Random) -> Pixels:
    strokes = _filtered(saturated(pixels, 1.35), ImageFilter.MedianFilter(7))
    y, x = coordinates(len(pixels))
    return strokes + 22 * np.sin((x + 0.6 * y) / 1.6 + 12 * grain(len(pixels), 12, rng.randrange(4)))


def _hatched(paper: Rgb, lead: Rgb, strength: float, coarse: int, pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    hatch = ((x + y) // 2 % 3 < 1) * (luminance(pixels) < 120) * 0.35
    tooth = 0.75 + 0.5 * grain(len(pixels), coarse, rng.randrange(4))
    shade = (1 - luminance(pixels) / 255) * strength + _edges(pixels) * 0.8 + hatch
    return _mixed(paper, lead, (shade * tooth).clip(0, 1))


def _ink(pixels: Pixels, rng: Random) -> Pixels:
    return _mixed((255, 255, 255), (0, 0, 0), (_edges(pixels) * 1.6 + (luminance(pixels) < 60)).clip(0, 1))


def _crayon(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    wax = 0.5 + 0.5 * np.sin((x - y) / 1.3 + 8 * grain(len(pixels), 30, rng.randrange(4)))
    return 255 - (255 - saturated(pixels, 1.5)) * (0.45 + 0.55 * (wax > 0.35))


def _pixel(pixels: Pixels, rng: Random) -> Pixels:
    return (_blocks(saturated(pixels, 1.3), 32) / 43).round() * 43


def _neon(pixels: Pixels, rng: Random) -> Pixels:
    edges = _edges(pixels)
    glow = _filtered(np.repeat(edges * 255, 3, 2), ImageFilter.BoxBlur(len(pixels) / 50))[..., :1] / 255
    hue = hues(luminance(pixels)[..., 0] / 255 * 0.6 + rng.random())
    return np.array([8, 4, 22]) + hue * (0.9 * edges + 1.1 * glow) + 70 * edges + 0.25 * pixels


def toned(dark: Rgb, bright: Rgb, pixels: Pixels, rng: Random) -> Pixels:
    """Pixels (h, w, 3) mixed from two colours by their luminance."""
    return _mixed(dark, bright, ((luminance(pixels) - 12) / 226).clip(0, 1))


def sepia(pixels: Pixels, rng: Random) -> Pixels:
    """A brown print with dark corners."""
    y, x = coordinates(len(pixels))
    vignette = 1 - 0.45 * (((x - 64) ** 2 + (y - 64) ** 2) / 8192)
    return toned((48, 28, 12), (246, 222, 176), pixels, rng) * vignette + 18 * (grain(len(pixels), 60) - 0.5)


def _blueprint(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    lines = np.maximum(_edges(pixels), 0.22 * ((x % 12 < 1) | (y % 12 < 1)))
    return _mixed((18, 60, 140), (235, 245, 255), lines) + 0.1 * (pixels - 128)


def _popart(pixels: Pixels, rng: Random) -> Pixels:
    vivid = (saturated(pixels, 2.6) > 125) * 255.0
    return vivid * (luminance(pixels) > 55) * np.array([1, 0.92, 0.85])


def _halftone(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    screen = 128 + 110 * np.sin((x + y) * 1.1) * np.sin((x - y) * 1.1)
    flat = (saturated(pixels, 1.6) / 85).round() * 85
    return np.where((luminance(pixels) + 20 < screen) & (luminance(pixels) > 70), flat * 0.55, flat) * (
        1 - 0.8 * _edges(pixels)
    )


def _glass(pixels: Pixels, rng: Random) -> Pixels:
    panes, lead = _celled(pixels, 12, rng)
    panes = saturated(0.45 * panes + 0.55 * pixels, 1.9) * 0.9 + 22
    return np.where(lead, 16, panes) * (1 - 0.7 * _edges(pixels))


def _mosaic(pixels: Pixels, rng: Random) -> Pixels:
    tiles, grout = _celled(saturated(pixels, 1.3), 32, rng)
    return _outlined(np.where(grout, 0.5 * tiles + 96, tiles), pixels)


def _stitch(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    y, x = y % 4, x % 4
    cross = (np.abs(x - y) < 1.2) | (np.abs(x + y - 4) < 1.2)
    cloth = np.where(cross, _blocks(saturated(pixels, 1.2), 32), 0.4 * _blocks(pixels, 32) + 130)
    return _outlined(cloth, pixels)


def _silhouette(pixels: Pixels, rng: Random) -> Pixels:
    return np.where(luminance(pixels) < 60, 8, toned((214, 84, 40), (255, 226, 130), pixels, rng))


def _lowpoly(pixels: Pixels, rng: Random) -> Pixels:
    facets, _ = _celled(pixels, 24, rng)
    facets = _outlined(saturated(facets, 1.3), pixels)
    return facets + 26 * (_cells(len(pixels), 14, 9)[0] * 7 % 5 / 2 - 1)[..., None]


def _thermal(pixels: Pixels, rng: Random) -> Pixels:
    heat = 1 - _filtered(pixels, ImageFilter.BoxBlur(len(pixels) / 120)) @ np.array([0.3, 0.59, 0.11]) / 255
    stops = [0, 0.25, 0.5, 0.75, 1]
    ramp = [(20, 0, 90), (120, 0, 160), (240, 70, 60), (255, 190, 30), (255, 255, 220)]
    return np.stack([np.interp(heat, stops, [stop[c] for stop in ramp]) for c in range(3)], -1)


def _chalk(pixels: Pixels, rng: Random) -> Pixels:
    dust = 0.6 + 0.6 * grain(len(pixels), 70, rng.randrange(4))
    return _mixed((30, 62, 48), (250, 250, 244), ((_edges(pixels) + 0.1 * luminance(pixels) / 255) * dust).clip(0, 1))


def _woodcut(pixels: Pixels, rng: Random) -> Pixels:
    y, _ = coordinates(len(pixels))
    carved = 128 + 90 * np.sin(y * 1.6 + 14 * grain(len(pixels), 7, rng.randrange(4)))
    ink = (luminance(pixels) < carved * 0.85) | (_edges(pixels) > 0.6)
    return _mixed((242, 228, 200), (34, 22, 18), ink)


def _paper(pixels: Pixels, rng: Random) -> Pixels:
    flat = (_filtered(saturated(pixels, 1.2), ImageFilter.MedianFilter(5)) / 64).round() * 64
    lifted = np.roll(flat, 2, (0, 1)) - flat  # each layer throws a shadow to the lower right
    return flat - 0.35 * np.abs(lifted) + 16 * (grain(len(pixels), 90) - 0.5)


def _glitch(pixels: Pixels, rng: Random) -> Pixels:
    torn = pixels.copy()
    for _ in range(5):
        at, shift = rng.randrange(len(pixels)), rng.randint(-14, 14)
        band = slice(at, at + len(pixels) // 12)
        torn[band] = np.roll(torn[band], shift, axis=1)
    shift = max(len(pixels) // 32, 1)
    torn = np.stack([np.roll(torn[..., 0], shift, 1), torn[..., 1], np.roll(torn[..., 2], -shift, 1)], -1)
    y, _ = coordinates(len(pixels))
    return torn * (1 - 0.25 * (y % 3 < 1))


def _bricks(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    plates = (_blocks(saturated(pixels, 1.4), 32) / 51).round() * 51
    stud = np.hypot(x % 4 - 1.8, y % 4 - 1.8)
    return _outlined(plates + 34 * (stud < 1.3) - 44 * ((x % 4 > 3) | (y % 4 > 3)), pixels)


def _terminal(pixels: Pixels, rng: Random) -> Pixels:
    y, _ = coordinates(len(pixels))
    glyphs = (np.random.default_rng(rng.randrange(4)).random((64, 64, 1)) > 0.35).astype(np.float32)
    noise = np.asarray(Image.fromarray(glyphs[..., 0]).resize(pixels.shape[1::-1], Image.Resampling.NEAREST))[..., None]
    share = (0.9 * _edges(pixels) + 0.75 * (1 - luminance(pixels) / 255) * noise) * (1 - 0.5 * (y % 4 < 1))
    return _mixed((0, 14, 2), (90, 255, 110), share.clip(0, 1))


def _nightvision(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    scope = np.hypot(x - 64, y - 64) < 62
    return toned((0, 26, 4), (170, 255, 150), pixels, rng) * np.where(scope, 1, 0.08) * (1 - 0.12 * (y % 2 < 1))


def _vapor(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    sky = _mixed((70, 20, 140), (255, 110, 200), y / 128)
    grid = (y > 88) & (
        (np.abs((x - 64) * 40 / (y - 70).clip(1) % 12) < 1.2) | (np.abs((y - 88).clip(0) ** 0.5 % 1.6) < 0.22)
    )
    return np.where(grid, (60, 250, 255), 0.5 * sky + 0.62 * saturated(pixels, 1.2))


def _riso(pixels: Pixels, rng: Random) -> Pixels:
    blue = (1 - pixels[..., :1] / 255) * (0.85 + 0.3 * grain(len(pixels), 64))
    pink = (1 - pixels[..., 1:2] / 255) * (0.85 + 0.3 * grain(len(pixels), 64, 1))
    pink = np.roll(pink, max(len(pixels) // 64, 1), 1)
    return np.array([252, 246, 232]) - np.array([225, 150, 60]) * blue - np.array([10, 150, 90]) * pink


def _points(pixels: Pixels, rng: Random) -> Pixels:
    y, x = coordinates(len(pixels))
    dot = np.hypot((x + 2 * (y // 4 % 2)) % 4 - 1.6, y % 4 - 1.6) < 1.9
    hue = 60 * (grain(len(pixels), 40, rng.randrange(4)) - 0.5) * np.array([1, -0.4, -1])
    return _outlined(np.where(dot, _blocks(saturated(pixels, 1.5), 32) + hue, 246), pixels)


def gold(pixels: Pixels, rng: Random) -> Pixels:
    """Gold leaf, darker along the edges."""
    y, x = coordinates(len(pixels))
    sheen = 0.85 + 0.2 * np.sin((x + y) / 9)
    return toned((70, 40, 0), (255, 226, 130), pixels, rng) * sheen * (1 - 0.5 * _edges(pixels))


def _ukiyoe(pixels: Pixels, rng: Random) -> Pixels:
    flat = (_filtered(saturated(pixels, 0.8), ImageFilter.MedianFilter(5)) / 60).round() * 60
    inked = _mixed((28, 42, 92), (246, 232, 200), luminance(flat) / 255) * 0.5 + flat * np.array([0.52, 0.46, 0.38])
    return inked * (1 - 0.75 * _edges(pixels))


def _fresco(pixels: Pixels, rng: Random) -> Pixels:
    cracks = _cells(len(pixels), 8, rng.randrange(4))[1]
    plaster = grain(len(pixels), 40, rng.randrange(4)) * 50 + saturated(pixels, 0.6) * 0.62 + np.array([68, 54, 34])
    return np.where(cracks, 78, plaster)


def _cave(pixels: Pixels, rng: Random) -> Pixels:
    rock = _mixed((150, 104, 66), (206, 160, 112), grain(len(pixels), 10, rng.randrange(4)))
    rock = rock + 26 * (grain(len(pixels), 60) - 0.5)
    ochre = ((1 - luminance(pixels) / 255) * 0.75 + _edges(pixels)).clip(0, 1)
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
    "sepia": sepia,
    "mono": partial(toned, (0, 0, 0), (255, 255, 255)),
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
    "gold": gold,
    "ukiyoe": _ukiyoe,
    "fresco": _fresco,
    "cave": _cave,
}
