"""The sample competition: its prompts, its images, and rows that are no near-duplicates of others."""

import hashlib
import io
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import repeat

import numpy as np
import pytest
from PIL import Image, ImageChops

from img2prompt.sample.distinct import apart
from img2prompt.sample.frames import FRAMES
from img2prompt.sample.media import MEDIA
from img2prompt.sample.render import jpeg, render
from img2prompt.sample.scenes import PromptedScene, Scene, Thing, words
from img2prompt.sample.wording import draw, generate

CAT, ROCKET = Thing("🐱", "cat"), Thing("🚀", "rocket")


@cache
def vector(word):
    return np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)).normal(size=32)


def encode(texts):
    """A toy encoder: the sum of a random vector per word, at norm 1."""
    vectors = np.array([sum(vector(word) for word in text.split()) for text in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def difference(one, other):
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()


# --- prompts ---


def test_same_seed_gives_same_rows_and_a_longer_sample_starts_with_a_shorter_one():
    assert generate(300, 5)[:120] == generate(120, 5)


@pytest.mark.parametrize("other", [(6, 0), (5, 1)])
def test_other_seeds_and_other_streams_say_other_things(other):
    ours = {row.prompt for row in generate(300, 5)}
    theirs = {row.prompt for row in generate(300, *other)}
    assert len(ours & theirs) < 5


def test_prompts_read_as_text():
    for row in generate(3000, 1):
        for text in (row.prompt, row.visible):
            assert text == text.strip()
            assert not set(text) & set("{}|~_")
            assert "  " not in text


def test_visible_text_has_no_modifier_and_the_prompt_adds_nothing_but_modifiers():
    modifiers = set(words().modifiers)
    for row in generate(3000, 2):
        assert not modifiers & set(row.visible.split(", "))
        before, found, after = row.prompt.partition(row.visible)
        assert found
        assert {part for part in (before + after).split(", ") if part} <= modifiers


def test_about_a_third_of_the_rows_say_an_earlier_scene_again():
    rows = generate(3000, 3)
    scenes = Counter(replace(row.scene, seed=0) for row in rows)
    assert 0.3 < 1 - len(scenes) / len(rows) < 0.5


def test_few_rows_repeat_a_prompt_word_by_word():
    prompts = {row.prompt.lower() for row in generate(3000, 4)}
    assert 0.95 < len(prompts) / 3000 < 1


def test_many_subjects_are_named():
    assert len(words().subjects) > 1000
    drawn = Counter(thing.glyph for row in generate(3000, 6) for thing in row.scene.things)
    assert len(drawn) > 500
    # Few are common and most are rare, as with words: a tenth of the subjects makes at least half the things.
    assert sum(count for _, count in drawn.most_common(116)) > 0.5 * drawn.total()


def test_a_scene_is_said_with_the_names_of_its_things():
    for row in generate(500, 7):
        first = row.scene.things[0]
        names = [name.lstrip("~").lower() for name in words().subjects[first.glyph]]
        # a plural may change the end of a name
        assert any(word[:3] in row.visible.lower() for name in names for word in name.split())


# --- images ---


def test_every_medium_and_frame_of_the_vocabulary_can_be_drawn():
    assert set(words().media) == set(MEDIA)
    assert set(words().frames) == set(FRAMES)


def every_scene():
    """One scene for each entry of each table."""
    for table in ("places", "times", "weathers", "media", "frames"):
        for key in getattr(words(), table):
            yield Scene((CAT,), **{table.removesuffix("s") if table != "media" else "medium": key})
    for key in words().acts:
        yield Scene((CAT,), act=key)
    for key in words().relations:
        yield Scene((CAT, ROCKET, Thing("🍕", "pizza")), relation=key)
    for key in words().looks:
        yield Scene((replace(CAT, look=key),))
    for key in words().numbers:
        yield Scene((replace(CAT, number=key),))


def test_every_entry_of_the_vocabulary_changes_the_image():
    images = {scene: render(scene, 64).tobytes() for scene in every_scene()}
    plain = render(Scene((CAT,)), 64).tobytes()
    assert plain not in images.values()


@pytest.mark.parametrize("size", [32, 96, 128, 224])
def test_generated_scenes_render_at_any_size(size):
    for row in generate(40, 8):
        image = render(row.scene, size)
        assert image.mode == "RGB"
        assert image.size == (size, size)
        assert np.asarray(image).std() > 3


def test_every_subject_has_a_glyph_of_its_own():
    scenes = (Scene((Thing(glyph, names[0]),)) for glyph, names in words().subjects.items())
    images = Counter(render(scene, 32).tobytes() for scene in scenes)
    assert images.most_common(1)[0][1] == 1


def test_same_scene_gives_the_same_bytes_whatever_was_drawn_before():
    scenes = [row.scene for row in generate(30, 9)]
    forward = [jpeg(scene) for scene in scenes]
    assert [jpeg(scene) for scene in reversed(scenes)] == forward[::-1]
    assert Image.open(io.BytesIO(forward[0])).size == (128, 128)


@pytest.mark.parametrize(
    ("scene", "pixels"),
    [
        (Scene((CAT,), place="beach", time="night"), "35ee797e99ca34af"),
        (Scene((CAT, ROCKET), relation="ring", weather="snow"), "47b2b5bafffedae2"),
        (Scene((Thing("🕋", "Kaaba", look="sand"),), place="pirates", seed=449191336), "e753aecfbf96e890"),
        (Scene((replace(ROCKET, number="five"),), frame="card"), "1b8bc986dc7bb739"),
    ],
)
def test_the_sample_is_fixed_by_its_seed(scene, pixels):
    """As it was drawn first; with another Pillow or OpenMoji than requirements.txt pins it may be another sample."""
    assert hashlib.sha256(render(scene).tobytes()).hexdigest()[:16] == pixels


def test_the_drawing_seed_moves_things_a_little():
    scene = Scene((CAT,), place="beach", seed=1)
    moved = difference(render(scene), render(replace(scene, seed=2)))
    assert 0 < moved < difference(render(scene), render(replace(scene, place="forest")))


def test_left_and_right_are_swapped():
    left = render(Scene((CAT, ROCKET), relation="left"))
    right = render(Scene((CAT, ROCKET), relation="right"))
    half = (0, 0, 64, 128)
    swapped = render(Scene((ROCKET, CAT), relation="right"))
    assert difference(left.crop(half), swapped.crop(half)) < difference(left.crop(half), right.crop(half))


def test_a_subject_stands_out_at_night():
    bat = Thing("🦇", "bat", look="black")
    night = render(Scene((bat,), place="cave", time="night"))
    light = np.asarray(night.convert("L"))
    assert light[30:100, 30:100].max() > 200  # the rim around it
    assert light[:8].mean() < 80


def test_a_look_recolours_the_subject_only():
    red = render(Scene((replace(CAT, look="red"),)))
    blue = render(Scene((replace(CAT, look="blue"),)))
    changed = ImageChops.difference(red, blue).getbbox()
    assert changed is not None
    assert changed[0] > 5
    assert changed[2] < 123


# --- apart ---


def row(text, visible=None):
    return PromptedScene(text, visible or text, Scene((CAT,)))


def test_apart_keeps_prompts_and_visible_texts_away_from_the_others_and_from_one_another():
    train = generate(1500, 10)
    others = [encode([r.prompt for r in train]), encode([r.visible for r in train])]
    kept, embeddings = apart(draw(10, stream=1), 400, others, encode, threshold=0.8)
    np.testing.assert_array_equal(embeddings, encode([row.prompt for row in kept]))
    assert len(kept) == 400
    ours = [encode([r.prompt for r in kept]), encode([r.visible for r in kept])]
    for own in ours:
        assert all((own @ other.T).max() <= 0.8 + 1e-5 for other in others)
        assert np.triu(own @ own.T, 1).max() <= 0.8 + 1e-5


def test_apart_takes_rows_in_order_and_judges_the_visible_text_as_well():
    rows = [row("red cat"), row("blue dog"), row("old sea, 8k", visible="old sea"), row("big tree")]
    others = [encode(["blue dog"]), encode(["old sea"])]
    assert apart(rows, 2, others, encode)[0] == [rows[0], rows[3]]


def test_apart_may_keep_repeats_if_told_so():
    rows = [row("red cat"), row("red cat"), row("green frog")]
    assert apart(rows, 2, [], encode, distinct=False)[0] == rows[:2]
    assert apart(rows, 2, [], encode)[0] == [rows[0], rows[2]]


@pytest.mark.parametrize("rows", [[], [row("a cat")], repeat(row("a cat"))])
def test_apart_says_when_it_cannot(rows):
    with pytest.raises(ValueError, match=r"only \d of 5 rows"):
        apart(rows, 5, [], encode)
