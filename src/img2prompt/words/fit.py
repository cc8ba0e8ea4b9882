"""The word map, fitted in closed form on the targets, and its probabilities, calibrated on out-of-fold predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.special import logit
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import LogisticRegression

from img2prompt.core.blocks import Stack, blocks
from img2prompt.prompts.augmentation import WORD
from img2prompt.words.vocabulary import Vocabulary

MOST, LEAST = 1000, 20  # words of a vocabulary; distinct prompts that a word is in
PAIRS = 2_000_000  # of a prediction and a word, about as many as calibrate at most
STRENGTHS = 10.0 ** np.arange(-4, 4.25, 0.25)  # of the ridge regression, as multiples of the mean variance of a column


def frequent(prompts: Sequence[str]) -> list[str]:
    """The words of a vocabulary, commonest first: at most MOST, each in at least LEAST of the distinct prompts."""
    counts = Counter(word for prompt in prompts for word in sorted(_words(prompt) - ENGLISH_STOP_WORDS))
    return [word for word, count in counts.most_common(MOST) if count >= LEAST]


def which(prompts: Sequence[str], words: Sequence[str]) -> csr_array:
    """Which of n prompts says which of w words, in lower case: (n, w) float64, 0 or 1."""
    place = {word: i for i, word in enumerate(words)}
    rows = [sorted(place[word] for word in _words(prompt) if word in place) for prompt in prompts]
    columns = np.array([column for row in rows for column in row], dtype=np.int64)
    ends = np.cumsum([0, *map(len, rows)])
    return csr_array((np.ones(len(columns)), columns, ends), (len(prompts), len(words)))


def _words(prompt: str) -> set[str]:
    return {word.lower() for word in WORD.findall(prompt)}


@dataclass(frozen=True, eq=False)
class WordMap:
    """A ridge regression from embeddings to the words that they say: `(x - mean) @ weight + bias`.

    mean (d,), weight (d, w), bias (w,): float64.
    """

    mean: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    strength: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The scores (m, w) of embeddings (m, d)."""
        return (x - self.mean) @ self.weight + self.bias


def ridge(embeddings: np.ndarray | Stack, says: csr_array, rows: np.ndarray, strength: float | None = None) -> WordMap:
    """The closed form from some rows (m,) of embeddings (n, d) to the words that they say (n, w), 0 or 1.

    Without a strength, generalised cross-validation (Golub, Heath and Wahba 1979) chooses among STRENGTHS: by the
    squared error of each word, of a row from which nothing was learned.
    """
    n, d = len(rows), embeddings.shape[1]
    sums, gram, products = np.zeros(d), np.zeros((d, d)), np.zeros((d, says.shape[1]))
    for part in blocks(n):
        x, y = embeddings[rows[part]].astype(np.float64), says[rows[part]]
        sums, gram, products = sums + x.sum(0), gram + x.T @ x, products + (y.T @ x).T
    mean, bias = sums / n, says[rows].sum(axis=0) / n
    values, vectors = np.linalg.eigh(gram - n * np.outer(mean, mean))
    values = np.maximum(values, 1e-9)
    turned = vectors.T @ (products - n * np.outer(mean, bias))
    if strength is None:
        total, explained = n * (bias * (1 - bias)).sum(), np.square(turned).sum(axis=1) / values

        def error(tried: float) -> float:
            shrink = values / (values + tried)
            freedom = 1 + shrink.sum()
            left = total - (explained * shrink * (2 - shrink)).sum()
            return left / (1 - freedom / n) ** 2 if freedom < n else np.inf

        strength = float(min(STRENGTHS * values.mean(), key=error))
    return WordMap(mean, vectors @ (turned / (values + strength)[:, None]), bias, strength)


def fit(
    prompts: Sequence[str],
    embeddings: np.ndarray | Stack,
    left_out: np.ndarray,
    predictions: np.ndarray,
    said: np.ndarray,
    fold: np.ndarray,
) -> Vocabulary:
    """The vocabulary of n distinct prompts: a linear map to its words, with probabilities calibrated by Platt's method.

    Of a word's score the logit of its probability is a * z + b * l + c * z * l + e, where z is the score at mean 0 and
    standard deviation 1 over the predictions, and l the logit of the share of prompts with the word. The four are
    fitted on predictions out of fold, whose scores are by maps from which their folds' prompts were left out. Without
    enough prompts there are no words.

    Args:
        prompts, embeddings: n and their targets (n, d) float32, norm 1.
        left_out: (n, k) bool: the prompts that a model of each of k folds has not seen.
        predictions: (m, d) float32, norm 1: each by a model that has not seen its fold.
        said: (m,) int: the true prompt of each.
        fold: (m,) int: its column of left_out.
    """
    words = frequent(prompts)
    says = which(prompts, words)
    some = np.linspace(0, len(said) - 1, min(len(said), PAIRS // max(len(words), 1))).astype(int)
    predictions, fold, labels = predictions[some], fold[some], says[said[some]].toarray()
    if not 0 < labels.sum() < labels.size:
        return Vocabulary([], [], np.zeros((0, embeddings.shape[1]), np.float32), np.zeros(0, np.float32))
    rows = np.arange(len(prompts))
    whole = ridge(embeddings, says, rows)
    scores = np.empty(labels.shape)
    for number in np.unique(fold):
        without = ridge(embeddings, says, rows[~left_out[:, number]], whole.strength)
        scores[fold == number] = without(predictions[fold == number])
    centre, spread = scores.mean(axis=0), scores.std(axis=0) + 1e-9
    counts = says.sum(axis=0)
    prior = logit((counts + 0.5) / (len(prompts) + 1))
    z, priors = (scores - centre) / spread, np.broadcast_to(prior, scores.shape)
    features = np.stack([z, priors, z * priors], axis=-1).reshape(-1, 3)
    platt = LogisticRegression(C=np.inf, max_iter=1000).fit(features, labels.ravel())
    a, b, c = platt.coef_[0]
    slope = (a + c * prior) / spread
    bias = slope * (whole.bias - whole.mean @ whole.weight - centre) + b * prior + platt.intercept_[0]
    weight = (slope * whole.weight).T
    return Vocabulary(words, counts.astype(int).tolist(), weight.astype(np.float32), bias.astype(np.float32))
