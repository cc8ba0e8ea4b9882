"""Scenes in the manner of Stable Diffusion prompts: what an image of the sample competition shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple

import yaml


@dataclass(frozen=True, slots=True)
class Thing:
    """One subject: its OpenMoji glyph, its noun, and keys of `Words.looks` and `Words.numbers`."""

    glyph: str
    name: str
    look: str = ""
    number: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """What `render.render` draws: one to three things, and keys of the tables in `Words` ("" is none).

    `backdrop` is the look that fills the background of a scene without a place. `seed` varies positions and textures.
    """

    things: tuple[Thing, ...]
    relation: str = ""
    act: str = ""
    place: str = ""
    backdrop: str = ""
    time: str = ""
    weather: str = ""
    medium: str = ""
    frame: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PromptedScene:
    """A prompt, the same prompt without the modifiers that leave no trace in the image, and its scene."""

    prompt: str
    visible: str
    scene: Scene


def scene_to_json(scene: Scene) -> str:
    """A scene as text."""
    return json.dumps(asdict(scene), ensure_ascii=False)


def scene_from_json(text: str) -> Scene:
    """The scene that `scene_to_json` wrote."""
    fields = json.loads(text)
    return Scene(**fields | {"things": tuple(Thing(**thing) for thing in fields["things"])})


class Drawing(NamedTuple):
    """A table's entry: how it is drawn (the fields before the last one) and its possible wordings."""

    draw: tuple[str, ...]
    says: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """The vocabulary, read from `words.yaml`."""

    subjects: Mapping[str, tuple[str, ...]]  # glyph -> names, the first one the usual one
    looks: Mapping[str, Drawing]
    numbers: Mapping[str, Drawing]
    acts: Mapping[str, Drawing]
    relations: Mapping[str, Drawing]
    places: Mapping[str, Drawing]
    media: Mapping[str, Drawing]
    frames: Mapping[str, Drawing]
    times: Mapping[str, Drawing]
    weathers: Mapping[str, Drawing]
    forms: tuple[str, ...]
    modifiers: tuple[str, ...]


def _glyphs(text: str) -> str:
    return re.sub(r"U\+([0-9A-F]{4})", lambda match: chr(int(match[1], 16)), text)


@lru_cache(maxsize=1)
def words() -> Words:
    """The vocabulary of the sample competition."""
    text = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    tables = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar a string: 202020 is a colour
    subjects: dict[str, tuple[str, ...]] = {}
    for group in tables.pop("subjects").values():
        for entry in group.split(", "):
            glyph, names = entry.split(" ", 1)
            subjects[_glyphs(glyph)] = tuple(names.split("/"))
    forms = tuple(form.strip() for form in tables.pop("forms").split("/"))
    modifiers = tuple(tables.pop("modifiers").split(", "))
    drawings: dict[str, dict[str, Drawing]] = {}
    for table, entries in tables.items():
        drawings[table] = {}
        for key, fields in entries.items():
            *draw, says = [fields] if isinstance(fields, str) else fields
            drawings[table][key] = Drawing(tuple(_glyphs(field) for field in draw), tuple(says.split("/")))
    return Words(subjects=subjects, forms=forms, modifiers=modifiers, **drawings)


@lru_cache(maxsize=1)
def _keys() -> dict[str, tuple[str, ...]]:
    tables = vars(words())
    keys = {name: tuple(table) for name, table in tables.items() if isinstance(table, Mapping)}
    # Looks that change a subject's shape have no meaning on a backdrop.
    shapes = ("ghost", "glow", "split", "melt", "flip", "wave")
    keys["backdrops"] = tuple(key for key, look in words().looks.items() if look.draw[0] not in shapes)
    return keys


def _maybe(rng: Random, chance: float, table: str) -> str:
    return rng.choice(_keys()[table]) if rng.random() < chance else ""


@lru_cache(maxsize=1)
def _subjects() -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The glyphs, and their cumulative frequencies by Zipf and Mandelbrot's law, 1 / (rank + 5)**1.2.

    People ask for cats more often than for abacuses; and a subject that is drawn four times in a competition of
    thousands could not be learned from it.
    """
    glyphs = list(words().subjects)
    Random("ranks").shuffle(glyphs)
    return tuple(glyphs), tuple(accumulate((rank + 5) ** -1.2 for rank in range(1, len(glyphs) + 1)))


def _thing(rng: Random, look: float, number: float) -> Thing:
    glyphs, frequencies = _subjects()
    glyph = rng.choices(glyphs, cum_weights=frequencies)[0]
    name = rng.choice(words().subjects[glyph])
    return Thing(glyph, name, _maybe(rng, look, "looks"), "" if name[0] == "~" else _maybe(rng, number, "numbers"))


def random_scene(rng: Random) -> Scene:
    """A random scene of one to three things; the other parts have the frequencies written here."""
    # Most scenes have more than one clause: there must be far more scenes than rows in any train set, or large
    # sets would run out of prompts that are no near-duplicates.
    count = rng.choices((1, 2, 3), (38, 50, 12))[0]
    alone = count == 1
    things = [_thing(rng, 0.4 if alone else 0.15, 0.3 if alone else 0.0)]
    things += [_thing(rng, 0.15, 0.0) for _ in range(count - 1)]
    place = _maybe(rng, 0.45 if alone else 0.25, "places")
    framed = rng.random() < 0.12
    return Scene(
        things=tuple(things),
        relation="" if alone else rng.choice(_keys()["relations"]),
        act=_maybe(rng, 0.45, "acts") if alone and not things[0].number else "",
        place=place,
        backdrop="" if place else _maybe(rng, 0.1, "backdrops"),
        time=_maybe(rng, 0.1, "times"),
        weather=_maybe(rng, 0.1, "weathers"),
        medium=_maybe(rng, 0.0 if framed else 0.25, "media"),
        frame=rng.choice(_keys()["frames"]) if framed else "",
        seed=rng.getrandbits(32),
    )
