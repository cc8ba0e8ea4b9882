"""Ridge regression in closed form, where both heads start."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from img2prompt.core.blocks import Stack, blocks
from img2prompt.model_a.validation import draw_groups

CHOOSING = 10_000  # rows, at most, that choose a strength
TOGETHER = 512  # rows whose groups are left out at once: as many as the processor's caches hold
Rows = np.ndarray | Stack | Tensor


@dataclass(frozen=True)
class Ridge:
    """A closed-form ridge regression: `(features - mean) / std @ weight.T + bias`.

    All tensors are float32: `mean` and `std` (d,), `weight` (t, d), `bias` (t,). `score` is the mean cosine over the
    rows it was fitted on, each predicted without its group, at the best of the strengths tried and of the `share`s
    of the text prior; `prior` (t, d) is what the weights shrink towards, None for zero.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    strength: float
    share: float
    score: float
    prior: Tensor | None = None


@dataclass(frozen=True)
class TextPrior:
    """CLIP text embeddings and their targets, as a prior for a ridge regression on image features.

    `texts` (m, k) are CLIP text embeddings and `targets` (m, t) those of the same prompts. The first n belong to the n
    rows that the regression is fitted on; the others need no image. `projection` (d, k) is CLIP's, from its pooled
    image features to the space of its text embeddings.
    """

    texts: Rows
    targets: Rows
    projection: Rows


class _Standardised:
    """Features (n, d) at mean 0 and standard deviation 1, float64, by rows: (m, p).

    Fewer rows than features are given in the p = n dimensions that they span, where any fit has its weight.
    """

    def __init__(self, features: Rows, mean: Tensor, std: Tensor) -> None:
        self.features, self.mean, self.std, self.axes = features, mean.double(), std.double(), None
        if len(features) < features.shape[1]:
            self.axes = torch.linalg.qr(self[:].T).Q

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.features)

    def __getitem__(self, rows: slice | np.ndarray) -> Tensor:
        """Some rows, (m, p)."""
        return self.turn((_double(self.features[rows]) - self.mean) / self.std)

    def turn(self, x: Tensor) -> Tensor:
        """Rows (m, d) in the p dimensions."""
        return x if self.axes is None else x @ self.axes

    def turn_back(self, x: Tensor) -> Tensor:
        """Rows (m, p) in the d dimensions."""
        return x if self.axes is None else x @ self.axes.T


@dataclass(frozen=True)
class _Sums:
    """What a fit needs to know of rows x (n, p) and targets (n, t), float64; those of other rows can be added."""

    count: int
    x: Tensor  # (p,)
    targets: Tensor  # (t,)
    gram: Tensor  # (p, p)
    product: Tensor  # (p, t)

    @classmethod
    def of(cls, x: Tensor, targets: Tensor) -> _Sums:
        gram = x.new_empty(x.shape[1], x.shape[1])
        for part in blocks(len(gram), 256):  # it is symmetric: a third of the work or more is saved
            product = x[:, part].T @ x[:, part.start :]
            gram[part, part.start :], gram[part.start :, part] = product, product.T
        return cls(len(x), x.sum(0), targets.sum(0), gram, x.T @ targets)

    @classmethod
    def by_blocks(cls, x: _Standardised, targets: Rows) -> _Sums:
        return _total(cls.of(x[rows], _double(targets[rows])) for rows in blocks(len(x)))

    def __add__(self, other: _Sums) -> _Sums:
        """The sums over both."""
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def centred(self) -> tuple[Tensor, Tensor]:
        """The Gram matrix (p, p) and the products (p, t) of the rows at mean 0."""
        mean = self.x / self.count
        return self.gram - torch.outer(mean, self.x), self.product - torch.outer(mean, self.targets)

    def fit(self, x: _Standardised, strength: float, prior: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weight (t, d), shrunk towards `prior` (t, d), and the bias (t,)."""
        inner, outputs = self.centred()
        if prior is not None:
            outputs -= inner @ x.turn(prior).T
        inner.diagonal().add_(strength)
        weight = torch.cholesky_solve(outputs, torch.linalg.cholesky(inner)).T
        seen = weight if prior is None else weight + x.turn(prior)
        weight = x.turn_back(weight)
        weight = weight if prior is None else weight + prior
        return weight, (self.targets - seen @ self.x) / self.count


def _total(parts: Iterable[_Sums]) -> _Sums:
    return functools.reduce(operator.add, parts)


def _double(rows: Rows) -> Tensor:
    return torch.from_numpy(np.asarray(rows, dtype=np.float64))


def _scale(features: Rows) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of features (n, d), float32 (d,)."""
    parts, n = list(blocks(len(features))), len(features)
    mean = sum(_double(features[rows]).sum(0) for rows in parts) / n
    variance = sum((_double(features[rows]) - mean).square().sum(0) for rows in parts) / (n - 1)
    return mean.float(), variance.sqrt().float() + 1e-6


@dataclass(frozen=True)
class _Sizes:
    """Rows in the order of the sizes of their groups. order (n,) int64; shapes: m groups of a size g, and so on.

    Rows of a group are next to each other, so those of m groups of one size are a view (m, g, ...).
    """

    order: np.ndarray
    shapes: list[tuple[int, int]]  # m, g: of at most TOGETHER rows, or one group

    @classmethod
    def of(cls, groups: np.ndarray) -> _Sizes:
        _, own, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        if len(sizes) == 1:  # without its group nothing would be left to predict a row from
            own, sizes = np.arange(len(groups)), np.ones(len(groups), dtype=np.int64)
        shapes = []
        for g, count in zip(*(found.tolist() for found in np.unique(sizes, return_counts=True)), strict=True):
            shapes += [(part.stop - part.start, g) for part in blocks(count, max(1, TOGETHER // g))]
        return cls(np.lexsort((own, sizes[own])), shapes)

    @property
    def mean(self) -> float:
        """The mean over rows of the size of their group."""
        return sum(m * g * g for m, g in self.shapes) / len(self.order)

    def views(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of tensors (n, c) in this order, for every shape, their views (m, g, c)."""
        start = 0
        for m, g in self.shapes:
            yield tuple(x[start : start + m * g].view(m, g, -1) for x in rows)
            start += m * g


class _Basis:
    """Rows (n, p), in the order of sizes, in a basis in which a fit of `count` rows is basis @ diag(s) @ basis.T."""

    def __init__(self, rows: Tensor, sizes: _Sizes, count: int) -> None:
        self.rows, self.sizes, self.intercept = rows, sizes, 1 / count
        # Of groups with more rows than the basis has columns: the rows' products, (m, p + 1, p + 1).
        self.grams = [
            torch.stack([wide.T @ wide for wide in map(self._wide, own)]) if own.shape[1] > own.shape[2] else None
            for (own,) in sizes.views(rows)
        ]

    def _wide(self, rows: Tensor) -> Tensor:
        """Rows (g, p) with the intercept's column: (g, p + 1)."""
        return torch.cat([rows, rows.new_full((len(rows), 1), math.sqrt(self.intercept))], dim=1)

    def leave_out(self, residual: Tensor, shrink: Tensor) -> None:
        """Turn residuals (n, o) of the fit of all rows into those of fits without each row's group, in place.

        With C = [basis @ diag(sqrt(s)), intercept] of a group, and r its residuals, these are (I - C C')^-1 r, or by
        Woodbury's identity r + C (I - C'C)^-1 C' r: the smaller of the two systems is solved.
        """
        scale = torch.cat([shrink.sqrt(), shrink.new_ones(1)])
        for (rows, left), grams in zip(self.sizes.views(self.rows, residual), self.grams, strict=True):
            if grams is None:
                hat = (rows * shrink) @ rows.mT + self.intercept
                # Not `solve`, which copies the many right sides to and fro.
                left.copy_(torch.linalg.inv(torch.eye(rows.shape[1], dtype=hat.dtype) - hat) @ left)
                continue
            for own, r, gram in zip(rows, left, grams, strict=True):
                wide = self._wide(own)
                inner = torch.eye(len(scale), dtype=gram.dtype) - gram * torch.outer(scale, scale)
                pull = torch.linalg.solve(inner, scale[:, None] * (wide.T @ r))
                r += wide @ (scale[:, None] * pull)


class _Spectrum:
    """The eigendecomposition from which the fits of every strength to rows x (n, p), outputs (n, o) of mean 0 follow.

    Only it is float64: what chooses a strength is float32, at half the time.
    """

    def __init__(self, x: Tensor, gram: Tensor, outputs: Tensor, sizes: _Sizes) -> None:
        values, vectors = torch.linalg.eigh(gram)
        self.values, self.outputs = values.clamp(min=0).float(), outputs.float()
        # Rows in the eigenbasis: the fit at strength s is basis @ diag(shrink(s)) @ basis.T @ outputs.
        self.basis = _Basis(((x @ vectors) / values.clamp(min=1e-9).sqrt()).float(), sizes, len(x))
        self.projected = self.basis.rows.T @ self.outputs

    def left_out(self, strength: float) -> Tensor:
        """Outputs minus each row's prediction without the rows of its group, (n, o)."""
        shrink = self.values / (self.values + strength)
        residual = torch.addmm(self.outputs, self.basis.rows, shrink[:, None] * self.projected, alpha=-1)
        self.basis.leave_out(residual, shrink)
        return residual

    def expected(self, strength: float, count: int, size: float) -> float:
        """About the squared error of the first `count` outputs of rows predicted without `size` rows like them.

        That is generalised cross-validation (Golub, Heath and Wahba 1979), which knows no groups, for a size of 1. It
        is infinite where without so many rows nothing would be left to fit, as may be with fewer rows than features.
        """
        kept = strength / (self.values.double() + strength)  # of the outputs, by direction; a fit explains the rest
        squares = self.projected[:, :count].double().square().sum(dim=1)
        total = self.outputs[:, :count].double().square().sum()
        beside = total - squares.sum()  # no direction has it; less than single precision can tell is nothing
        error = (squares * kept.square()).sum() + (beside if beside > 1e-6 * total else 0)
        lever = (size * (1 + (1 - kept).sum()) / len(self.outputs)).item()
        return error.item() / (1 - lever) ** 2 if lever < 1 else math.inf


class _Texts:
    """The ridge regression from CLIP's text embeddings to the targets, and what it says of the chosen rows' texts."""

    def __init__(self, prior: TextPrior, groups: np.ndarray, chosen: np.ndarray, sizes: _Sizes) -> None:
        others = groups.max() + 1 + np.arange(len(prior.texts) - len(groups))
        text = ridge(prior.texts, prior.targets, np.concatenate([groups, others]))
        texts = _Standardised(prior.texts, text.mean, text.std)
        gram, _ = _Sums.by_blocks(texts, prior.targets).centred()
        gram.diagonal().add_(text.strength)
        c = texts[chosen]
        self.translate, self.std, self.sizes = text.weight.double().T, text.std.double(), sizes  # (k, t)
        # Without its group's texts a row's translation changes by lever' of them times what is wrong with them.
        self.lever = torch.cholesky_solve(c.T, torch.linalg.cholesky(gram)).T
        self.wrong = _double(prior.targets[chosen]) - text.bias.double() - c @ texts.turn(self.translate.T).T
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), c.T, upper=False).T
        _Basis(root, sizes, len(texts)).leave_out(self.wrong, torch.ones(root.shape[1], dtype=root.dtype))
        self.lever = texts.turn_back(self.lever)

    def __call__(self, projected: Tensor) -> Tensor:
        """Of projected features (n, k), what the regression without each row's group makes of them: (n, t)."""
        added = projected @ self.translate
        for q, lever, wrong, own in self.sizes.views(projected, self.lever, self.wrong, added):
            # The cheaper order of the two.
            own -= q @ lever.mT @ wrong if q.shape[1] < q.shape[2] else q @ (lever.mT @ wrong)
        return added


def _chosen(groups: np.ndarray) -> np.ndarray:
    """The rows that the strength is chosen on: all, or of very many whole groups that are drawn at random."""
    if len(groups) <= CHOOSING:
        return np.arange(len(groups))
    drawn = draw_groups(groups, CHOOSING, 0)
    if len(np.unique(groups[drawn])) < 2:  # groups as large as that: some of their rows
        return np.sort(np.random.default_rng(0).permutation(len(groups))[:CHOOSING])
    return np.flatnonzero(drawn)


def ridge(features: Rows, targets: Rows, groups: np.ndarray | None = None, prior: TextPrior | None = None) -> Ridge:
    """Fit strengths from one eigendecomposition; return the best by leave-one-group-out, also in closed form.

    Features are standardised to mean 0 and standard deviation 1 first, so that a strength penalises them alike. The
    strengths go from hardly any penalty to one that leaves the mean target alone, each about 1.8 times the last, so
    that the best one is inside. Generalised cross-validation, without groups and as if their rows were alike, says
    where to begin; from there the score is climbed, by four strengths at a time, then by two and by one. Of more than
    CHOOSING rows so many choose, in whole groups: a strength is the ratio of noise to signal, which more rows do not
    change. The fit is to all rows, which are read by blocks.

    With a prior, weights shrink towards a share of another ridge regression in place of towards zero: the one from
    CLIP's text embeddings to the targets, applied to the projected image features. The share is chosen with the
    strength, and a group's texts are left out with its images; a share of 0 is the regression without prior.

    Args:
        features: (n, d) float32.
        targets: (n, t) float32, rows of norm 1.
        groups: (n,) int; rows of one group are predicted without each other. None: each row is a group.
        prior: see TextPrior.
    """
    groups = np.arange(len(features)) if groups is None else groups
    x = _Standardised(features, *_scale(features))
    sums = _Sums.by_blocks(x, targets)
    chosen = _chosen(groups)
    sizes = _Sizes.of(groups[chosen])
    chosen = chosen[sizes.order]
    some, t = x[chosen], _double(targets[chosen])
    gram, _ = (sums if len(some) == len(x) else _Sums.of(some, t)).centred()
    some = some - some.mean(0)
    outputs = t - t.mean(0)
    shares = torch.linspace(0, 1.5, 31, dtype=torch.double) if prior else torch.zeros(1, dtype=torch.double)
    if prior:
        texts = _Texts(prior, groups, chosen, sizes)
        project = x.std[:, None] * _double(prior.projection) / texts.std
        turned = x.turn(project.T).T
        # Scaled to the spread of the standardised texts, so that a share of 1 is the text regression as it is.
        spread = ((sums.gram @ turned * turned).sum() / (len(x) * turned.shape[1])).sqrt()
        project, turned = project / spread, turned / spread
        outputs = torch.cat([outputs, some @ turned], dim=1)

    strengths = (len(some) * 10 ** torch.linspace(-3, 4, 29)).tolist()
    spectrum = _Spectrum(some, gram, outputs, sizes)
    t = t.float()

    @functools.cache
    def judged(place: int) -> tuple[float, float, float]:
        left_out = spectrum.left_out(strengths[place])
        predicted = t - left_out[:, : t.shape[1]]
        scores = ((predicted * t).sum(1) / predicted.norm(dim=1).clamp(min=1e-8)).mean()[None]
        if prior:
            # Of a row's projected features, what the other rows do not explain: only this part of the prior stays.
            added = texts(left_out[:, t.shape[1] :].double())
            aa, ab, bb = (predicted * predicted).sum(1), (predicted * added).sum(1), (added * added).sum(1)
            norms = (aa[:, None] + 2 * shares * ab[:, None] + shares**2 * bb[:, None]).sqrt()
            dots = (predicted * t).sum(1)[:, None] + shares * (added * t).sum(1)[:, None]
            scores = (dots / norms).mean(0)
        best = int(scores.argmax())
        return scores[best].item(), strengths[place], shares[best].item()

    places = range(len(strengths))

    def climbed(place: int, step: int) -> int:
        best = max((near for near in (place, place - step, place + step) if near in places), key=judged)
        return best if best == place else climbed(best, step)

    starts = {  # of equals the largest
        min(places[::-1], key=lambda place: spectrum.expected(strengths[place], t.shape[1], of))
        for of in (1, sizes.mean)
    }
    best = max((climbed(place, 4) for place in sorted(starts)), key=judged)
    for step in (2, 1):
        best = climbed(best, step)
    score, strength, share = judged(best)
    towards = share * (project @ texts.translate).T if prior else None
    weight, bias = sums.fit(x, strength, towards)
    towards = None if towards is None else towards.float()
    return Ridge(x.mean.float(), x.std.float(), weight.float(), bias.float(), strength, share, score, towards)


def refit(found: Ridge, features: Rows, targets: Rows, left_out: Sequence[np.ndarray]) -> list[Ridge]:
    """Fit a ridge regression again without some of its rows: with the same standardisation, strength and prior.

    Args:
        found: what `ridge` made of the features (n, d) and the targets (n, t), float32.
        left_out: for each fit the rows that it is without, a mask (n,) that spares at least one.
    """
    x = _Standardised(features, found.mean, found.std)
    prior = None if found.prior is None else found.prior.double()
    # Rows that the same fits are without are summed up once.
    alike, own = np.unique(np.stack(left_out, axis=1), axis=0, return_inverse=True)
    parts = [np.flatnonzero(own.ravel() == number) for number in range(len(alike))]
    sums = [
        _total(_Sums.of(x[rows[some]], _double(targets[rows[some]])) for some in blocks(len(rows))) for rows in parts
    ]
    fits = []
    for number in range(len(left_out)):
        rest = _total(own for out, own in zip(alike[:, number], sums, strict=True) if not out)
        weight, bias = rest.fit(x, found.strength, prior)
        fits.append(replace(found, weight=weight.float(), bias=bias.float()))
    return fits
