"""The prompts of the sample competition: scenes put into words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

from img2prompt.sample.scenes import PromptedScene, Scene, Thing, random_scene, words

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
    """The subjects in words, with "|" where their verb would stand, and the details of where and when."""
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


def _synonyms(scene: Scene) -> list[tuple[str, ...]]:
    """For each part of a scene whose wording is in a prompt unchanged, its possible wordings."""
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
    """A visible text with one word or phrase replaced, or with a few words added at one end."""
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


def _again(row: PromptedScene, rng: Random) -> PromptedScene:
    """An earlier row's scene with a new seed, and mostly worded so that the prompt is a near-duplicate."""
    scene = replace(row.scene, seed=rng.getrandbits(32))
    kind = rng.random()
    if kind < 0.03:
        return replace(row, scene=scene)  # people do post a prompt twice
    if kind < 0.5:
        return PromptedScene(_modified(row.visible, rng, least=1), row.visible, scene)
    visible = _edited(row.visible, scene, rng) if kind < 0.92 else _say(scene, rng)
    return PromptedScene(_modified(visible, rng), visible, scene)


AGAIN = 0.43  # share of rows that repeat an earlier scene; with chance duplicates, dedup at 0.85 keeps about 2/3


def draw(seed: int, stream: int = 0) -> Iterator[PromptedScene]:
    """Yield rows endlessly. Each (seed, stream) is a sequence of its own, the same in every process."""
    rng = Random(f"{seed}/{stream}")
    originals: list[PromptedScene] = []
    while True:
        if originals and rng.random() < AGAIN:
            yield _again(rng.choice(originals), rng)
        else:
            scene = random_scene(rng)
            visible = _say(scene, rng)
            originals.append(PromptedScene(_modified(visible, rng), visible, scene))
            yield originals[-1]


def generate(n: int, seed: int, stream: int = 0) -> list[PromptedScene]:
    """The first `n` rows of `draw(seed, stream)`: a larger sample starts with the rows of a smaller one."""
    return list(islice(draw(seed, stream), n))
