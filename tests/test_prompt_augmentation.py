import re
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.prompts.augmentation import WordNet, augment_prompt, thesaurus

SYNONYMS = {"big": ("large",), "house": ("home",), "old": ("very aged",)}
PROMPT = "Portrait of a red-haired girl, blue coat, (intricate:1.2), 4k, girl's cat"


def augmented(prompt, replace=0.0, shuffle=0.0, synonyms=SYNONYMS, seed=0):
    return augment_prompt(prompt, np.random.default_rng(seed), synonyms, replace, shuffle)


def phrases(prompt):
    """The words of each phrase, without regard to any order."""
    return sorted(sorted(phrase.split()) for phrase in prompt.split(", "))


def fake_wordnet(monkeypatch, load=lambda: None):
    senses = {
        "house": [["house", "dwelling_place"], ["firm"]],
        "a": [["angstrom"]],
        "lone": [["Lone"]],
    }
    wordnet = SimpleNamespace(
        ensure_loaded=load,
        synsets=lambda word: [SimpleNamespace(lemma_names=lambda names=names: names) for names in senses.get(word, [])],
        all_lemma_names=lambda: [*senses, "house"],
    )
    monkeypatch.setattr(nltk.corpus, "wordnet", wordnet)


def test_known_words_are_replaced_with_their_capital_and_punctuation():
    assert augmented("Big, (old) house; biggest!", replace=1) == "Large, (very aged) home; biggest!"


def test_nothing_changes_at_probability_zero():
    assert augmented(PROMPT) == PROMPT


def test_each_word_is_replaced_with_the_given_probability():
    words = augmented("big " * 4000, replace=0.3).split()
    assert 0.27 < words.count("large") / len(words) < 0.33


def test_every_synonym_is_chosen_sometimes():
    words = augmented("big " * 200, replace=1, synonyms={"big": ("large", "huge", "vast")}).split()
    assert set(words) == {"large", "huge", "vast"}


def test_a_shuffle_keeps_words_with_their_phrase():
    results = [augmented(PROMPT, shuffle=1, seed=seed) for seed in range(30)]
    for result in results:
        assert phrases(result) == phrases(PROMPT)
    assert len(set(results)) > 20
    assert len({frozenset(result.split(", ")[0].split()) for result in results}) == 5  # phrases move
    portrait = {next(phrase for phrase in result.split(", ") if "Portrait" in phrase) for result in results}
    assert len(portrait) > 5  # and so do the words in them


def test_a_prompt_is_shuffled_with_the_given_probability():
    prompt = "a b c d e f g h"
    changed = [augmented(prompt, shuffle=0.4, seed=seed) != prompt for seed in range(500)]
    assert 0.3 < np.mean(changed) < 0.5


def test_the_generator_alone_decides():
    assert augmented(PROMPT, 0.5, 1, seed=3) == augmented(PROMPT, 0.5, 1, seed=3)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.text("big old,. '-4\0\n", max_size=30), st.integers(0, 5))
def test_no_text_is_lost(prompt, seed):
    result = augmented(prompt, replace=1, shuffle=1, seed=seed)
    assert bool(result.strip()) == bool(prompt.strip())
    shuffled = augmented(prompt, shuffle=1, seed=seed)
    assert sorted(shuffled) == sorted(prompt)


def test_without_wordnet_our_own_groups_serve(monkeypatch):
    def missing():
        raise LookupError("Resource wordnet not found")

    fake_wordnet(monkeypatch, load=missing)
    with pytest.raises(ValueError, match=r"embed_prompts\.thesaurus: nltk has no WordNet data"):
        thesaurus("wordnet")
    synonyms = thesaurus("built-in")
    assert len(synonyms) > 1000
    for word, others in synonyms.items():
        assert re.fullmatch("[a-z]+(-[a-z]+)*", word)
        assert others
        assert all(word in synonyms[other] and other != word for other in others)
    assert "large" in synonyms["big"]
    assert augmented("a big forest", replace=1, synonyms=synonyms).split()[0] == "a"


def test_wordnet_serves_where_it_is_installed(monkeypatch):
    fake_wordnet(monkeypatch)
    synonyms = thesaurus("wordnet")
    assert synonyms["house"] == ("dwelling place",)
    assert dict(synonyms) == {"house": ("dwelling place",)}
    assert len(synonyms) == 1
    assert augmented("A lone House", replace=1, synonyms=synonyms) == "A lone Dwelling place"
    for word in ("a", "lone", "unheard-of"):  # a word of grammar; only itself; unknown
        with pytest.raises(KeyError):
            WordNet()[word]
