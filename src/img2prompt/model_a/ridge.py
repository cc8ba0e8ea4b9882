"""Ridge regression in closed form, where both heads start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional


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

    texts: Tensor
    targets: Tensor
    projection: Tensor


class _Spectrum:
    """The eigendecomposition from which the fits of every strength on rows x (n, d) of mean 0 follow."""

    def __init__(self, x: Tensor, groups: np.ndarray) -> None:
        # The smaller of the two Gram matrices; either gives the same fit.
        self.x, self.dual = x, len(x) <= x.shape[1]
        values, self.vectors = torch.linalg.eigh(x @ x.T if self.dual else x.T @ x)
        self.values = values.clamp(min=0)
        # Rows in the eigenbasis: the fit at strength s is basis @ diag(shrink(s)) @ basis.T @ outputs.
        self.basis = self.vectors if self.dual else (x @ self.vectors) / self.values.clamp(min=1e-9).sqrt()
        if len(np.unique(groups)) == 1:  # without its group nothing would be left to predict a row from
            groups = np.arange(len(groups))
        members = pd.Series(np.arange(len(groups))).groupby(groups).agg(list)
        self.groups = [
            torch.tensor(np.stack(alike.to_list())) for _, alike in members.groupby(members.map(len))
        ]  # of every size g, the rows of the m groups of that size: (m, g)
        # Of groups with more rows than the eigenbasis has columns p: the rows' products, (m, p + 1, p + 1).
        self.grams = {
            number: torch.stack([wide.T @ wide for wide in map(self._wide, rows)])
            for number, rows in enumerate(self.groups)
            if rows.shape[1] > self.basis.shape[1]
        }

    def _wide(self, rows: Tensor) -> Tensor:
        """The basis of rows (g,) with the intercept's column: (g, p + 1)."""
        intercept = self.basis.new_full((len(rows), 1), 1 / math.sqrt(len(self.x)))
        return torch.cat([self.basis[rows], intercept], dim=1)

    def left_out(self, outputs: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
        """For each strength, outputs (n, o) of mean 0 minus each row's prediction without the rows of its group.

        With C = [rooted basis, intercept] of a group, and r its residuals in the fit of all rows, these are
        (I - C C')^-1 r, or by Woodbury's identity r + C (I - C'C)^-1 C' r: the smaller of the two systems is solved.
        """
        projected = self.basis.T @ outputs
        for strength in strengths:
            shrink = self.values / (self.values + strength)
            residual = outputs - self.basis @ (shrink[:, None] * projected)
            rooted = self.basis * shrink.sqrt()
            scale = torch.cat([shrink.sqrt(), shrink.new_ones(1)])
            for number, rows in enumerate(self.groups):
                if number in self.grams:
                    for own, gram in zip(rows, self.grams[number], strict=True):
                        wide = self._wide(own)
                        inner = torch.eye(len(scale), dtype=gram.dtype) - gram * torch.outer(scale, scale)
                        pull = torch.linalg.solve(inner, scale[:, None] * (wide.T @ residual[own]))
                        residual[own] += wide @ (scale[:, None] * pull)
                else:
                    block = rooted[rows]
                    hat = block @ block.mT + 1 / len(self.x)  # the last term is the intercept's
                    residual[rows] = torch.linalg.solve(torch.eye(rows.shape[1], dtype=hat.dtype) - hat, residual[rows])
            yield residual

    def weight(self, outputs: Tensor, strength: float) -> Tensor:
        """The fit's weight (o, d)."""
        inner = self.vectors / (self.values + strength) @ self.vectors.T
        return (self.x.T @ (inner @ outputs) if self.dual else inner @ (self.x.T @ outputs)).T


def ridge(features: Tensor, targets: Tensor, groups: np.ndarray | None = None, prior: TextPrior | None = None) -> Ridge:
    """Fit every strength from one eigendecomposition; return the best by leave-one-group-out, also in closed form.

    Features are standardised to mean 0 and standard deviation 1 first, so that a strength penalises them alike. The
    strengths go from hardly any penalty to one that leaves the mean target alone, each about 1.8 times the last, so
    that the best one is inside.

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
    centre, std = features.mean(0), features.std(0) + 1e-6
    x, t = ((features - centre) / std).double(), targets.double()
    mean = t.mean(0)
    outputs, spectrum = t - mean, _Spectrum(x, groups)
    shares = torch.linspace(0, 1.5, 31, dtype=torch.double) if prior else torch.zeros(1, dtype=torch.double)
    if prior:
        others = groups.max() + 1 + np.arange(len(prior.texts) - len(x))
        text_groups = np.concatenate([groups, others])
        text = ridge(prior.texts, prior.targets, text_groups)
        c = ((prior.texts - text.mean) / text.std).double()
        spoken = prior.targets.double() - text.bias.double()
        (wrong,) = _Spectrum(c, text_groups).left_out(spoken, [text.strength])
        inverse = torch.linalg.inv(c.T @ c + text.strength * torch.eye(c.shape[1], dtype=torch.double))
        translate = text.weight.double().T  # (k, t)
        project = std.double()[:, None] * prior.projection.double() / text.std.double()
        # Scaled to the spread of the standardised texts, so that a share of 1 is the text regression as it is.
        project /= (x @ project).square().mean().sqrt()
        outputs = torch.cat([outputs, x @ project], dim=1)

    best = (-math.inf, 0.0, 0.0)
    strengths = (len(x) * 10 ** torch.linspace(-3, 4, 29)).tolist()
    for strength, left_out in zip(strengths, spectrum.left_out(outputs, strengths), strict=True):
        predicted = t - left_out[:, : t.shape[1]]
        scores = functional.cosine_similarity(predicted, t).mean()[None]
        if prior:
            # Of a row's projected features, q is what the other rows do not explain: only this part of the prior stays.
            q = left_out[:, t.shape[1] :]
            added = q @ translate
            for rows in spectrum.groups:
                added[rows] -= q[rows] @ (inverse @ (c[rows].mT @ wrong[rows]))
            aa, ab, bb = (predicted * predicted).sum(1), (predicted * added).sum(1), (added * added).sum(1)
            norms = (aa[:, None] + 2 * shares * ab[:, None] + shares**2 * bb[:, None]).sqrt()
            dots = (predicted * t).sum(1)[:, None] + shares * (added * t).sum(1)[:, None]
            scores = (dots / norms).mean(0)
        place = int(scores.argmax())
        best = max(best, (scores[place].item(), strength, shares[place].item()))
    score, strength, share = best
    start = share * project @ translate if prior else torch.zeros(x.shape[1], t.shape[1], dtype=torch.double)
    weight = start.T + spectrum.weight(t - mean - x @ start, strength)
    towards = start.T.float() if prior else None
    return Ridge(centre, std, weight.float(), mean.float(), strength, share, score, towards)


def refit(found: Ridge, features: Tensor, targets: Tensor, left_out: Sequence[np.ndarray]) -> list[Ridge]:
    """Fit a ridge regression again without some of its rows: with the same standardisation, strength and prior.

    Args:
        found: what `ridge` made of the features (n, d) and the targets (n, t), float32.
        left_out: for each fit the rows that it is without, a mask (n,) that spares at least one.
    """
    x, t = ((features - found.mean) / found.std).double(), targets.double()
    prior = torch.zeros(t.shape[1], x.shape[1], dtype=torch.double) if found.prior is None else found.prior.double()
    rest = t - x @ prior.T
    primal = len(x) > x.shape[1]
    gram, product = (x.T @ x, x.T @ rest) if primal else (x @ x.T, None)
    fits = []
    for out in map(torch.from_numpy, left_out):
        mean, level = x[~out].mean(0), rest[~out].mean(0)
        if primal:
            # The Gram matrix of the other rows at mean 0 follows from that of all rows.
            count = (~out).sum()
            inner = gram - x[out].T @ x[out] - count * torch.outer(mean, mean)
            inner.diagonal().add_(found.strength)
            outputs = product - x[out].T @ rest[out] - count * torch.outer(mean, level)
            weight = torch.cholesky_solve(outputs, torch.linalg.cholesky(inner)).T
        else:
            inner = gram[~out][:, ~out]
            level_of = inner.mean(0)
            inner = inner - level_of - level_of[:, None] + level_of.mean()
            inner.diagonal().add_(found.strength)
            weight = torch.cholesky_solve(rest[~out] - level, torch.linalg.cholesky(inner)).T @ (x[~out] - mean)
        fits.append(replace(found, weight=(weight + prior).float(), bias=(level - weight @ mean).float()))
    return fits
