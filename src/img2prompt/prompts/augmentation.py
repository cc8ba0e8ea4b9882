"""Augmentation of prompts: synonym replacement and random word shuffle (arXiv 2401.06167, section 3.5.1)."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

WORD = re.compile(r"\d*[^\W\d_]\w*(?:['’-]\w+)*")  # "girl's", "red-haired", "4k"; but no "1.2"
COMMA = re.compile(r"\s*,\s*")

# WordNet knows "a" as vitamin A, "in" as the inch and "he" as helium: words of grammar are never replaced.
GRAMMAR = frozenset(
    re.findall(
        r"\w+",
        """
        a an the and or nor but if so as at by for from in into of off on onto out over to under up
        with without i me my he him his she her it its we us our you your they them their this that
        these those who whom whose what which when where why how am is are was were be been being do
        does did has have had having can could may might must shall should will would no not all any
        both each few more most other such some one two than then there here just like only own same
        too very between before after during again once
        """,
    )
)


class WordNet(Mapping[str, tuple[str, ...]]):
    """The synonyms of a lower-case word in WordNet, looked up on demand.

    Only those of its first sense, the most frequent one: rarer senses would change what the prompt describes.
    """

    def __getitem__(self, word: str) -> tuple[str, ...]:
        """Raises KeyError for a word without synonyms."""
        from nltk.corpus import wordnet

        senses = [] if word in GRAMMAR else wordnet.synsets(word)
        names = senses[0].lemma_names() if senses else []
        synonyms = tuple(name.replace("_", " ") for name in names if name.lower() != word)
        if not synonyms:
            raise KeyError(word)
        return synonyms

    def __iter__(self) -> Iterator[str]:
        """The words that have synonyms; slow, as it looks up all of WordNet."""
        from nltk.corpus import wordnet

        words = (name.replace("_", " ") for name in wordnet.all_lemma_names())
        return (word for word in dict.fromkeys(words) if self.get(word))

    def __len__(self) -> int:
        """The number of words that have synonyms; as slow as `__iter__`."""
        return sum(1 for _ in self)


def thesaurus(name: str) -> Mapping[str, tuple[str, ...]]:
    """A mapping from a lower-case word to its synonyms.

    `built-in`: the groups of `thesaurus.txt`. `wordnet`: nltk's WordNet.

    Raises:
        ValueError: nltk's WordNet data is not installed.
    """
    if name == "wordnet":
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except LookupError:
            raise ValueError(
                "embed_prompts.thesaurus: nltk has no WordNet data here: run `python -m nltk.downloader wordnet`, "
                "or take `built-in`"
            ) from None
        return WordNet()
    lines = Path(__file__).with_name("thesaurus.txt").read_text(encoding="utf-8").splitlines()
    groups = [line.split() for line in lines if line and not line.startswith("#")]
    return {word: tuple(other for other in group if other != word) for group in groups for word in group}


def augment_prompt(
    prompt: str,
    rng: np.random.Generator,
    synonyms: Mapping[str, tuple[str, ...]],
    replace: float,
    shuffle: float,
) -> str:
    """A changed copy of the prompt that should describe the same image.

    Each word that `synonyms` knows is replaced with probability `replace`; a capital first letter stays one.
    Then, with probability `shuffle`, the words are shuffled: within each comma-separated phrase, and the
    phrases among themselves. So every word can move, but "red hair, blue coat" gets no blue hair. Punctuation
    stays with its phrase, nothing is lost, and a prompt with text in it never becomes empty.
    """

    def synonym(match: re.Match[str]) -> str:
        word = match[0]
        others = synonyms.get(word.lower(), ())
        if not others or rng.random() >= replace:
            return word
        other = others[rng.integers(len(others))]
        return other[0].upper() + other[1:] if word[0].isupper() else other

    def permuted(items: list[str]) -> list[str]:
        return [items[place] for place in rng.permutation(len(items))]

    def shuffled(phrase: str) -> str:
        words = iter(permuted(WORD.findall(phrase)))
        return WORD.sub(lambda _: next(words), phrase)

    prompt = WORD.sub(synonym, prompt)
    if rng.random() < shuffle:
        phrases, commas = COMMA.split(prompt), [*COMMA.findall(prompt), ""]
        phrases = [shuffled(phrase) for phrase in permuted(phrases)]
        prompt = "".join(phrase + comma for phrase, comma in zip(phrases, commas, strict=True))
    return prompt
