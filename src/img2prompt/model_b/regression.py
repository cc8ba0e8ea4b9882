"""The weighted mean of the neighbours' targets (eq. 4-5)."""

import numpy as np
import torch
from torch.nn import functional as F

from img2prompt.core.blocks import blocks
from img2prompt.core.metric import unit
from img2prompt.core.progress import progress
from img2prompt.model_b.neighbours import GATHERED, Neighbours, double, on_device


def _relative_weights(distance: torch.Tensor, distance_dim: torch.Tensor, eps: float, coef: float) -> torch.Tensor:
    """Eq. 4 divided by the largest weight of each row: in (0, 1], whatever the power. (..., k) float64.

    In logarithms, because d**64 of close neighbours is far below what even float64 can hold.
    """
    log_power = torch.xlogy(distance_dim, distance.double())  # 0 for distance_dim 0, even where d is 0
    log_eps = torch.tensor(eps, dtype=torch.float64, device=distance.device).log()
    log_weight = np.log(coef) - torch.logaddexp(log_power, log_eps)
    return (log_weight - log_weight.amax(dim=-1, keepdim=True)).exp()


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
) -> np.ndarray:
    """Cosine with own (n, 384) of what `regress` predicts for each k and distance_dim: (n, ks, dims) float32.

    targets: (m, 384), as in `regress`; own: the rows' own targets; ks ascending. A row's neighbours are fetched once;
    one small matrix product per step from k to the next k extends the weighted sums of all powers. Raises ValueError
    as `weights` does, and where a row of own is all zeros or not finite.
    """
    for distance_dim in distance_dims:
        _check_formula(distance_dim, eps, coef)
    targets = on_device(targets, device)
    powers = double(torch.tensor(distance_dims, device=device))[:, None]
    scores = np.empty((len(own), len(ks), len(distance_dims)), dtype=np.float32)
    step = max(1, 4 * GATHERED // (ks[-1] * targets.shape[1]))
    for start in progress(range(0, len(own), step), "search k and distance_dim"):
        rows = slice(start, start + step)
        index = torch.from_numpy(neighbours.index[rows, : ks[-1]]).to(device)
        distance = double(torch.from_numpy(neighbours.distance[rows, : ks[-1]]).to(device))
        own_rows = on_device(unit(own[rows], start), device)
        gathered = targets[index]  # (step, k, 384)
        weight = _relative_weights(distance[:, None], powers, eps, coef).float().to(device)  # (step, dims, k)
        total = targets.new_zeros(len(index), len(distance_dims), targets.shape[1])
        for column, (low, high) in enumerate(zip((0, *ks), ks, strict=False)):
            total.baddbmm_(weight[:, :, low:high], gathered[:, low:high])
            scores[rows, column] = F.cosine_similarity(total, own_rows[:, None], dim=2).cpu()
    return scores
