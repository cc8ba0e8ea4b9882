"""A competition made on the spot: prompts with a Stable Diffusion flavour and the scenes behind them.

A `Scene` is drawn first and then put into words, so nearly everything that a prompt says can be seen in the
picture that `render.render` draws of it. About a third of the rows say an earlier scene again (other
modifiers, a synonym, a light edit), because that is what public prompt collections look like before dedup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
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

    `backdrop` is the look whose colour fills a background that no place does. `seed` moves things a little.
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
class Row:
    """A prompt, the same prompt without the modifiers that leave no trace in the picture, and its scene."""

    prompt: str
    visible: str
    scene: Scene


class Drawing(NamedTuple):
    """How a table's entry is drawn (the fields before the last one) and the ways to say it."""

    draw: tuple[str, ...]
    says: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """The vocabulary, read from `sample_words.yaml`."""

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
    text = Path(__file__).with_name("sample_words.yaml").read_text(encoding="utf-8")
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


# --- scenes ---


@lru_cache(maxsize=1)
def _keys() -> dict[str, tuple[str, ...]]:
    tables = vars(words())
    keys = {name: tuple(table) for name, table in tables.items() if isinstance(table, Mapping)}
    # Looks that change a subject's shape have no meaning on a wall.
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


def _scene(rng: Random) -> Scene:
    # Most scenes have more than one clause: the room of scenes must be far larger than any train set, or
    # large sets would run out of prompts that are no near-duplicates.
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


# --- words ---

_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "knife": "knives", "child": "children", "man": "men",
    "woman": "women", "gentleman": "gentlemen", "policeman": "policemen", "businessman": "businessmen",
    "tooth": "teeth", "foot": "feet", "person": "people", "leaf": "leaves", "loaf": "loaves", "elf": "elves",
    "shelf": "shelves", "calf": "calves", "fish": "fish", "sheep": "sheep", "deer": "deer", "moose": "moose",
    "bison": "bison", "squid": "squid", "shrimp": "shrimp", "ox": "oxen", "dice": "dice", "scarf": "scarves",
}  # fmt: skip
_INSIDE = re.compile(r" (?:of|with|in|on|from|a|doing|getting|covering|blowing|wearing|making) ")
_LIKE_VOWELS, _LIKE_CONSONANTS = ("hour", "suv", "x-ray"), ("uni", "use", "eu", "one", "ufo")


def _plural(name: str) -> str:
    if name[0] == "~":
        return name[1:]
    inside = _INSIDE.search(name)  # "loaf of bread": the noun stands before the preposition
    head, rest = (name[: inside.start()], name[inside.start() :]) if inside else (name, "")
    before, _, last = head.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{before} {last}{rest}".lstrip()


def _bare(thing: Thing, rng: Random) -> tuple[str, str]:
    """The noun of a thing and its plural, both without an article."""
    one, many = thing.name.lstrip("~"), _plural(thing.name)
    if thing.look:
        look = rng.choice(words().looks[thing.look].says)
        one, many = look.format(one), look.format(many)
    if thing.number:
        one = many = rng.choice(words().numbers[thing.number].says).format(one, s=many)
    return one, many


def _several(thing: Thing) -> bool:
    return bool(thing.number) and words().numbers[thing.number].draw[0] != "1"


def _with_article(noun: str, thing: Thing, article: str) -> str:
    if thing.name[0] == "~" or _several(thing):
        return noun
    start = noun.lower()
    if article == "a" and start.startswith(("a", "e", "i", "o", "u", *_LIKE_VOWELS)):
        article = "a" if start.startswith(_LIKE_CONSONANTS) else "an"
    return f"{article} {noun}".lstrip()


_ARTICLES = ("a", "a", "a", "", "", "", "", "the", "the", "one", "some", "my", "this", "that", "our")


def _clauses(scene: Scene, rng: Random) -> tuple[str, list[str]]:
    """The subjects in words, "|" where their verb would stand, and the details of where and when."""
    first, *others = scene.things
    article = rng.choice(_ARTICLES)
    noun, plural = _bare(first, rng)
    said = {"a": _with_article(noun, first, article), "n": noun, "s": plural}
    if others:
        other, others_plural = _bare(others[0], rng)
        said |= {"b": _with_article(other, others[0], article), "m": other, "t": others_plural}
        core = rng.choice(words().relations[scene.relation].says).format(**said)
    elif scene.act:
        core = rng.choice(words().acts[scene.act].says).format(**said)
    else:
        core = said["a"]
    if len(others) == 2:
        third = _with_article(_bare(others[1], rng)[0], others[1], article)
        core += rng.choice((" and ", ", ", " with ", " plus ")) + third
    details = [
        rng.choice(table[key].says)
        for table, key in (
            (words().places, scene.place),
            (words().times, scene.time),
            (words().weathers, scene.weather),
        )
        if key
    ]
    if scene.backdrop:
        details.append(_backdrop(scene.backdrop, rng))
    if details and "|" not in core:
        core += " |"
    return core, details


def _backdrop(look: str, rng: Random) -> str:
    behind = rng.choice(("on a {} background", "against a {} wall", "in front of a {} curtain")).split("{} ")
    return behind[0] + rng.choice(words().looks[look].says).format(behind[1])


_MEDIUM = ("{m} of {}", "{m} of {}", "{}, {m}", "{}, {m}", "{m}: {}", "{m}, {}", "{} as {m}", "{}. {m}")


def _say(scene: Scene, rng: Random) -> str:
    """A scene in words, without modifiers."""
    core, details = _clauses(scene, rng)
    rng.shuffle(details)
    verb = "are" if _several(scene.things[0]) or " and " in core else "is"
    form = "" if scene.frame or rng.random() > 0.2 else rng.choice(words().forms)
    order = 1.0 if form else rng.random()
    if order < 0.25 and details:  # tags
        text = ", ".join([core.replace(" |", ""), *details])
    elif order < 0.35 and details:
        text = f"{details[0]}, {' '.join([core.replace(' |', ''), *details[1:]])}"
    else:
        text = " ".join([core, *details])
    plain = text.replace(" |", "")
    if scene.frame:
        return rng.choice(words().frames[scene.frame].says).format(plain)
    if form:
        clause = text.replace("|", verb, 1) if "|" in text else plain
        plain = form.format(plain, c=clause, n=scene.things[0].name.lstrip("~"))
    if scene.medium:
        medium = rng.choice(words().media[scene.medium].says)
        plain = rng.choice(_MEDIUM).format(plain, m=medium)
    return plain


def _modified(visible: str, rng: Random, least: int = 0) -> str:
    """A visible text with `least` or more modifiers around it."""
    count = max(least, rng.choices((0, 1, 2, 3), (66, 20, 9, 5))[0])
    chosen = rng.sample(words().modifiers, count)
    if chosen and rng.random() < 0.15:
        return ", ".join([chosen[0], visible, *chosen[1:]])
    return ", ".join([visible, *chosen])


# --- saying an earlier scene again ---


def _synonyms(scene: Scene) -> list[tuple[str, ...]]:
    """The lists of ways to say the parts of a scene whose wording stands in a prompt as it is."""
    found = [tuple(name.lstrip("~") for name in words().subjects[thing.glyph]) for thing in scene.things]
    for table, key in (
        (words().places, scene.place),
        (words().times, scene.time),
        (words().weathers, scene.weather),
        (words().media, scene.medium),
    ):
        if key:
            found.append(table[key].says)
    return found


_LEADS = ("picture of ", "image of ", "a view of ", "here: ", "so, ", "again, ", "more ", "like ", "see ")
_TAILS = (" again", "!", "?", " here", " now", " today", ", really", " as usual", " scene", " maybe", ", ok")


def _edited(visible: str, scene: Scene, rng: Random) -> str:
    """A visible text with one word or phrase said differently."""
    swaps = [
        (old, new)
        for says in _synonyms(scene)
        for old in says
        if re.search(rf"\b{re.escape(old)}\b", visible)
        for new in says
        if new not in visible
    ]
    if swaps and rng.random() < 0.6:
        return visible.replace(*rng.choice(swaps), 1)
    if rng.random() < 0.5:
        return rng.choice(_LEADS) + visible
    return visible + rng.choice(_TAILS)


def _again(row: Row, rng: Random) -> Row:
    """An earlier row's scene, drawn anew and mostly said so that it stays a near-duplicate."""
    scene = replace(row.scene, seed=rng.getrandbits(32))
    kind = rng.random()
    if kind < 0.03:
        return replace(row, scene=scene)  # people do post a prompt twice
    if kind < 0.5:
        return Row(_modified(row.visible, rng, least=1), row.visible, scene)
    visible = _edited(row.visible, scene, rng) if kind < 0.92 else _say(scene, rng)
    return Row(_modified(visible, rng), visible, scene)


AGAIN = 0.43  # of the rows; with what falls together by chance, dedup at 0.85 then keeps about two thirds


def draw(seed: int, stream: int = 0) -> Iterator[Row]:
    """Rows without end. Every (seed, stream) is a sequence of its own, the same in every process."""
    rng = Random(f"{seed}/{stream}")
    originals: list[Row] = []
    while True:
        if originals and rng.random() < AGAIN:
            yield _again(rng.choice(originals), rng)
        else:
            scene = _scene(rng)
            visible = _say(scene, rng)
            originals.append(Row(_modified(visible, rng), visible, scene))
            yield originals[-1]


def generate(n: int, seed: int, stream: int = 0) -> list[Row]:
    """The first `n` rows of `draw(seed, stream)`: a longer competition starts with a shorter one's rows."""
    return list(islice(draw(seed, stream), n))


# --- rows that are no near-duplicates of others ---

_CHUNK = 2048  # candidates embedded at once
_BLOCK = 8192  # rows of a matrix compared at once: 4,096 x 8,192 cosines are 128 MiB


def _largest(queries: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """For each of `queries` (q, d) the largest cosine to any row of `others`; -1 where there is none. (q,)"""
    largest = np.full(len(queries), -1.0, np.float32)
    for other in others:
        for start in range(0, len(other), _BLOCK):
            np.maximum(largest, (queries @ other[start : start + _BLOCK].T).max(axis=1), out=largest)
    return largest


def apart(
    rows: Iterable[Row],
    n: int,
    others: Sequence[np.ndarray],
    encode: Callable[[list[str]], np.ndarray],
    threshold: float = 0.85,
    distinct: bool = True,
) -> list[Row]:
    """The first `n` of `rows` that are no near-duplicates of `others`, nor (`distinct`) of one another.

    `others` are matrices (m, d) float32 of unit rows, and `encode` gives such a matrix for texts. A row is
    kept if the cosines of both its prompt and its visible text are at most `threshold`.
    Raises ValueError if `rows` end, or 20 n of them were looked at, before n are kept.
    """
    kept: list[Row] = []
    known = list(others)
    candidates = islice(rows, 20 * n)
    while len(kept) < n:
        # Some are refused; the encoder is quickest with many texts at once.
        chunk = list(islice(candidates, min(_CHUNK, 2 * (n - len(kept)))))
        if not chunk:
            raise ValueError(
                f"only {len(kept)} of {n} rows wanted are within cosine {threshold} of no other row: "
                "fewer rows, a higher threshold or a larger vocabulary is needed"
            )
        # (2c, d): a row's prompt and, below it, its visible text
        texts = np.asarray(encode([text for row in chunk for text in (row.prompt, row.visible)]), np.float32)
        free = _largest(texts, known).reshape(-1, 2).max(axis=1) <= threshold
        chosen = np.flatnonzero(free).tolist()
        if distinct:
            near = (texts @ texts.T).reshape(len(chunk), 2, len(chunk), 2).max(axis=(1, 3)) > threshold
            wanted, chosen = chosen, []
            for index in wanted:
                if not near[index, chosen].any():
                    chosen.append(index)
            known.append(texts.reshape(len(chunk), 2, texts.shape[1])[chosen].reshape(-1, texts.shape[1]))
        kept += [chunk[index] for index in chosen]
    return kept[:n]
