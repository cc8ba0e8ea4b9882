"""Words for an embedding: phrases, the contest for a prompt, the words that it says."""

import re
import shutil
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from img2prompt.core.metric import unit
from img2prompt.core.storage import write_json
from img2prompt.words import fit as fitting
from img2prompt.words.contest import Contest
from img2prompt.words.fit import fit, frequent, ridge, which
from img2prompt.words.phrases import Phrase, Phrases, join, mine, split
from img2prompt.words.vocabulary import Vocabulary
from img2prompt.words.words import Words

rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("prompt", "phrases", "joined"),
    [
        (
            "An oil painting of a cat in the rain, highly detailed, trending on ArtStation",
            ["medium:an oil painting of", "subject:a cat", "modifier:in the rain", "modifier:highly detailed",
             "modifier:trending on artstation"],
            "an oil painting of a cat in the rain, highly detailed, trending on artstation",
        ),
        ("at dusk, a ship by night", ["modifier:at dusk", "subject:a ship", "modifier:by night"],
         "at dusk, a ship by night"),
        ("Version 1.5: (a ship)", ["subject:version 1.5", "modifier:a ship"], "version 1.5, a ship"),
        ("dusk, a lonely ship with a man on board", ["subject:dusk", "modifier:a lonely ship", "modifier:with a man",
         "modifier:on board"], "dusk, a lonely ship with a man on board"),
        ("a view of", ["subject:a view of"], "a view of"),
        (" ,. ", [], ""),
    ],
)  # fmt: skip
def test_phrases_by_hand(prompt, phrases, joined):
    found = split(prompt)
    assert [f"{phrase.kind}:{phrase.text}" for phrase in found] == phrases
    assert join(found) == joined


PIECES = ["a", "Cat", "of", "in", "with", "red,", "sky.", "(the)", "by", "|", "1.5", "–", "on"]


@given(st.lists(st.sampled_from(PIECES), max_size=20))
def test_no_word_of_a_prompt_is_lost(words):
    prompt = " ".join(words)
    left = re.sub(r"[,.](?=\s|$)|[()|–]", " ", prompt.lower()).split()
    assert re.sub(r",(?=\s|$)", " ", join(split(prompt))).split() == left


def test_phrases_are_counted_once_a_prompt():
    found = mine(["a cat, red, red", "a dog, red", "red"])
    assert found[0] == (Phrase("modifier", "red"), 2)
    assert dict(found)[Phrase("subject", "red")] == 1
    assert len(found) == 4


def toy(texts):
    """Embeddings of texts by their words: (n, 32), as far as possible like a sentence encoder's."""
    toy.embedded += len(set(texts))
    found = np.zeros((len(texts), 32), np.float32)
    for row, text in zip(found, texts, strict=True):
        for word in re.findall(r"\w+", text):
            row += np.random.default_rng(zlib.crc32(word.encode())).normal(size=32)
    return unit(found) if len(texts) else found


PROMPTS = [
    f"{medium}{subject} {place}{style}"
    for medium in ("", "a photo of ", "an oil painting of ")
    for subject in ("a cat", "two dogs", "the old ship", "a green tree")
    for place in ("in the rain", "at night", "on a hill")
    for style in ("", ", highly detailed", ", blurred, pastel")
]


@pytest.fixture
def made():
    """Half of PROMPTS with their embeddings, and their phrases."""
    toy.embedded = 0
    prompts = PROMPTS[::2]
    phrases, counts = zip(*mine(prompts), strict=True)
    return prompts, toy(prompts), Phrases(phrases, counts, toy([phrase.text for phrase in phrases]))


def say(made, targets, encode=toy):
    prompts, embeddings, phrases = made
    none = Vocabulary([], [], np.zeros((0, 32), np.float32), np.zeros(0, np.float32))
    return Words(prompts, embeddings, phrases, none, encode)(targets)


def test_a_prompt_that_nobody_wrote_is_composed(made):
    """All its phrases are known: of the other half of PROMPTS most are found as they are."""
    said = say(made, toy(PROMPTS[1::2]))
    assert np.mean([one.prompt == prompt for one, prompt in zip(said, PROMPTS[1::2], strict=True)]) > 0.6
    assert all(one.nearest[0][0] != prompt for one, prompt in zip(said, PROMPTS[1::2], strict=True))


def test_the_composed_prompt_is_never_farther_than_the_nearest(made):
    targets = unit(rng.normal(size=(40, 32)) + 3 * toy(PROMPTS[:40])).astype(np.float32)
    said = say(made, targets)
    similarity = targets @ made[1].T
    for one, target, own in zip(said, targets, similarity, strict=True):
        assert one.prompt_cosine == pytest.approx(float(toy([one.prompt])[0] @ target), abs=1e-6)
        assert [cosine for _, cosine in one.nearest] == pytest.approx(np.sort(own)[::-1][:5], abs=1e-6)
        assert [prompt for prompt, _ in one.nearest] == [made[0][i] for i in np.argsort(-own, kind="stable")[:5]]
        assert one.prompt_cosine >= one.nearest[0][1] - 1e-6
    assert len({one.prompt for one in said} - set(made[0])) > 10


def test_a_picture_costs_at_most_400_embeddings_and_its_words_are_its_own(made):
    targets = unit(rng.normal(size=(12, 32))).astype(np.float32)
    toy.embedded = 0
    together = say(made, targets)
    assert 0 < toy.embedded <= 400 * len(targets)
    for target, before in zip(targets, together, strict=True):
        toy.embedded = 0
        (alone,) = say(made, target[None])
        assert 0 < toy.embedded <= 400
        assert alone.prompt == before.prompt
    assert say(made, targets) == together


def test_very_long_prompts_and_prompts_without_phrases(made):
    long = ", ".join(f"thing {number}" for number in range(300))
    prompts = [long, "", "!"]
    embeddings = unit(rng.normal(size=(3, 32))).astype(np.float32)
    none = Phrases([], [], np.zeros((0, 32), np.float32))
    assert [one.prompt for one in say((prompts, embeddings, none), embeddings)] == prompts
    toy.embedded = 0
    said = say((prompts, embeddings, made[2]), embeddings)
    assert toy.embedded <= 400 * len(said)
    assert [one.prompt for one in said] == prompts  # nothing is nearer than the embedding itself


def test_no_rows(made):
    assert say(made, np.zeros((0, 32), np.float32)) == []


def test_changes_keep_the_order_of_a_prompt(made):
    contest = Contest(made[2], toy)
    ((prompt, _),) = contest(
        toy(["an oil painting of a cat in the rain, pastel"]), ["a cat, pastel"], toy(["a cat, pastel"])
    )
    assert prompt == "an oil painting of a cat in the rain, pastel"


def test_frequent_words(monkeypatch):
    monkeypatch.setattr(fitting, "LEAST", 2)
    prompts = ["The CAT and the cat", "a cat, élan", "4k girl's élan vital", "girl's red-haired", "Élan"]
    words = frequent(prompts)
    assert words == ["élan", "cat", "girl's"]
    assert which(prompts, words).toarray().tolist() == [[0, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0]]
    monkeypatch.setattr(fitting, "MOST", 1)
    assert frequent(prompts) == ["élan"]
    monkeypatch.setattr(fitting, "LEAST", 20)
    assert frequent(prompts) == []


def sayings(n, d=16, w=6):
    """n prompts that each say some of w words, and embeddings (n, d) of norm 1 that show it."""
    said = rng.random((n, w)) < np.linspace(0.05, 0.4, w)
    embeddings = said @ np.random.default_rng(1).normal(size=(w, d)) + 0.5 * rng.normal(size=(n, d)) + 1
    return [" ".join(f"word{i}" for i in np.flatnonzero(row)) for row in said], unit(embeddings).astype(np.float32)


def test_the_word_map_is_the_ridge_regression_of_scikit_learn():
    prompts, x = sayings(200)
    says, rows = which(prompts, [f"word{i}" for i in range(6)]), np.arange(30, 200)
    found = ridge(x, says, rows, 0.7)
    reference = Ridge(0.7).fit(x[30:], says[30:].toarray())
    np.testing.assert_allclose(found(x), reference.predict(x), atol=1e-6)


def test_its_strength_has_the_least_generalised_cross_validation_error():
    prompts, x = sayings(60)
    says, rows = which(prompts, [f"word{i}" for i in range(6)]), np.arange(60)
    y, centred = says.toarray(), x - x.mean(0)

    def error(strength):  # by the hat matrix
        hat = centred @ np.linalg.solve(centred.T @ centred + strength * np.eye(16), centred.T) + 1 / 60
        return np.square(y - hat @ y).sum() / (1 - np.trace(hat) / 60) ** 2

    strength = ridge(x, says, rows).strength
    assert error(strength) < min(error(strength / 1.78), error(strength * 1.78))


def test_probabilities_are_calibrated_on_predictions():
    """Predictions are noisier than targets; of new ones the words are right as often as is said."""
    prompts, x = sayings(3000)
    noisy = unit(x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    fold = np.arange(2000) % 4
    unseen = fold[:, None] == np.arange(4)
    vocabulary = fit(prompts[:2000], x[:2000], unseen, noisy[:2000], np.arange(2000), fold)
    assert vocabulary.words == [f"word{i}" for i in reversed(range(6))]
    assert vocabulary.counts == which(prompts[:2000], vocabulary.words).sum(axis=0).astype(int).tolist()
    found, truth = vocabulary.probabilities(noisy[2000:]), which(prompts[2000:], vocabulary.words).toarray()
    order = np.argsort(found, axis=None)
    for part in np.array_split(order, 6):
        assert found.ravel()[part].mean() == pytest.approx(truth.ravel()[part].mean(), abs=0.06)
    first = np.array([truth[row, found[row].argmax()] for row in range(1000)])
    assert first.mean() > truth.mean(0).max() + 0.1
    words = vocabulary.most_probable(noisy[2000:2010], 3)
    assert [[word for word, _ in row] for row in words] == [
        [vocabulary.words[i] for i in np.argsort(-row)[:3]] for row in found[:10]
    ]


def test_a_fold_s_scores_are_by_a_map_without_its_prompts():
    """With a prompt of its own for every word, a map that has seen it says what one that has not cannot know."""
    d = 64
    said = np.arange(80) % 4
    prompts = [f"word{word} {row}" for row, word in enumerate(said)]
    x = unit(rng.normal(size=(80, d))).astype(np.float32)  # nothing of the words is in it
    fold = np.arange(80) // 4 % 4
    unseen = fold[:, None] == np.arange(4)
    honest = fit(prompts, x, unseen, x, np.arange(80), fold)
    leaking = fit(prompts, x, np.zeros_like(unseen), x, np.arange(80), fold)
    assert honest.probabilities(x).std() < 0.5 * leaking.probabilities(x).std()


@pytest.mark.parametrize("prompts", [["a cat"] * 5, ["same word"] * 30, ["the of and"] * 30])
def test_without_words_to_tell_apart_there_are_none(prompts):
    x, fold = unit(rng.normal(size=(len(prompts), 8))), np.arange(len(prompts)) % 2
    found = fit(prompts, x, fold[:, None] == np.arange(2), x, np.arange(len(prompts)), fold)
    assert found.words == []
    assert found.most_probable(x, 5) == [[] for _ in prompts]


@pytest.fixture
def folder(tmp_path):
    """A folder as the stage writes it, with MiniLM for its encoder."""
    from img2prompt.prompts.encoder import EMBEDDED, Encoder

    encode = Encoder(EMBEDDED, "cpu")
    prompts = ["a photo of a cat in the rain", "a ship at night, pastel", "two dogs"]
    phrases, counts = zip(*mine(prompts), strict=True)
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "prompts.parquet")
    np.save(tmp_path / "prompts.npy", encode(prompts))
    Phrases(phrases, counts, encode([phrase.text for phrase in phrases])).save(tmp_path)
    weight = encode(["cat", "dog"])
    Vocabulary(["cat", "dog"], [3, 2], 20 * weight, np.full(2, -6, np.float32)).save(tmp_path)
    write_json(tmp_path / "words.json", {"encoder": EMBEDDED})
    return tmp_path


def test_a_folder_is_read_and_a_damaged_one_refused(folder, capfd):
    from img2prompt.prompts.encoder import EMBEDDED, Encoder

    words = Words.load(folder, "cpu")
    target = Encoder(EMBEDDED, "cpu")(["a photo of a cat at night"])
    capfd.readouterr()
    (said,) = words(target, top=1)
    assert said.prompt == "a photo of a cat at night"
    assert said.prompt_cosine == pytest.approx(1, abs=1e-4)  # in half precision, where the machine has it
    assert [word for word, _ in said.words] == ["cat"]
    assert [prompt for prompt, _ in said.nearest] == ["a photo of a cat in the rain"]
    assert capfd.readouterr().err == ""  # no bars within those of whoever asks

    shutil.copy(folder / "vocabulary.npy", folder / "phrases.npy")
    with pytest.raises(ValueError, match=r"phrases\.parquet has \d rows and phrases\.npy 2"):
        Words.load(folder, "cpu")
    (folder / "phrases.parquet").unlink()
    with pytest.raises(OSError, match=r"phrases\.parquet"):
        Words.load(folder, "cpu")
