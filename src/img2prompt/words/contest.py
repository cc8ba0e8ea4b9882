"""The contest for a prompt: which of many candidates has the embedding nearest to a predicted one?

As in CLIP Interrogator (github.com/pharmapsychotic/clip-interrogator) candidates are put together from phrases, and the
nearest wins; here the prompt's own sentence encoder judges, not CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from img2prompt.words.phrases import KINDS, Phrase, Phrases, join, split

# Chosen out of fold (`bench/words.py --fold`): more of them bring prompts little nearer to the truth, at more cost.
ROUNDS = 3  # changes of a chain
TRIED = 16  # candidates that are embedded in a round of a chain
GAIN = 0.02  # of cosine: what a change must bring, or the prompt would grow for nothing
SHORTLIST = {"medium": 24, "subject": 64, "modifier": 96}  # the nearest phrases, from which a chain's changes are made
EDITED = 64  # phrases of a nearest prompt, up to which it is changed
PART = 0.5  # about what a phrase that is added changes an embedding by, as a share of the phrase's own


@dataclass
class _Entry:
    """A prompt in the contest for a target (d,): its phrases, its text, its embedding (d,), and their cosine.

    short: the places of the phrases that it may be changed by. open: whether it may still be changed.
    """

    row: int
    target: np.ndarray
    short: np.ndarray
    phrases: list[Phrase]
    text: str
    embedding: np.ndarray
    cosine: float
    open: bool


class Contest:
    """Composes prompts from phrases.

    Args:
        phrases: those that candidates are made of.
        encode: embeds texts to (n, d) float32, norm 1.
    """

    def __init__(self, phrases: Phrases, encode: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._phrases, self._encode = phrases, encode
        self._kinds = np.array([phrase.kind for phrase in phrases.phrases], dtype=object)
        self._of_kind = {kind: np.flatnonzero(self._kinds == kind) for kind in KINDS}
        self._place = {phrase.text: place for place, phrase in enumerate(phrases.phrases)}

    def __call__(self, targets: np.ndarray, prompts: Sequence[str], embeddings: np.ndarray) -> list[tuple[str, float]]:
        """For each of m targets the prompt whose embedding is nearest to it among the candidates, and its cosine.

        The candidates are the target's nearest prompt, the nearest phrase, and what two chains end at: the nearest
        subject with phrases added, and the nearest prompt with phrases added, exchanged and left out. A chain makes at
        most ROUNDS changes, each the best of TRIED, each worth GAIN. Embedded are, for a target, at most EDITED phrases
        and 2 * ROUNDS * TRIED candidates, those of all targets together.

        Args:
            targets: (m, d) float32, norm 1.
            prompts: the m nearest prompts.
            embeddings: (m, d) float32, norm 1: theirs.
        """
        parts = [split(prompt) for prompt in prompts]
        parts = [found if len(found) <= EDITED else [] for found in parts]
        lacking = [phrase.text for found in parts for phrase in found if phrase.text not in self._place]
        known = dict(zip(lacking, self._encode(lacking), strict=True))
        entries = []
        for row, (target, similarity) in enumerate(zip(targets, targets @ self._phrases.embeddings.T, strict=True)):
            short = self._shortlist(similarity)
            cosine = float(embeddings[row] @ target)
            phrases = parts[row]
            entries.append(_Entry(row, target, short, phrases, prompts[row], embeddings[row], cosine, bool(phrases)))
            subjects = short[self._kinds[short] == "subject"][:1].tolist()
            for place in dict.fromkeys([*subjects, *([int(similarity.argmax())] if len(similarity) else [])]):
                phrase, embedding = self._phrases.phrases[place], self._phrases.embeddings[place]
                cosine = float(embedding @ target)
                entries.append(_Entry(row, target, short, [phrase], phrase.text, embedding, cosine, place in subjects))
        for _ in range(ROUNDS):
            self._advance([entry for entry in entries if entry.open], known)
        best: dict[int, _Entry] = {}
        for entry in entries:
            if entry.row not in best or entry.cosine > best[entry.row].cosine:
                best[entry.row] = entry
        return [(entry.text, entry.cosine) for entry in best.values()]

    def _shortlist(self, similarity: np.ndarray) -> np.ndarray:
        """The places of the phrases nearest to a target, those of a kind together, nearest first."""
        nearest = (
            places[np.argsort(-similarity[places], kind="stable")[: SHORTLIST[kind]]]
            for kind, places in self._of_kind.items()
        )
        return np.concatenate([*nearest])

    def _advance(self, entries: Sequence[_Entry], known: Mapping[str, np.ndarray]) -> None:
        """Give every entry the best of the changes that are tried on it, or close it."""
        tried = [self._changes(entry, known) for entry in entries]
        texts = [join(phrases) for changes in tried for phrases in changes]
        embedded, start = self._encode(texts), 0
        for entry, changes in zip(entries, tried, strict=True):
            cosines = embedded[start : start + len(changes)] @ entry.target
            best = int(cosines.argmax()) if len(cosines) else 0
            entry.open = len(cosines) > 0 and float(cosines[best]) >= entry.cosine + GAIN
            if entry.open:
                entry.phrases, entry.text = changes[best], texts[start + best]
                entry.embedding, entry.cosine = embedded[start + best], float(cosines[best])
            start += len(changes)

    def _changes(self, entry: _Entry, known: Mapping[str, np.ndarray]) -> list[list[Phrase]]:
        """The TRIED changes of an entry that promise most: a phrase added, left out, or exchanged for one of its kind.

        What they promise is told without embedding them, from c + PART * (added - left out) with c the entry's own.
        """
        table, present = self._phrases, set(entry.phrases)
        short = np.array([place for place in entry.short if table.phrases[place] not in present], dtype=np.int64)
        none = np.zeros((1, len(entry.target)), np.float32)
        old = [known[p.text] if p.text in known else table.embeddings[self._place[p.text]] for p in entry.phrases]
        new, old = np.concatenate([none, table.embeddings[short]]), np.concatenate([none, old])
        dots = (new @ entry.target)[:, None] - (old @ entry.target)[None]
        along = (new @ entry.embedding)[:, None] - (old @ entry.embedding)[None]
        squares = np.square(new).sum(1)[:, None] + np.square(old).sum(1)[None] - 2 * new @ old.T
        promise = (entry.cosine + PART * dots) / np.sqrt(1 + PART * (2 * along + PART * squares))

        old_kinds = np.array(["", *(phrase.kind for phrase in entry.phrases)], dtype=object)
        new_kinds = np.array(["", *self._kinds[short]], dtype=object)
        allowed = new_kinds[:, None] == old_kinds[None]
        allowed[:, 0] = (new_kinds == "modifier") | (new_kinds == "subject")
        if entry.phrases[0].kind == "subject":
            allowed[:, 0] |= new_kinds == "medium"
        allowed[0] = old_kinds != "subject"
        allowed[0, 0] = False
        promise[~allowed] = -np.inf
        order = np.argsort(-promise, axis=None, kind="stable")[: min(TRIED, int(allowed.sum()))]
        places = zip(*np.unravel_index(order, promise.shape), strict=True)
        return [_changed(entry.phrases, table.phrases[short[i - 1]] if i else None, j - 1) for i, j in places]


def _changed(phrases: Sequence[Phrase], added: Phrase | None, at: int) -> list[Phrase]:
    """The phrases with one added (at -1), or the one at `at` left out or exchanged.

    A medium is added at the front, what opens with a connective before the modifiers at the end, others behind.
    """
    if at >= 0:
        return [*phrases[:at], *([added] if added else []), *phrases[at + 1 :]]
    if added.kind == "medium":
        return [added, *phrases]
    bound = [place for place, phrase in enumerate(phrases) if phrase.opens or phrase.kind != "modifier"]
    at = 1 + bound[-1] if added.opens and bound else len(phrases)
    return [*phrases[:at], added, *phrases[at:]]
