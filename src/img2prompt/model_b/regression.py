"""The weighted mean of the neighbours' targets (eq. 4-5)."""

from itertools import pairwise
from math import log

import numpy as np
import torch
from torch.nn import functional as F

from img2prompt.core.blocks import blocks
from img2prompt.core.metric import norms, unit
from img2prompt.core.progress import progress
from img2prompt.model_b.neighbours import Neighbours, double, on_device

GATHERED = 6 * 2**20  # floats of neighbours' targets gathered at once: of fewer, starting products costs too much


def _relative_weights(distance: torch.Tensor, distance_dim: torch.Tensor, eps: float, coef: float) -> torch.Tensor:
    """Eq. 4 times a factor for each row that brings its largest weight to between 1/2 and 1. (..., k) float64.

    In logarithms, because d**64 of close neighbours is far below what even float64 can hold.
    """
    log_distance = distance.double().log().clamp(min=torch.finfo(torch.float64).min)  # finite: 0**0 is 1
    log_power, log_eps = (distance_dim * log_distance).sub_(log(coef)), log(eps) - log(coef)
    largest = log_power.amin(dim=-1, keepdim=True).clamp(min=log_eps)
    return log_power.sub_(largest).exp_().add_((log_eps - largest).exp()).reciprocal_()


def weights(distance: np.ndarray, distance_dim: float, eps: float, coef: float) -> np.ndarray:
    """w_i = coef / (d_i**distance_dim + eps), eq. 4, scaled as in eq. 5 to sum to 1: (n, k) float64.

    distance: (n, k). coef cancels. eps keeps the weight of an exact match (d = 0) finite: such a neighbour
    counts d**distance_dim / eps times as much as one at distance d. It also levels the weights: where
    d**distance_dim is far below eps, all neighbours count alike, so a large power of small distances needs a tiny eps.
    With distance_dim 0 they always count alike. Raises ValueError unless distance_dim >= 0, eps > 0 and coef > 0.
    """
    _check_formula(distance_dim, eps, coef)
    power = torch.tensor(distance_dim, dtype=torch.float64)
    relative = _relative_weights(torch.as_tensor(distance), power, eps, coef)
    return (relative / relative.sum(dim=-1, keepdim=True)).numpy()


def _check_formula(distance_dim: float, eps: float, coef: float) -> None:
    if not (distance_dim >= 0 and eps > 0 and coef > 0):
        raise ValueError(f"{distance_dim=}, {eps=}, {coef=}: need distance_dim >= 0, eps > 0 and coef > 0")


def regress(
    neighbours: Neighbours,
    targets: np.ndarray | torch.Tensor,
    k: int,
    distance_dim: float,
    eps: float,
    coef: float,
    device: str = "cpu",
) -> np.ndarray:
    """B = sum w_i T_i / sum w_i over the first k neighbours, eq. 5, scaled to norm 1: (n, 384) float32.

    targets: (m, 384), the rows that neighbours.index refers to.
    Raises ValueError as `weights` does, where fewer than k neighbours are given, or a row's weighted targets cancel.
    """
    if not 1 <= k <= neighbours.index.shape[1]:
        raise ValueError(f"k={k}, but {neighbours.index.shape[1]} neighbours were searched")
    _check_formula(distance_dim, eps, coef)
    rows_of, found = on_device(targets, device), np.empty((len(neighbours.index), targets.shape[1]), np.float32)
    for rows in blocks(len(found)):
        share = weights(neighbours.distance[rows, :k], distance_dim, eps, coef)
        # embedding_bag sums the weighted rows as it reads them: targets[index] alone would be n * k * 384 floats.
        mean = F.embedding_bag(
            torch.from_numpy(neighbours.index[rows, :k]).to(device),
            rows_of,
            mode="sum",
            per_sample_weights=on_device(share, device),
        )
        found[rows] = unit(mean.cpu().numpy(), rows.start)
    return found


def grid_scores(
    neighbours: Neighbours,
    targets: np.ndarray,
    own: np.ndarray,
    ks: tuple[int, ...],
    distance_dims: tuple[float, ...],
    eps: float,
    coef: float,
    device: str = "cpu",
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Cosine with own (n, 384) of what `regress` predicts for each k and distance_dim: (n, ks, dims) float32.

    targets: (m, 384), as in `regress`; own: the rows' own targets; ks ascending. rows: (r,) int, those to score; None:
    all n. A row's neighbours are fetched once; one small matrix product per step from k to the next k extends the
    weighted sums of all powers. Raises ValueError as `weights` does, and where a row of own is all zeros or not finite.
    """
    for distance_dim in distance_dims:
        _check_formula(distance_dim, eps, coef)
    rows = np.arange(len(own)) if rows is None else rows
    lengths = np.concatenate([norms(own[part], part.start) for part in blocks(len(own))])
    targets = on_device(targets, device)
    powers = double(torch.tensor(distance_dims, device=device))[:, None]
    scores = np.empty((len(rows), len(ks), len(distance_dims)), dtype=np.float32)
    step = max(1, GATHERED // (ks[-1] * targets.shape[1]))
    fetched = targets.new_empty(step * ks[-1], targets.shape[1])  # reused: a fresh one page-faults
    for start in progress(range(0, len(rows), step), "search k and distance_dim"):
        some = rows[start : start + step]
        index = torch.from_numpy(neighbours.index[some, : ks[-1]]).to(device)
        distance = double(torch.from_numpy(neighbours.distance[some, : ks[-1]]).to(device))
        direction = on_device(own[some] / lengths[some, None], device)[..., None]  # (step, 384, 1)
        gathered = torch.index_select(targets, 0, index.flatten(), out=fetched[: index.numel()])
        gathered = gathered.view(*index.shape, -1)  # (step, k, 384)
        weight = _relative_weights(distance[:, None], powers, eps, coef).float().to(device)  # (step, dims, k)
        total = targets.new_zeros(len(index), len(distance_dims), targets.shape[1])
        for column, (low, high) in enumerate(pairwise((0, *ks))):
            total.baddbmm_(weight[:, :, low:high], gathered[:, low:high])
            length = torch.linalg.vector_norm(total, dim=2).clamp(min=1e-8)  # of targets that cancel
            scores[start : start + step, column] = ((total @ direction)[..., 0] / length).cpu()
    return scores
